"""Calibrate: replay the model over the samples, layer by layer, and save statistics."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from quantcli.calibration.layer import LayerRun, measure_layer
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.replay.states import (
    States,
    StatesWriter,
    final_file,
    load_states,
    note_stack,
    outputs_file,
    states_file,
)
from quantcli.calibration.report import LayerReport
from quantcli.calibration.store import Store
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import MachineError
from quantcli.core.events import Progress
from quantcli.core.text import count


@dataclass
class Share:
    """One recipe's share of a calibration.

    name: of the recipe, for messages.
    last: index of the last layer in which a method has work; -1 without any.
    """

    calibration: CalibrationRun
    store: Store
    name: str = ""

    def __post_init__(self) -> None:
        self._skeleton = self.calibration.skeleton
        layers = range(len(self._skeleton.layers))
        self.last = max((index for index in layers if self._has_work(index)), default=-1)

    def _has_work(self, index: int) -> bool:
        modules, methods = self._modules(index), self.calibration.methods
        return any(method.has_work(modules, self.calibration.policy) for method in methods)

    def _modules(self, index: int) -> list[str]:
        return [s.module for e in self._skeleton.segments(index).values() for p in e for s in p]

    def has(self, index: int) -> bool:
        """Whether a layer need not be measured: it is done, or comes after `last`."""
        # if inputs are not float, the outputs of a layer are known only once it is measured
        return index > self.last or (self.store.has(index) and self._inputs == "float")

    def finish(self, layers: Iterable[int]) -> None:
        """Save an empty report for each of these layers that comes after `last`."""
        for index in layers:
            if index > self.last and not self.store.has(index):
                self.store.save(index, {}, LayerReport(self._skeleton.layers[index][0]))

    @property
    def _inputs(self) -> str:
        return self.calibration.policy.inputs

    def passes(self, index: int, *, onward: bool) -> float:
        """How often its methods run all samples through a layer, next to the pass of all recipes."""
        policy, methods, modules = (
            self.calibration.policy,
            self.calibration.methods,
            self._modules(index),
        )
        passes = sum(method.passes(modules, policy) for method in methods)
        passes += any(method.edits and method.has_work(modules, policy) for method in methods)
        return passes + (policy.inputs == "quantized" and onward)


@dataclass
class Calibrator:
    """A calibration of all layers, for one recipe or for several that see the same inputs.

    shares: all of one replay. Hidden states are kept in the folder of the first one's store.
    """

    shares: Sequence[Share]
    progress: Progress

    def __post_init__(self) -> None:
        self.calibration, self.store = self.shares[0].calibration, self.shares[0].store
        self._skeleton = self.calibration.skeleton
        self._specs: Sequence[TensorSpec] = ()  # of the hidden states in the present stack
        self._stack = 0
        self._starts = {stack.start: number for number, stack in enumerate(self._skeleton.stacks)}
        self._finals: list[States] = []  # outputs of the stacks before the present one

    def run(self) -> None:
        """Measure all layers that are not done yet. The files are the same after any interruption."""
        total = len(self._skeleton.layers)
        done = self._done
        self.progress.begin_layers(
            total, done, sum(b.input_ids.numel() for b in self.calibration.batches)
        )
        self._keeps()
        last = max(share.last for share in self.shares)
        if done <= last:
            start, states = self._begin(done)
            for index in range(start, last + 1):
                if index in self._starts and self._starts[index] > self._stack:
                    states = self._enter(self._starts[index], states)
                states = self._layer(index, states, onward=index < last)
        for share in self.shares:
            share.finish(range(total))
            share.store.tidy()

    @property
    def _done(self) -> int:
        """How many layers are done for all recipes, from the first on."""
        return min(share.store.done for share in self.shares)

    def _keeps(self) -> None:
        """What is there if the run ends now."""
        layers = f"{self._done} of {count(self._skeleton.layers, 'layer')}"
        self.progress.keeps(f"{layers} in {self.store.folder}; the unfinished layer is computed again")

    def _begin(self, done: int) -> tuple[int, States]:
        """Note the calls of the first stack; the layer to continue with, and its inputs. What an
        interrupted run has left is used if all of it is there."""
        left = self._continue(done) if done else None
        if left is not None:
            return done, left
        self._finals = []
        return 0, self._enter(0, None)

    def _continue(self, done: int) -> States | None:
        """The inputs of layer `done`, if an interrupted run has left them and all finals before."""
        self._enter(0, None, write=False)
        for stack in range(1, len(self._skeleton.stacks)):
            if self._skeleton.stacks[stack].start > done:
                break
            final = self._load(final_file(stack - 1))
            if final is None:
                return None
            if self._skeleton.stacks[stack].start == done:
                return final  # the stack is entered when its first layer is measured
            self._enter(stack, final, write=False)
        return self._load(states_file(done))

    def _enter(self, stack: int, final: States | None, *, write: bool = True) -> States:
        """Note the calls of a stack. Returns the inputs of its first layer; `write`: also to a file."""
        self.progress.phase("embedding", passes=0)
        self._stack = stack
        if final is not None:
            self._finals.append(final)

        def writer(specs: Sequence[TensorSpec]) -> StatesWriter | None:
            self._specs = specs
            if not write:
                return None
            self._check_space(2 * sum(spec.nbytes for spec in specs))
            return self._writer(states_file(self._skeleton.stacks[stack].start))

        return note_stack(self.calibration.replay, final, writer)

    def _check_space(self, nbytes: int) -> None:
        """Two layers' hidden states are on disk at a time."""
        free = shutil.disk_usage(self.store.folder).free
        if free < nbytes:
            raise MachineError(
                f"disk is too full for hidden states: needs {nbytes:,} bytes, {free:,} are free",
                where=str(self.store.folder),
                fix="free some space, or take fewer or shorter samples",
            )

    def _load(self, file: str) -> States | None:
        """States that an interrupted run has left."""
        return load_states(self.store.folder, file, self._specs, self.calibration.budget)

    def _writer(self, file: str) -> StatesWriter:
        return StatesWriter(self.store.folder, file, self._specs, self.calibration.budget)

    def _layer(self, index: int, states: States, *, onward: bool) -> States:
        """Measure a layer and save its statistics; returns the inputs of the next layer."""
        name = self._skeleton.layers[index][0]
        shares = [share for share in self.shares if not share.has(index)]
        passes = 1 + sum(share.passes(index, onward=onward) for share in shares)
        self.progress.begin_layer(name, index, passes)
        layers = [LayerRun(LoadedLayer(share.calibration, index, states)) for share in shares]
        layer = layers[0].layer if layers else LoadedLayer(self.calibration, index, states)
        following = states
        with ExitStack() as stack:
            writer = stack.enter_context(self._outputs(index)) if onward else None
            complete: list[States] = []

            def finish() -> None:
                if writer is not None and not complete:
                    complete.append(writer.finish())

            def save(run: LayerRun, tensors: dict[str, Tensor]) -> None:
                finish()  # outputs are renamed into place before any report
                share = shares[layers.index(run)]
                share.store.save(index, tensors, run.report)

            measure_layer(layer, layers, writer.put if writer is not None else None, save)
            finish()
            for share in self.shares:
                share.finish([index])
            following = complete[0] if complete else states
        self._keeps()
        self._tell(index, [(share.name, run.report) for share, run in zip(shares, layers, strict=True)])
        self.store.drop_states({file for kept in (following, *self._finals) for file in kept.files})
        return following

    def _outputs(self, index: int) -> StatesWriter:
        """The writer of a layer's outputs."""
        return self._writer(outputs_file(self._skeleton.stacks, index))

    def _tell(self, index: int, reports: Sequence[tuple[str, LayerReport]]) -> None:
        """Messages of a layer's recipes, each once, and remarks on their results."""
        words = [(name, report.messages, report.note) for name, report in reports]
        note = tell(self.progress, words, several=len(self.shares) > 1)
        self.progress.layer(self._skeleton.layers[index][0], index, note)


def tell(
    progress: Progress, reports: Sequence[tuple[str, Sequence[str], str]], *, several: bool
) -> str:
    """Say the messages of a layer's recipes, each once. Returns the remark on their results.

    reports: name, messages and remark of each recipe. several: whether there are other recipes.
    """
    lines = [
        f"{name}: {line}" if several else line for name, messages, _ in reports for line in messages
    ]
    for line in dict.fromkeys(lines):
        progress.say(line)
    return "; ".join(f"{name}: {note}" if several else note for name, _, note in reports if note)
