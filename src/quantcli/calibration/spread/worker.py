"""What one process does of a calibration that many share. Nothing here knows of a cluster.

Each function does a request from beginning to end, and may be called again with it: files get their
names when they are complete, and have the same bytes. The model without weights, and how its layers
are called, stay in the process from one request to the next.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantcli.calibration.building import runs_of, skeleton_of
from quantcli.calibration.layer import LayerRun, measure_layer
from quantcli.calibration.loaded import LoadedLayer
from quantcli.calibration.replay.states import (
    States,
    StatesWriter,
    final_file,
    load_states,
    note_stack,
    outputs_file,
    states_file,
)
from quantcli.calibration.resources import Resources
from quantcli.calibration.store import save_layer
from quantcli.calibration.text.dataset import Batch
from quantcli.calibration.watch import Watch
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import MachineError
from quantcli.core.events import SILENT, Inner, Progress
from quantcli.core.numerics import Stats
from quantcli.planning.measured import EditFactors
from quantcli.planning.plan import Plan

_WAITS = (0.0, 0.2, 1.0, 5.0, 30.0)  # seconds: network file systems show new files late

_EVERY = 1.0  # second: nobody reads faster


@dataclass(frozen=True)
class Work:
    """A calibration, as each process is given it.

    key:     tells it from others.
    plans:   of the recipes.
    batches: the samples, and the probe at last.
    stores:  folder of each recipe's statistics; the first one has the hidden states, too.
    """

    key: str
    plans: Sequence[Plan]
    batches: Sequence[Batch]
    resources: Resources
    stores: Sequence[Path]

    @property
    def folder(self) -> Path:
        """Of hidden states."""
        return self.stores[0]


@dataclass(frozen=True)
class Forward:
    """Run some batches through the float layers, for the inputs of other layers. layers: these."""

    batches: Sequence[int]
    layers: Sequence[int]


@dataclass(frozen=True)
class Pass:
    """Run some batches through a layer.

    recipe:  its number.
    edits:   by stored tensor.
    watch:   what is to see them; None: they are run with the engine's arithmetic.
    stats:   for that, by module.
    onward:  whether outputs are written.
    """

    layer: int
    recipe: int
    batches: Sequence[int]
    edits: Mapping[str, EditFactors]
    watch: Watch | None
    stats: Mapping[str, Stats]
    onward: bool


@dataclass(frozen=True)
class Measure:
    """Measure a layer, for some recipes by their numbers."""

    layer: int
    recipes: Sequence[int]


@dataclass(frozen=True)
class Measured:
    """A layer was measured. words: messages and a remark of each recipe. seconds: that it took."""

    words: Sequence[tuple[Sequence[str], str]]
    seconds: float


def forward(work: Work, request: Forward, progress: Progress) -> None:
    """Write the inputs of layers, as far as they are not there."""
    _process(work).forward(request, progress)


def make_pass(work: Work, request: Pass, progress: Progress) -> Watch | None:
    """What has seen the batches."""
    return _process(work).make_pass(request, progress)


def measure(work: Work, request: Measure, progress: Progress) -> Measured:
    """Measure a layer whose inputs are there, and save it."""
    return _process(work).measure(request, progress)


class _Process:
    """The model of a calibration."""

    def __init__(self, work: Work) -> None:
        self._work = work
        skeleton = skeleton_of(work.plans[0], trust_remote_code=work.resources.trust_remote_code)
        self._runs = runs_of(work.plans, skeleton, work.batches, work.resources, SILENT)
        self._replay, self._skeleton = self._runs[0].replay, skeleton
        self._all = tuple(range(len(work.batches)))
        self._entered: tuple[int, Sequence[int]] | None = None  # the stack, and its noted batches
        self._specs: Sequence[TensorSpec] = ()  # of the hidden states in that stack

    def _report_to(self, progress: Progress) -> None:
        """Report batches that run through layers as steps; not those whose calls are noted."""
        self._replay.report_to(progress, len(self._work.batches) - 1)

    # -- hidden states ---------------------------------------------------------------------------

    def _load(self, file: str, batches: Collection[int]) -> States | None:
        return load_states(self._work.folder, file, self._specs, self._runs[0].budget, batches)

    def _must_load(self, file: str, batches: Collection[int]) -> States:
        """States that another process has written."""
        for wait in _WAITS:
            time.sleep(wait)
            states = self._load(file, batches)
            if states is not None:
                return states
        raise MachineError(
            f"hidden states are not there: {file}",
            where=str(self._work.folder),
            fix="start the same command again: it makes them anew",
        )

    def _writer(self, file: str, batches: Sequence[int]) -> StatesWriter:
        budget = self._runs[0].budget
        return StatesWriter(self._work.folder, file, self._specs, budget, part=batches)

    def _enter(self, stack: int, batches: Sequence[int], *, write: bool = False) -> None:
        """Note how the layers of a stack are called for some batches. write: the inputs of its first
        layer, if they are not there."""
        if self._entered is None or self._entered[1] != batches or self._entered[0] > stack:
            self._note(0, batches, None, write)
        assert self._entered is not None
        for number in range(self._entered[0] + 1, stack + 1):
            self._note(number, batches, self._must_load(final_file(number - 1), batches), write)

    def _note(self, stack: int, batches: Sequence[int], final: States | None, write: bool) -> None:
        self._report_to(SILENT)
        self._entered = None
        first = states_file(self._skeleton.stacks[stack].start)

        def writer(specs: Sequence[TensorSpec]) -> StatesWriter | None:
            self._specs = specs
            missing = write and self._load(first, batches) is None
            return self._writer(first, batches) if missing else None

        note_stack(self._replay, final, writer, batches)
        self._entered = stack, batches

    # -- requests --------------------------------------------------------------------------------

    def forward(self, request: Forward, progress: Progress) -> None:
        batches, last = request.batches, max(request.layers)
        for stack, layers in enumerate(self._skeleton.stacks):
            if layers.start > last:
                break
            self._enter(stack, batches, write=True)
            self._report_to(progress)
            files = {index: states_file(index) for index in layers if index in request.layers}
            if layers.stop <= last:
                files[layers.stop] = final_file(stack)
            missing = [i for i, file in files.items() if self._load(file, batches) is None]
            if not missing:
                continue
            start, states = self._nearest(layers, min(missing), batches)
            for index in range(start, max(missing)):
                states = self._run(index, states, batches)

    def _nearest(self, layers: range, index: int, batches: Sequence[int]) -> tuple[int, States]:
        """The last layer before `index` whose inputs are there, and these."""
        for start in range(min(index, layers.stop - 1), layers.start, -1):
            states = self._load(states_file(start), batches)
            if states is not None:
                return start, states
        return layers.start, self._must_load(states_file(layers.start), batches)

    def _run(self, index: int, states: States, batches: Sequence[int]) -> States:
        layer = LoadedLayer(self._runs[0], index, states)
        with (
            layer.loaded({}),
            self._writer(outputs_file(self._skeleton.stacks, index), batches) as writer,
        ):
            layer.watch(Watch({}), writer.put, batches)
            return writer.finish()

    def _stack_of(self, index: int) -> int:
        return next(n for n, layers in enumerate(self._skeleton.stacks) if index in layers)

    def make_pass(self, request: Pass, progress: Progress) -> Watch | None:
        self._enter(self._stack_of(request.layer), self._all)
        self._report_to(progress)
        states = self._must_load(states_file(request.layer), request.batches)
        layer = LoadedLayer(self._runs[request.recipe], request.layer, states)
        file = outputs_file(self._skeleton.stacks, request.layer)
        with (
            layer.loaded(request.edits),
            self._writer(file, request.batches) if request.onward else nullcontext() as writer,
        ):
            sink = None if writer is None else writer.put
            if request.watch is not None:
                layer.watch(request.watch, sink, request.batches)
            elif sink is not None:
                layer.run_quantized(request.stats, request.edits, sink, request.batches)
            if writer is not None:
                writer.finish()
        return request.watch

    def measure(self, request: Measure, progress: Progress) -> Measured:
        began = time.monotonic()
        self._enter(self._stack_of(request.layer), self._all)
        self._report_to(_OneOfSeveral(progress, self._skeleton.layers[request.layer][0]))
        states = self._must_load(states_file(request.layer), self._all)
        states.hold_all()
        runs = [LayerRun(LoadedLayer(self._runs[n], request.layer, states)) for n in request.recipes]

        def save(run: LayerRun, tensors: dict[str, Tensor]) -> None:
            folder = self._work.stores[request.recipes[runs.index(run)]]
            attempt = f".{secrets.token_hex(8)}"  # a process that is thought dead may write, too
            save_layer(folder, request.layer, tensors, run.report, attempt)

        measure_layer(runs[0].layer, runs, None, save)
        reports = [run.report for run in runs]
        words = [(report.messages, report.note) for report in reports]
        return Measured(words, time.monotonic() - began)


class _OneOfSeveral(Inner):
    """Progress of a layer while others are worked on: phases with its name, now and then."""

    def __init__(self, outer: Progress, layer: str) -> None:
        super().__init__(outer)
        self._layer = self._phase = layer
        self._due = 0.0

    def phase(self, name: str, passes: float = 1.0) -> None:
        self._phase = f"{self._layer}: {name}"

    def step(
        self, done: int, total: int, *, noun: str = "batch", tokens: int = 0, loss: float | None = None
    ) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _EVERY
            self._outer.phase(self._phase, passes=0)
            self._outer.step(done, total, noun=noun, tokens=tokens, loss=loss)


_present: dict[str, _Process] = {}  # at most one


def _process(work: Work) -> _Process:
    """The model of the calibration that is under way."""
    if work.key not in _present:
        _present.clear()
        _present[work.key] = _Process(work)
    return _present[work.key]
