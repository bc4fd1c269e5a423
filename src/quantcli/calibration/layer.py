"""One decoder layer's part of a calibration.

The layer is run some times: a few tokens to see what reads what; all samples for the channels to be
smoothed; all samples for ranges; all samples to choose codes by (see `rounding`); and, where later
layers are to see quantized inputs, all samples with the engine's arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.calibration.engine import Engine
from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.layout import LayerLayout, Producer
from quantcli.calibration.learned import Group, groups, learners, schedule_of, settle
from quantcli.calibration.learning import Course
from quantcli.calibration.replay import Sink
from quantcli.calibration.rounding import RoundingPass
from quantcli.calibration.run import Run
from quantcli.calibration.shown import quantized, running
from quantcli.calibration.skeleton import Read
from quantcli.calibration.smoothing import fold, norm_offset, scale_norm, scales
from quantcli.calibration.states import States
from quantcli.calibration.store import pack_edits
from quantcli.calibration.taps import Matrices, Matrix, Tap
from quantcli.calibration.watch import Watch, layer_watched, watched
from quantcli.calibration.wishes import not_finite, unreached
from quantcli.errors import InputError
from quantcli.header import StoredTensor
from quantcli.measured import Factors
from quantcli.numerics import NO_STATS, Stats
from quantcli.schemes.base import Scheme
from quantcli.schemes.observers import ChannelAmax, Observer
from quantcli.tensors import read_tensor


def empty_report(name: str) -> dict[str, Any]:
    """The report of a layer of which nothing is asked."""
    report: dict[str, Any] = {"layer": name, "modules": {}, "smoothed": [], "edits": {}}
    return report | {"uncalibrated": []}


@dataclass
class LayerRun:
    """A layer, its inputs, and what is found; `report` is JSON-able."""

    run: Run
    index: int
    states: States
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name, self._layer = self.run.skeleton.layers[self.index]
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
        edits: dict[str, Factors] = {}
        learned: dict[str, Stats] = {}

        def load() -> AbstractContextManager[nn.Module]:
            return self.run.skeleton.loaded(self.index, _edited(edits), self.run.device)

        with load():
            layout = self._look()
            self._check_siblings(layout)
            found = groups(layout, self.run.wishes)
            self._smooth(layout, edits)
            if not edits and not found:
                stats = self._ranges(layout, learned, edits, sink)
        if found:
            with load():
                learned = self._learn(layout, found, edits)
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
                merged = self.run.wishes.merged(module)
                if merged is None or matrix not in leaders or not self.run.wishes.measures(module):
                    continue
                other, leader = first.setdefault(merged, (module, leaders[matrix]))
                if leader != leaders[matrix]:
                    raise InputError(
                        f"the engine merges `{module}` and `{other}`, with one input scale or transform "
                        "for both, and they have different inputs",
                        where=self.run.wishes.quantized[module].rule,
                        fix="give them a scheme with dynamic inputs, such as w8a8_dynamic",
                    )

    # -- edits -----------------------------------------------------------------------------------

    def _smooth(self, layout: LayerLayout, edits: dict[str, Factors]) -> None:
        """Add the edits that smooth the layer."""
        wishes = self.run.wishes
        wanted: list[tuple[Producer, float]] = []
        for producer in layout.producers():
            modules = layout.modules(reader.matrix for reader in producer.readers)
            quantized = [module for module in modules if module in wishes.quantized]
            alpha = wishes.alpha(quantized) if quantized else None
            if alpha is not None:
                wanted.append((producer, alpha))
        if not wanted:
            return
        widths = {r.matrix: len(r.channels) for producer, _ in wanted for r in producer.readers}
        amax = self._channel_amax(widths)
        weights = {matrix: self._weight(matrix) for matrix in widths}
        for producer, alpha in wanted:
            scale = scales(producer, amax, weights, alpha)
            scale = self._divide(layout, producer, scale, edits)
            if bool((scale == 1).all()):
                continue
            self.report["smoothed"].append(
                {
                    "producer": producer.name,
                    "alpha": alpha,
                    "least": float(scale.min()),
                    "most": float(scale.max()),
                    "readers": sorted({r.matrix.parameter for r in producer.readers}),
                }
            )

    def _channel_amax(self, widths: Mapping[Matrix, int]) -> dict[Matrix, Tensor]:
        """max |x| of each column of some matrices, of that many; zeros where nothing was seen."""
        observers = {matrix: ChannelAmax() for matrix in widths}
        self._watch(Watch({matrix: [observer] for matrix, observer in observers.items()}), None)
        return {
            m: o.stats()["channel_amax"] if o.tokens else torch.zeros(widths[m])
            for m, o in observers.items()
        }

    def _divide(
        self, layout: LayerLayout, producer: Producer, scale: Tensor, edits: dict[str, Factors]
    ) -> Tensor:
        """Divide a producer's channels by scales [channels], and multiply what reads them; the scales as
        they came out, all 1 where it is a norm that cannot be scaled."""
        if producer.norm is not None:
            module = self._layer.get_submodule(producer.norm.removeprefix(f"{self.name}."))
            made, scale = self._divided_norm(producer.norm, module, scale)
            edits |= made
        if bool((scale != 1).any()):
            fold(producer, layout.segments, scale, edits)
        return scale

    def _divided_norm(
        self, path: str, module: nn.Module, scale: Tensor
    ) -> tuple[dict[str, Factors], Tensor]:
        offset = norm_offset(module)
        if offset is not None:
            made, real = scale_norm(module, offset, scale)
            stored = {suffix: self.run.skeleton.source(f"{path}.{suffix}") for suffix in made}
            if None not in stored.values():
                new = {str(stored[suffix]): Factors(value=tensor) for suffix, tensor in made.items()}
                return new, real
        return {}, torch.ones_like(scale)

    def _weight(self, matrix: Matrix) -> Tensor:
        weight = self._layer.get_parameter(matrix.parameter.removeprefix(f"{self.name}."))
        return weight[matrix.expert] if weight.dim() == 3 else weight

    # -- learning --------------------------------------------------------------------------------

    def _learn(
        self, layout: LayerLayout, found: list[Group], edits: dict[str, Factors]
    ) -> dict[str, Stats]:
        """Learn what schemes learn; adds the edits of producers."""
        run, wishes = self.run, self.run.wishes
        generator = torch.Generator().manual_seed(wishes.seed * 2**20 + self.index)
        widths = {g.matrices[0]: self._weight(g.matrices[0]).shape[1] for g in found}
        amax = self._channel_amax(widths)
        made = learners(found, layout, wishes, self._weight, amax, generator)
        course = Course(
            run.replay, self.index, self._layer, self.states, run.batches, made, run.held_targets
        )
        before, after = course.learn(schedule_of(found), generator)
        for group in found:
            learner = made[group.matrices[0]]
            scale = learner.channel_scale
            if group.producer is not None and scale is not None:
                by_channel = torch.ones(len(group.producer.used))
                by_channel[group.columns] = 1 / scale
                self._divide(layout, group.producer, by_channel, edits)
        self.report["learned"] = {
            "modules": sorted(module for group in found for module in group.modules),
            "loss_before": before,
            "loss_after": after,
            "kept": "what was learned" if after < before else "the start",
            "condition": max(learner.condition for learner in made.values()),
        }
        return settle(found, made, layout.segments)

    def _measure_served(
        self, layout: LayerLayout, learned: Mapping[str, Stats], stats: Mapping[str, Stats]
    ) -> None:
        """What the layer loses by the engine's arithmetic in the modules that have learned."""
        if learned:
            wishes = self.run.wishes
            only = replace(wishes, quantized={m: wishes.quantized[m] for m in learned})
            course = Course(
                self.run.replay, self.index, self._layer, self.states, self.run.batches, {}, 0
            )
            loss = course.served_loss(layout.segments, quantized(only, stats))
            self.report["learned"]["loss_served"] = loss

    # -- ranges ----------------------------------------------------------------------------------

    def _ranges(
        self,
        layout: LayerLayout,
        learned: dict[str, Stats],
        edits: Mapping[str, Factors],
        sink: Sink | None,
    ) -> dict[str, Stats]:
        """`learned`, and what every module's scheme asks for besides; `sink` takes outputs as later
        layers are to see them."""
        leaders = layout.leaders()
        shared: dict[Matrix, dict[Scheme, Observer]] = defaultdict(dict)
        observers: dict[str, Observer] = {}
        for matrix, segments in layout.matrices():
            for segment in segments:
                observer = self.run.wishes.observer(segment.module)
                if observer is not None:  # siblings with one scheme share one observer
                    scheme = self.run.wishes.quantized[segment.module].scheme
                    group = shared[leaders.get(matrix, matrix)]
                    observers[segment.module] = group.setdefault(scheme, observer)
        inputs = self.run.wishes.inputs
        engine = None
        if inputs == "running":
            engine = Engine(self.name, self._layer, layout.segments, running(self.run.wishes))
        watch = Watch({matrix: list(of.values()) for matrix, of in shared.items()}, engine)
        as_quantized = inputs == "quantized" and sink is not None
        self._watch(watch, None if as_quantized else sink)
        stats = learned | self._settle(observers)
        rounding = RoundingPass(
            self.run, self.index, layout, edits, stats, lambda seen, only: self._watch(seen, None, only)
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
                told = rounding.report.get(module, {})
                self.report["modules"][module] = {"tokens": watch.tokens[matrix], **numbers, **told}
        return stats

    def _watch(self, watch: Watch, sink: Sink | None, only: Sequence[int] | None = None) -> None:
        batches = self.run.batches
        matrices = Matrices(self.name, self._layer)
        with layer_watched(self.name, self._layer, batches):
            self.run.replay.run(
                self.index,
                self._layer,
                self.states,
                sink,
                tap=lambda number: watched(watch, matrices, number, batches[number]),
                only=range(len(batches)) if only is None else only,
            )

    def _run_quantized(
        self, layout: LayerLayout, stats: Mapping[str, Stats], sink: Sink | None
    ) -> None:
        quantizer = quantized(self.run.wishes, stats)
        engine = Engine(self.name, self._layer, layout.segments, quantizer)
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
        wishes = self.run.wishes
        for module, observer in observers.items():
            if not observer.finite:
                raise not_finite(module, str(self.run.skeleton.checkpoint.path))
        chosen = {o: o.stats() for o in dict.fromkeys(observers.values()) if o.tokens}  # once if shared
        settled = {module: chosen[o] for module, o in observers.items() if o in chosen}
        empty = sorted(observers.keys() - settled.keys())
        self.report["uncalibrated"] = empty
        if empty and wishes.uncalibrated == "error":
            raise unreached(empty, wishes.quantized[empty[0]].rule)
        for module in empty if wishes.uncalibrated == "group" else ():
            others = [observers[m] for m in settled if _alike(m) == _alike(module)]
            merged = wishes.observer(module)
            if not others or merged is None:
                raise unreached([module], wishes.quantized[module].rule)
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


def _edited(edits: Mapping[str, Factors]) -> Read:
    def read(stored: StoredTensor) -> Tensor:
        tensor = read_tensor(stored)
        factors = edits.get(stored.spec.name)
        return tensor if factors is None else factors.apply(tensor).to(tensor.dtype)

    return read


def _alike(module: str) -> tuple[str, ...]:
    """A module's name without its numbers: the same for the same part of all experts."""
    return tuple("" if part.isdigit() else part for part in module.split("."))
