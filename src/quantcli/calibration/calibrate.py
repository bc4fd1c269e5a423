"""Calibrate: replay the model over the samples, layer by layer, and save statistics."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from quantcli.calibration.layer import LayerRun
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.replay.states import States, StatesWriter, load_states
from quantcli.calibration.report import LayerReport
from quantcli.calibration.store import Store
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype
from quantcli.core.errors import MachineError
from quantcli.core.events import Progress


@dataclass
class Calibrator:
    """A calibration of all layers."""

    calibration: CalibrationRun
    store: Store
    progress: Progress

    def __post_init__(self) -> None:
        self._skeleton = self.calibration.skeleton
        self._specs: list[TensorSpec] = []

    def run(self) -> None:
        """Measure all layers that are not done yet. The files are the same after any interruption."""
        total = len(self._skeleton.layers)
        done = self.store.done
        self.progress.begin_layers(
            total, done, sum(b.input_ids.numel() for b in self.calibration.batches)
        )
        last = max((index for index in range(total) if self._has_work(index)), default=-1)
        if done <= last:
            start, states = self._begin(done)
            for index in range(start, last + 1):
                states = self._layer(index, states, onward=index < last)
        for index in range(max(done, last + 1), total):
            self.store.save(index, {}, LayerReport(self._skeleton.layers[index][0]))
        self.store.drop_states()

    def _has_work(self, index: int) -> bool:
        modules = [s.module for e in self._skeleton.segments(index).values() for p in e for s in p]
        methods = self.calibration.methods
        return any(method.has_work(modules, self.calibration.policy) for method in methods)

    def _begin(self, done: int) -> tuple[int, States]:
        """Note the layers' calls; the layer to continue with, and its inputs."""
        batches, specs = self.calibration.batches, self._specs
        writers: list[StatesWriter] = []
        with ExitStack() as stack:

            def note(number: int, hidden: Tensor) -> None:
                if not specs:
                    dtype, rest = safetensors_dtype(hidden.dtype), tuple(hidden.shape[2:])
                    specs.extend(TensorSpec("", dtype, (*b.input_ids.shape, *rest)) for b in batches)
                    if self._left(done) is None:
                        self._check_space(2 * sum(spec.nbytes for spec in specs))
                        writers.append(stack.enter_context(self._writer(0)))
                if writers and number < len(batches):
                    writers[0].put(number, hidden)

            self.calibration.replay.begin(note)
            if writers:
                return 0, writers[0].finish()
        left = self._left(done)
        assert left is not None
        return done, left

    def _check_space(self, nbytes: int) -> None:
        """Two layers' hidden states are on disk at a time."""
        free = shutil.disk_usage(self.store.folder).free
        if free < nbytes:
            raise MachineError(
                f"disk is too full for hidden states: needs {nbytes:,} bytes, {free:,} are free",
                where=str(self.store.folder),
                fix="free some space, or take fewer or shorter samples",
            )

    def _left(self, done: int) -> States | None:
        """The inputs of layer `done`, if an interrupted run has left them."""
        budget = self.calibration.budget
        return load_states(self.store.folder, done, self._specs, budget) if done else None

    def _writer(self, index: int) -> StatesWriter:
        return StatesWriter(self.store.folder, index, self._specs, self.calibration.budget)

    def _layer(self, index: int, states: States, *, onward: bool) -> States:
        """Measure a layer and save its statistics; returns the inputs of the next layer."""
        layer = LayerRun(LoadedLayer(self.calibration, index, states))
        following = states
        if onward:
            with self._writer(index + 1) as writer:
                tensors = layer.measure(writer.put)
                following = writer.finish()
        else:
            tensors = layer.measure(None)
        self.store.save(index, tensors, layer.report)
        for line in layer.report.messages:
            self.progress.say(line)
        self.progress.layer(self._skeleton.layers[index][0], index, layer.report.note)
        self.store.drop_states(keep=index + 1)
        return following
