"""One decoder layer's part of a calibration.

The layer is run some times: a few tokens to see what reads what; all samples for the channels to be
smoothed; all samples for ranges; all samples to choose codes by (see `rounding`); and, where later
layers are to see quantized inputs, all samples with the engine's arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from quantcli.calibration.channels import LayerLayout
from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.methods.learning import Course, groups, learn
from quantcli.calibration.methods.rounding import RoundingPass
from quantcli.calibration.methods.smoothing import smooth
from quantcli.calibration.policy import not_finite, unreached
from quantcli.calibration.replay.engine import EngineLinears
from quantcli.calibration.replay.replay import Sink
from quantcli.calibration.replay.skeleton import Read
from quantcli.calibration.replay.states import States
from quantcli.calibration.replay.taps import Matrices, Matrix, Tap
from quantcli.calibration.shown import quantized, running
from quantcli.calibration.store import pack_edits
from quantcli.calibration.watch import Watch
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS, Stats
from quantcli.planning.measured import EditFactors
from quantcli.schemes.arithmetic.observers import Observer
from quantcli.schemes.base import Scheme


def empty_report(name: str) -> dict[str, Any]:
    """The report of a layer of which nothing is asked."""
    report: dict[str, Any] = {"layer": name, "modules": {}, "smoothed": [], "edits": {}}
    return report | {"uncalibrated": []}


@dataclass
class LayerRun:
    """A layer, its inputs, and its statistics; `report` is JSON-able."""

    run: CalibrationRun
    index: int
    states: States
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name, self._layer = self.run.skeleton.layers[self.index]
        self._here = LoadedLayer(self.run, self.index, self.states)
        self.report = empty_report(self.name)

    @property
    def note(self) -> str:
        """What there is to say of it while others are under way."""
        learned = self.report.get("learned")
        if learned is None:
            return ""
        text = f"loss {learned['loss_before']:.2e} -> {learned['loss_after']:.2e}"
        return text if learned["kept"] != "the start" else f"{text}: no better, kept as it was"

    def measure(self, sink: Sink | None) -> dict[str, Tensor]:
        """Statistics and edits by their names in the store; `sink` takes the layer's outputs.

        Raises InputError for NaN or Inf, for siblings with different inputs that the engine gives one
        scale, and for modules without tokens where the recipe says so.
        """
        edits: dict[str, EditFactors] = {}
        learned: dict[str, Stats] = {}

        def load() -> AbstractContextManager[nn.Module]:
            return self.run.skeleton.loaded(self.index, _edited(edits), self.run.device)

        with load():
            layout = self._look()
            self._check_siblings(layout)
            found = groups(layout, self.run.policy)
            self.report["smoothed"] = smooth(self._here, layout, edits)
            if not edits and not found:
                stats = self._ranges(layout, learned, edits, sink)
        if found:
            with load():
                learned, learning_report = learn(self._here, layout, found, edits)
            self.report |= {"learned": learning_report} if learning_report else {}
        if edits or found:
            with load():
                stats = self._ranges(layout, learned, edits, sink)
        stored = self.run.skeleton.checkpoint.tensors
        edits = {name: factors for name, factors in edits.items() if name in stored}
        vectors, self.report["edits"] = pack_edits(edits)
        named = {f"stats.{m}.{key}": t for m, found in stats.items() for key, t in found.items()}
        return named | vectors

    def _look(self) -> LayerLayout:
        """Run a few tokens and see where tensors go."""
        flow = Flow(Matrices(self.name, self._layer), None, self.run.probe.input_ids.numel())
        first = _First(self.states, self.run.probe.input_ids.shape[1])
        probe = [len(self.run.batches)]
        with norms_followed(self.name, self._layer):
            self.run.replay.run(
                self.index, self._layer, first, tap=lambda _: flow, only=probe, check=False
            )
        return LayerLayout(self.run.skeleton.segments(self.index), flow)

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
        """`learned`, and what every module's scheme asks for besides; `sink` takes outputs as later
        layers are to see them."""
        leaders = layout.leaders()
        shared: dict[Matrix, dict[Scheme, Observer]] = defaultdict(dict)
        observers: dict[str, Observer] = {}
        for matrix, segments in layout.matrices():
            for segment in segments:
                observer = self.run.policy.observer(segment.module)
                if observer is not None:  # siblings with one scheme share one observer
                    scheme = self.run.policy.quantized[segment.module].scheme
                    group = shared[leaders.get(matrix, matrix)]
                    observers[segment.module] = group.setdefault(scheme, observer)
        inputs = self.run.policy.inputs
        engine = None
        if inputs == "running":
            engine = EngineLinears(self.name, self._layer, layout.segments, running(self.run.policy))
        watch = Watch({matrix: list(of.values()) for matrix, of in shared.items()}, engine)
        as_quantized = inputs == "quantized" and sink is not None
        self._here.watch(watch, None if as_quantized else sink)
        stats = learned | self._settle(observers)
        here = self._here
        rounding = RoundingPass(
            self.run, self.index, layout, edits, stats, lambda seen, only: here.watch(seen, None, only)
        )
        rounding.round()
        self._measure_served(layout, learned, stats)
        if as_quantized:
            self._run_quantized(layout, stats, sink)
        for matrix, segments in layout.matrices():
            for module in (s.module for s in segments):
                numbers = {
                    name: float(tensor)
                    for name, tensor in stats.get(module, NO_STATS).items()
                    if tensor.shape == (1,)
                }
                module_report = rounding.report.get(module, {})
                self.report["modules"][module] = {
                    "tokens": watch.tokens[matrix],
                    **numbers,
                    **module_report,
                }
        return stats

    def _measure_served(
        self, layout: LayerLayout, learned: Mapping[str, Stats], stats: Mapping[str, Stats]
    ) -> None:
        """What the layer loses by the engine's arithmetic in the modules that have learned."""
        if learned:
            policy = self.run.policy
            only = replace(policy, quantized={m: policy.quantized[m] for m in learned})
            loss = Course(self._here, {}).served_loss(layout.segments, quantized(only, stats))
            self.report["learned"]["loss_served"] = loss

    def _run_quantized(
        self, layout: LayerLayout, stats: Mapping[str, Stats], sink: Sink | None
    ) -> None:
        quantizer = quantized(self.run.policy, stats)
        engine = EngineLinears(self.name, self._layer, layout.segments, quantizer)
        matrices = Matrices(self.name, self._layer)
        self.run.replay.run(
            self.index,
            self._layer,
            self.states,
            sink,
            tap=lambda _: Tap(matrices, engine),
            only=range(len(self.run.batches)),
        )

    def _settle(self, observers: Mapping[str, Observer]) -> dict[str, Stats]:
        """Stats of every module; those that saw no token follow the recipe's policy."""
        policy = self.run.policy
        for module, observer in observers.items():
            if not observer.finite:
                raise not_finite(module, str(self.run.skeleton.checkpoint.path))
        chosen = {o: o.stats() for o in dict.fromkeys(observers.values()) if o.tokens}  # once if shared
        settled = {module: chosen[o] for module, o in observers.items() if o in chosen}
        empty = sorted(observers.keys() - settled.keys())
        self.report["uncalibrated"] = empty
        if empty and policy.uncalibrated == "error":
            raise unreached(empty, policy.quantized[empty[0]].rule)
        for module in empty if policy.uncalibrated == "group" else ():
            others = [observers[m] for m in settled if _alike(m) == _alike(module)]
            merged = policy.observer(module)
            if not others or merged is None:
                raise unreached([module], policy.quantized[module].rule)
            for other in dict.fromkeys(others):
                merged.absorb(other)
            settled[module] = merged.stats()
        return settled


@dataclass(frozen=True)
class _First:
    """The first tokens of the first sample."""

    states: States
    length: int

    def get(self, batch: int) -> Tensor:
        """Hidden states [1, length, ...]."""
        return self.states.get(0)[:1, : self.length]


def _edited(edits: Mapping[str, EditFactors]) -> Read:
    def read(stored: StoredTensor) -> Tensor:
        tensor = read_tensor(stored)
        factors = edits.get(stored.spec.name)
        return tensor if factors is None else factors.apply(tensor).to(tensor.dtype)

    return read


def _alike(module: str) -> tuple[str, ...]:
    """A module's name without its numbers: the same for the same part of all experts."""
    return tuple("" if part.isdigit() else part for part in module.split("."))
