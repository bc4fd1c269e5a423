"""One decoder layer's part of a calibration.

The layer is run several times: on a few tokens, to see which matrix reads which channels; on all
samples for smoothing, for ranges, and for the choice of codes (see `rounding`); and, if later layers
are given quantized inputs, on all samples with the engine's arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from quantcli.calibration.channels import LayerLayout
from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.methods.learning import Course, learn, learning_groups
from quantcli.calibration.methods.rounding import RoundingPass
from quantcli.calibration.methods.smoothing import smooth
from quantcli.calibration.policy import not_finite, unreached
from quantcli.calibration.replay.replay import Sink
from quantcli.calibration.replay.states import States
from quantcli.calibration.replay.taps import Matrix, Tap
from quantcli.calibration.report import LayerReport, ModuleReport
from quantcli.calibration.shown import quantized, running
from quantcli.calibration.store import pack_edits
from quantcli.calibration.watch import Watch
from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS, Stats
from quantcli.planning.measured import EditFactors
from quantcli.schemes.arithmetic.observers import ChannelSquare, Observer
from quantcli.schemes.base import Scheme


@dataclass
class LayerRun:
    """A layer, its inputs, and its statistics."""

    layer: LoadedLayer

    def __post_init__(self) -> None:
        self.report = LayerReport(self.layer.name)

    @property
    def run(self) -> CalibrationRun:
        """The calibration that the layer is part of."""
        return self.layer.run

    @property
    def note(self) -> str:
        """A remark for the progress display."""
        learned = self.report.learned
        if learned is None:
            return ""
        text = f"loss {learned.loss_before:.2e} -> {learned.loss_after:.2e}"
        return text if learned.kept != "the start" else f"{text}: no better, kept as it was"

    def measure(self, sink: Sink | None) -> dict[str, Tensor]:
        """Statistics and edits by their names in the store; `sink` takes the layer's outputs.

        Raises InputError for NaN or Inf, for siblings with different inputs that the engine gives one
        scale, and for modules without tokens if the recipe says so.
        """
        edits: dict[str, EditFactors] = {}
        learned: dict[str, Stats] = {}
        with self.layer.loaded({}):
            layout = self._look()
            self._check_siblings(layout)
            groups = learning_groups(layout, self.run.policy)
            self.report.smoothed = smooth(self.layer, layout, edits)
            if not edits and not groups:
                stats = self._ranges(layout, learned, edits, sink)
        if groups:
            with self.layer.loaded(edits):
                learned, self.report.learned = learn(self.layer, layout, groups, edits)
        if edits or groups:
            with self.layer.loaded(edits):
                stats = self._ranges(layout, learned, edits, sink)
        stored = self.run.skeleton.checkpoint.tensors
        edits = {name: factors for name, factors in edits.items() if name in stored}
        vectors, self.report.edits = pack_edits(edits)
        return vectors | {
            f"stats.{module}.{name}": tensor
            for module, module_stats in stats.items()
            for name, tensor in module_stats.items()
        }

    def _look(self) -> LayerLayout:
        """Run a few tokens and follow their tensors."""
        layer, ids = self.layer, self.run.probe.input_ids
        flow = Flow(layer.matrices(), None, ids.numel())
        first, probe = _First(layer.states, ids.shape[1]), [len(self.run.batches)]
        with norms_followed(layer.name, layer.module):
            self.run.replay.run(
                layer.index, layer.module, first, tap=lambda _: flow, only=probe, check=False
            )
        return LayerLayout(layer.segments, flow)

    def _check_siblings(self, layout: LayerLayout) -> None:
        leaders = layout.leaders()
        first: dict[str, tuple[str, Matrix]] = {}
        for matrix, segments in layout.matrices():
            for module in (s.module for s in segments):
                fused = self.run.policy.fused_name(module)
                if fused is None or matrix not in leaders or not self.run.policy.measures(module):
                    continue
                other, leader = first.setdefault(fused, (module, leaders[matrix]))
                if leader != leaders[matrix]:
                    raise InputError(
                        f"the engine merges `{module}` and `{other}`, with one input scale or "
                        "transform for both, and they have different inputs",
                        where=self.run.policy.quantized[module].rule,
                        fix="give them a scheme with dynamic inputs, such as w8a8_dynamic",
                    )

    # -- ranges ----------------------------------------------------------------------------------

    def _ranges(
        self,
        layout: LayerLayout,
        learned: dict[str, Stats],
        edits: Mapping[str, EditFactors],
        sink: Sink | None,
    ) -> dict[str, Stats]:
        """`learned`, and all other stats that the modules' schemes need. `sink` takes the outputs that
        later layers are given."""
        leaders = layout.leaders()
        shared: dict[Matrix, dict[Scheme, Observer]] = defaultdict(dict)
        observers: dict[str, Observer] = {}
        squares: dict[Matrix, Observer] = {}
        squares_of: dict[str, Observer] = {}
        for matrix, segments in layout.matrices():
            for segment in segments:
                observer = self.run.policy.observer(segment.module)
                if observer is not None:  # siblings with one scheme share one observer
                    scheme = self.run.policy.quantized[segment.module].scheme
                    group = shared[leaders.get(matrix, matrix)]
                    observers[segment.module] = group.setdefault(scheme, observer)
                if self.run.policy.weighs_inputs(segment.module):
                    leader = leaders.get(matrix, matrix)
                    square = squares.setdefault(leader, Observer(ChannelSquare()))
                    squares_of[segment.module] = square
        inputs = self.run.policy.inputs
        engine = None
        if inputs == "running":
            engine = self.layer.engine(running(self.run.policy))
        watched: dict[Matrix, list[Observer]] = defaultdict(list)
        for matrix, of in shared.items():
            watched[matrix] += of.values()
        for matrix, square in squares.items():
            watched[matrix].append(square)
        watch = Watch(watched, engine)
        as_quantized = inputs == "quantized" and sink is not None
        self.layer.watch(watch, None if as_quantized else sink)
        stats = learned | self._settle(observers)
        self._add_squares(stats, squares_of)
        for matrix, segments in layout.matrices():
            for module in (s.module for s in segments):
                tensors = stats.get(module, NO_STATS).items()
                numbers = {name: float(tensor) for name, tensor in tensors if tensor.shape == (1,)}
                self.report.modules[module] = ModuleReport(watch.tokens[matrix], numbers)
        RoundingPass(self.layer, layout, edits, stats, self.report.modules).round()
        self._measure_served(learned, stats)
        if as_quantized:
            self._run_quantized(stats, sink)
        return stats

    def _add_squares(self, stats: dict[str, Stats], squares_of: Mapping[str, Observer]) -> None:
        """Add `input_square` to the stats of modules that saw a token."""
        for module, square in squares_of.items():
            if not square.finite:
                raise not_finite(module, str(self.run.skeleton.checkpoint.path))
            if square.tokens:
                stats[module] = {**stats.get(module, NO_STATS), **square.stats()}

    def _measure_served(self, learned: Mapping[str, Stats], stats: Mapping[str, Stats]) -> None:
        """Report the loss with the engine's arithmetic in the modules that have learned."""
        if learned:
            policy = self.run.policy
            only = replace(policy, quantized={m: policy.quantized[m] for m in learned})
            assert self.report.learned is not None
            loss = Course(self.layer, {}).served_loss(quantized(only, stats))
            self.report.learned.loss_served = loss

    def _run_quantized(self, stats: Mapping[str, Stats], sink: Sink | None) -> None:
        engine = self.layer.engine(quantized(self.run.policy, stats))
        matrices = self.layer.matrices()
        self.layer.forward(sink, lambda _: Tap(matrices, engine))

    def _settle(self, observers: Mapping[str, Observer]) -> dict[str, Stats]:
        """Stats of every module; those that saw no token follow the recipe's policy."""
        policy = self.run.policy
        for module, observer in observers.items():
            if not observer.finite:
                raise not_finite(module, str(self.run.skeleton.checkpoint.path))
        stats_of = {
            o: o.stats() for o in dict.fromkeys(observers.values()) if o.tokens
        }  # once if shared
        stats = {module: stats_of[o] for module, o in observers.items() if o in stats_of}
        empty = sorted(observers.keys() - stats.keys())
        self.report.uncalibrated = empty
        if empty and policy.uncalibrated == "error":
            raise unreached(empty, policy.quantized[empty[0]].rule)
        for module in empty if policy.uncalibrated == "group" else ():
            others = [observers[m] for m in stats if _alike(m) == _alike(module)]
            union = policy.observer(module)
            if not others or union is None:
                raise unreached([module], policy.quantized[module].rule)
            for other in dict.fromkeys(others):
                union.absorb(other)
            stats[module] = union.stats()
        return stats


@dataclass(frozen=True)
class _First:
    """The first tokens of the first sample."""

    states: States
    length: int

    def get(self, batch: int) -> Tensor:
        """Hidden states [1, length, ...]."""
        return self.states.get(0)[:1, : self.length]


def _alike(module: str) -> tuple[str, ...]:
    """A module's name without its numbers: the same for the same part of all experts."""
    return tuple("" if part.isdigit() else part for part in module.split("."))
