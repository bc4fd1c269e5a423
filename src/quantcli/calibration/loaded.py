"""A calibration, and one decoder layer of it while its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from quantcli.calibration.channels import Producer, fold, norm_offset, scale_norm
from quantcli.calibration.policy import Policy
from quantcli.calibration.replay.engine import EngineLinears, Quantizer
from quantcli.calibration.replay.experts import Experts, experts_of
from quantcli.calibration.replay.replay import Replay, Sink, Tap
from quantcli.calibration.replay.skeleton import Segments, Skeleton
from quantcli.calibration.replay.states import States
from quantcli.calibration.replay.taps import Matrices, Matrix
from quantcli.calibration.replay.taps import Tap as MatrixTap
from quantcli.calibration.shown import quantized
from quantcli.calibration.text.dataset import Batch
from quantcli.calibration.watch import Watch, layer_watched, watched
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.events import Progress
from quantcli.core.numerics import NO_STATS, Stats
from quantcli.planning.block import survey
from quantcli.planning.measured import EditFactors
from quantcli.schemes.arithmetic.observers import ChannelAmax, ChannelSquare, Observer, Summary

if TYPE_CHECKING:
    from quantcli.calibration.methods.base import Method


class OtherProcesses(Protocol):
    """Processes that share the passes over all samples.

    edits: those of the weights that are loaded here.
    """

    edits: Mapping[str, EditFactors]

    def watch(self, layer: LoadedLayer, watch: Watch, *, onward: bool) -> bool:
        """Let them make a pass; false if they cannot see what `watch` sees. onward: whether they write
        the layer's outputs."""

    def run_quantized(
        self, layer: LoadedLayer, stats: Mapping[str, Stats], edits: Mapping[str, EditFactors]
    ) -> None:
        """Let them write the layer's outputs, with the engine's arithmetic."""


@dataclass(frozen=True)
class CalibrationRun:
    """A calibration of a model.

    replay:  of all samples, and of the probe at last.
    methods: in the order in which they work on a layer.
    workers: threads for work outside of the replay.
    budget:  bytes to hold in memory of a layer's inputs, of its outputs, and of each further copy that
             a method holds (`Method.hidden_states`); the rest is read from disk, or computed again.
    edits:   calibrations with the same text here make the same edits in every layer.
    others:  processes that share the passes; None: all passes are made here.
    """

    replay: Replay
    policy: Policy
    methods: Sequence[Method]
    workers: int = 1
    budget: int = 0
    edits: str = ""
    others: OtherProcesses | None = None

    @property
    def skeleton(self) -> Skeleton:
        """The model."""
        return self.replay.skeleton

    @property
    def progress(self) -> Progress:
        """Receives phases and steps."""
        return self.replay.progress

    @property
    def device(self) -> torch.device:
        """Where layers are computed."""
        return self.replay.device

    @property
    def batches(self) -> Sequence[Batch]:
        """All samples."""
        return self.replay.batches[:-1]

    @property
    def probe(self) -> Batch:
        """The first tokens of the first sample."""
        return self.replay.batches[-1]


Question = tuple[Matrix, type[Summary]]  # a summary of the channels of a matrix


@dataclass(frozen=True)
class LoadedLayer:
    """A layer; its module has its weights within `loaded`.

    states: its inputs.
    seen:   observers that all samples have passed, with the weights as they are loaded now.
    """

    run: CalibrationRun
    index: int
    states: States
    seen: dict[Question, Observer] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the module, in the model."""
        return self.run.skeleton.layers[self.index][0]

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.run.skeleton.layers[self.index][1]

    @property
    def modules(self) -> list[str]:
        """The names of all stored weights in it."""
        return [s.module for experts in self.segments.values() for part in experts for s in part]

    @property
    def segments(self) -> Segments:
        """The stored weights in each matrix."""
        return self.run.skeleton.segments(self.index)

    @cached_property
    def experts_everywhere(self) -> list[Experts]:
        """The experts that are shown all tokens, if the recipe wants that."""
        if not self.run.policy.all_tokens:
            return []
        return experts_of(self.name, self.module, self.segments)

    def loaded(self, edits: Mapping[str, EditFactors]) -> AbstractContextManager[nn.Module]:
        """Within it the module has its weights, edited; edits: by stored tensor."""
        if self.run.others is not None:
            self.run.others.edits = dict(edits)

        def read(stored: StoredTensor) -> Tensor:
            tensor = read_tensor(stored)
            factors = edits.get(stored.spec.name)
            return tensor if factors is None else factors.apply(tensor).to(tensor.dtype)

        return self.run.skeleton.loaded(self.index, read, self.run.device)

    def matrices(self) -> Matrices:
        """The loaded module's."""
        return Matrices(self.name, self.module, self.run.skeleton.transposed(self.index))

    def engine(self, quantizer: Quantizer) -> EngineLinears:
        """The engine's arithmetic for the loaded module."""
        return EngineLinears(self.matrices(), self.segments, quantizer)

    def forward(self, sink: Sink | None, tap: Tap, only: Sequence[int] | None = None) -> None:
        """Run the loaded module over all samples and the probe, or some of these batches; `sink` takes
        outputs. The probe runs for its outputs alone, and is shown to nobody."""
        run = self.run.replay.run
        probe = len(self.run.batches)
        numbers = range(probe + 1) if only is None else only
        samples = [number for number in numbers if number != probe]
        run(self.index, self.module, self.states, sink, tap, samples)
        if sink is not None and probe in numbers:
            run(self.index, self.module, self.states, sink, only=[probe], check=False)

    def whole(self, edits: Mapping[str, EditFactors]) -> Callable[[str], Stats]:
        """The function that gives, for a quantized module, the constants that its scheme needs of whole
        weights: of its own, edited, and of those that share its scale. Reads each of them once.

        edits: by stored tensor, of this layer; not changed later.
        """
        policy, tensors = self.run.policy, self.run.skeleton.checkpoint.tensors
        found: dict[str, Stats] = {}

        def of(module: str) -> Stats:
            scheme = policy.quantized[module].scheme
            if not (scheme.needs_weight_amax or scheme.needs_column_amax):
                return NO_STATS
            modules = policy.sharing.get(module, [module])
            if modules[0] not in found:
                names = [f"{name}.weight" for name in modules]
                weights = [(tensors[name], edits.get(name)) for name in names]
                found[modules[0]] = survey(scheme, weights)
            return found[modules[0]]

        return of

    def watch(self, watch: Watch, sink: Sink | None, only: Sequence[int] | None = None) -> None:
        """The same, and show inputs to observers."""
        others = self.run.others
        if only is None and others is not None and others.watch(self, watch, onward=sink is not None):
            return
        batches, matrices, experts = self.run.batches, self.matrices(), self.experts_everywhere
        names = frozenset(name for block in experts for name in block.parameters)

        def tap(number: int) -> AbstractContextManager[None]:
            return watched(watch, matrices, number, batches[number], names)

        with ExitStack() as stack:
            for hook in watch.hooks:
                stack.enter_context(hook.entered(self.name, self.module, self.segments))
            stack.enter_context(layer_watched(self.name, self.module, batches, experts))
            self.forward(sink, tap, only)

    def run_quantized(
        self,
        stats: Mapping[str, Stats],
        edits: Mapping[str, EditFactors],
        sink: Sink,
        only: Sequence[int] | None = None,
    ) -> None:
        """`forward` with the engine's arithmetic. stats: by module. edits: of the loaded weights."""
        if only is None and self.run.others is not None:
            self.run.others.run_quantized(self, stats, edits)
            return
        engine = self.engine(quantized(self.run.policy, stats, self.whole(edits)))
        matrices = self.matrices()
        self.forward(sink, lambda _: MatrixTap(matrices, engine), only)

    def weight(self, matrix: Matrix) -> Tensor:
        """A matrix as it is loaded: [n, k]."""
        return self.matrices().weight(matrix)

    def channel_amax(self, widths: Mapping[Matrix, int]) -> dict[Matrix, Tensor]:
        """max |x| of each column of some matrices, by their number of columns; zeros without tokens."""
        return self._channels(widths, ChannelAmax)

    def channel_square(self, widths: Mapping[Matrix, int]) -> dict[Matrix, Tensor]:
        """The mean of x^2 of each column, likewise."""
        return self._channels(widths, ChannelSquare)

    def _channels(self, widths: Mapping[Matrix, int], summary: type[Summary]) -> dict[Matrix, Tensor]:
        """In one pass over the samples, unless all matrices were seen already."""
        observers = {matrix: self.seen.get((matrix, summary)) for matrix in widths}
        if None in observers.values():
            observers = {matrix: Observer(summary()) for matrix in widths}
            lookers = {matrix: [o] for matrix, o in observers.items() if o is not None}
            self.watch(Watch(lookers), None)
        found = {}
        for matrix, observer in observers.items():
            assert observer is not None
            (values,) = observer.stats().values()
            found[matrix] = values if observer.tokens else torch.zeros(widths[matrix])
        return found

    def divide(self, producer: Producer, scale: Tensor, edits: dict[str, EditFactors]) -> Tensor:
        """Divide a producer's channels by scales [channels], and multiply the columns that read them.
        Returns the actual scales: all 1 for a norm that cannot be scaled."""
        if producer.norm is not None:
            module = self.module.get_submodule(producer.norm.removeprefix(f"{self.name}."))
            parts, scale = self._divided_norm(producer.norm, module, scale)
            edits |= parts
        if bool((scale != 1).any()):
            fold(producer, self.segments, scale, edits)
        return scale

    def _divided_norm(
        self, path: str, module: nn.Module, scale: Tensor
    ) -> tuple[dict[str, EditFactors], Tensor]:
        offset = norm_offset(module)
        if offset is not None:
            parts, real = scale_norm(module, offset, scale)
            stored = {suffix: self.run.skeleton.source(f"{path}.{suffix}") for suffix in parts}
            if None not in stored.values():
                new = {  # float32: the model may be stored in another dtype than it is computed in
                    str(stored[suffix]): EditFactors(value=tensor.float())
                    for suffix, tensor in parts.items()
                }
                return new, real
        return {}, torch.ones_like(scale)


def ask(
    questions: Iterable[tuple[LoadedLayer, Iterable[Question]]], leaders: Mapping[Matrix, Matrix]
) -> dict[Matrix, list[Observer]]:
    """Observers for all questions, which one pass answers; each is `seen` by the layers that ask.

    leaders: the first matrix with the same input, by matrix.
    """
    observers: dict[Question, Observer] = {}
    lookers: dict[Matrix, list[Observer]] = {}
    for layer, asked in questions:
        for matrix, summary in asked:
            place = leaders.get(matrix, matrix), summary
            if place not in observers:
                observers[place] = Observer(summary())
                lookers.setdefault(place[0], []).append(observers[place])
            layer.seen[matrix, summary] = observers[place]
    return lookers
