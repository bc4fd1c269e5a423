"""One decoder layer's part of a calibration.

The layer is run some times: a few tokens to see what reads what; all samples for the channels to be
smoothed; all samples for ranges; all samples to choose codes by (see `rounding`); and, where later
layers are to see quantized inputs, all samples with the engine's arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantcli.calibration.engine import Engine
from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.layout import LayerLayout, Producer
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

    def measure(self, sink: Sink | None) -> dict[str, Tensor]:
        """Statistics and edits by their names in the store; `sink` takes the layer's outputs.

        Raises InputError for NaN or Inf, for siblings with different inputs that the engine gives one
        scale, and for modules without tokens where the recipe says so.
        """
        load = self.run.skeleton.loaded
        with load(self.index, read_tensor, self.run.device):
            layout = self._look()
            self._check_siblings(layout)
            edits = self._smooth(layout)
            if not edits:
                stats = self._ranges(layout, edits, sink)
        if edits:
            with load(self.index, _edited(edits), self.run.device):
                stats = self._ranges(layout, edits, sink)
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
                if merged is None or matrix not in leaders or self.run.wishes.observer(module) is None:
                    continue
                other, leader = first.setdefault(merged, (module, leaders[matrix]))
                if leader != leaders[matrix]:
                    raise InputError(
                        f"the engine gives `{module}` and `{other}` one input scale, and they have "
                        "different inputs",
                        where=self.run.wishes.quantized[module].rule,
                        fix="give them a scheme with dynamic inputs, such as w8a8_dynamic",
                    )

    # -- smoothing -------------------------------------------------------------------------------

    def _smooth(self, layout: LayerLayout) -> dict[str, Factors]:
        """The edits that smooth the layer, by stored tensor."""
        wishes = self.run.wishes
        wanted: list[tuple[Producer, float]] = []
        for producer in layout.producers():
            modules = layout.modules(reader.matrix for reader in producer.readers)
            quantized = [module for module in modules if module in wishes.quantized]
            alpha = wishes.alpha(quantized) if quantized else None
            if alpha is not None:
                wanted.append((producer, alpha))
        if not wanted:
            return {}
        widths = {r.matrix: len(r.channels) for producer, _ in wanted for r in producer.readers}
        observers = {matrix: ChannelAmax() for matrix in widths}
        self._watch(Watch({matrix: [observer] for matrix, observer in observers.items()}), None)
        amax = {
            m: o.stats()["channel_amax"] if o.tokens else torch.zeros(widths[m])
            for m, o in observers.items()
        }
        weights = {matrix: self._weight(matrix) for matrix in widths}
        edits: dict[str, Factors] = {}
        for producer, alpha in wanted:
            scale = scales(producer, amax, weights, alpha)
            if producer.norm is not None:
                scale = self._smooth_norm(producer.norm, scale, edits)
            if bool((scale == 1).all()):
                continue
            fold(producer, layout.segments, scale, edits)
            self.report["smoothed"].append(
                {
                    "producer": producer.name,
                    "alpha": alpha,
                    "least": float(scale.min()),
                    "most": float(scale.max()),
                    "readers": sorted({r.matrix.parameter for r in producer.readers}),
                }
            )
        stored = self.run.skeleton.checkpoint.tensors
        return {name: factors for name, factors in edits.items() if name in stored}

    def _smooth_norm(self, path: str, scale: Tensor, edits: dict[str, Factors]) -> Tensor:
        """Edit a norm; the scales as they came out, all 1 where it is none that can be scaled."""
        module = self._layer.get_submodule(path.removeprefix(f"{self.name}."))
        offset = norm_offset(module)
        if offset is None:
            return torch.ones_like(scale)
        made, real = scale_norm(module, offset, scale)
        stored = {suffix: self.run.skeleton.source(f"{path}.{suffix}") for suffix in made}
        if None in stored.values():
            return torch.ones_like(scale)
        edits.update({str(stored[suffix]): Factors(value=tensor) for suffix, tensor in made.items()})
        return real

    def _weight(self, matrix: Matrix) -> Tensor:
        weight = self._layer.get_parameter(matrix.parameter.removeprefix(f"{self.name}."))
        return weight[matrix.expert] if weight.dim() == 3 else weight

    # -- ranges ----------------------------------------------------------------------------------

    def _ranges(
        self, layout: LayerLayout, edits: Mapping[str, Factors], sink: Sink | None
    ) -> dict[str, Stats]:
        """What every module's scheme asks for; `sink` takes outputs as later layers are to see them."""
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
        stats = self._settle(observers)
        rounding = RoundingPass(
            self.run, self.index, layout, edits, stats, lambda seen, only: self._watch(seen, None, only)
        )
        rounding.round()
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
