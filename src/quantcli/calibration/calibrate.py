"""Calibrate: replay the model over the samples, one layer at a time, and keep what each layer shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantcli.calibration.layer import LayerRun, empty_report
from quantcli.calibration.loaded import CalibrationRun
from quantcli.calibration.policy import Policy
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.replay.states import States, StatesWriter, load_states
from quantcli.calibration.store import Store
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype
from quantcli.core.errors import MachineError
from quantcli.core.events import Progress

PROBE_TOKENS = 32  # of one sample: enough to see which tensor goes where


class Calibrator:
    """One run over all layers."""

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Batch],
        policy: Policy,
        store: Store,
        *,
        device: torch.device,
        workers: int,
        states_budget: int,
        progress: Progress,
    ) -> None:
        """states_budget: bytes of hidden states to hold in memory; the rest is read from disk."""
        self._skeleton = skeleton
        self._batches = list(batches)
        self._policy = policy
        self._store = store
        # of a layer's inputs, of its outputs, and of what they should be while it learns
        learns = any(found.scheme.schedule for found in policy.quantized.values())
        self._budget = states_budget // (3 if learns else 2)
        self._progress = progress
        first = batches[0]
        length = PROBE_TOKENS if first.mask is None else min(PROBE_TOKENS, int(first.mask[0].sum()))
        probe = Batch(first.input_ids[:1, :length], None)
        self._replay = Replay(skeleton, [*self._batches, probe], device=device, workers=workers)
        self._run = CalibrationRun(
            skeleton, self._replay, self._batches, probe, policy, device, workers, self._budget
        )
        self._specs: list[TensorSpec] = []

    def run(self) -> None:
        """All layers that are not done yet. The same files whatever was done before."""
        total = len(self._skeleton.layers)
        done = self._store.done
        self._progress.begin_layers(total, done, sum(b.input_ids.numel() for b in self._batches))
        last = max((index for index in range(total) if self._has_work(index)), default=-1)
        if done <= last:
            start, states = self._begin(done)
            for index in range(start, last + 1):
                states = self._layer(index, states, onward=index < last)
        for index in range(max(done, last + 1), total):
            self._store.save(index, {}, empty_report(self._skeleton.layers[index][0]))
        self._store.drop_states()

    def _has_work(self, index: int) -> bool:
        modules = [s.module for e in self._skeleton.segments(index).values() for p in e for s in p]
        if any(map(self._policy.needs_data, modules)):
            return True
        quantized = [module for module in modules if module in self._policy.quantized]
        return bool(quantized) and self._policy.alpha(quantized) is not None

    def _begin(self, done: int) -> tuple[int, States]:
        """Note the layers' calls; the layer to continue with, and its inputs."""
        specs: list[TensorSpec] = []
        writers: list[StatesWriter] = []

        def note(number: int, hidden: Tensor) -> None:
            if not specs:
                dtype, rest = safetensors_dtype(hidden.dtype), tuple(hidden.shape[2:])
                specs.extend(TensorSpec("", dtype, (*b.input_ids.shape, *rest)) for b in self._batches)
                if self._left(done, specs) is None:
                    self._check_space(2 * sum(spec.nbytes for spec in specs))
                    writers.append(StatesWriter(self._store.folder, 0, specs, self._budget))
            if writers and number < len(self._batches):
                writers[0].put(number, hidden)

        self._specs = specs
        try:
            self._replay.begin(note)
            if writers:
                return 0, writers[0].finish()
        except BaseException:
            for writer in writers:
                writer.abandon()
            raise
        left = self._left(done, specs)
        assert left is not None
        return done, left

    def _check_space(self, nbytes: int) -> None:
        """Two layers' hidden states are on disk at a time."""
        free = shutil.disk_usage(self._store.folder).free
        if free < nbytes:
            raise MachineError(
                f"disk is too full for hidden states: needs {nbytes:,} bytes, {free:,} are free",
                where=str(self._store.folder),
                fix="free some space, or take fewer or shorter samples",
            )

    def _left(self, done: int, specs: Sequence[TensorSpec]) -> States | None:
        """What an interrupted run has left for layer `done`."""
        return load_states(self._store.folder, done, specs, self._budget) if done else None

    def _layer(self, index: int, states: States, *, onward: bool) -> States:
        """Measure a layer and save its statistics; returns the inputs of the next layer."""
        layer = LayerRun(self._run, index, states)
        following = states
        if onward:
            writer = StatesWriter(self._store.folder, index + 1, self._specs, self._budget)
            try:
                found = layer.measure(writer.put)
                following = writer.finish()
            except BaseException:
                writer.abandon()
                raise
        else:
            found = layer.measure(None)
        self._store.save(index, found, layer.report)
        for line in _not_rounded(layer.report):
            self._progress.say(line)
        self._progress.layer(self._skeleton.layers[index][0], index, layer.note)
        self._store.drop_states(keep=index + 1)
        return following


def _not_rounded(report: Mapping[str, Any]) -> Iterator[str]:
    """A line for each reason for which weights are rounded to nearest, though data was to choose."""
    reasons: dict[str, list[str]] = {}
    for module, found in sorted(report["modules"].items()):
        if why := found.get("rounded_to_nearest"):
            reasons.setdefault(why, []).append(module)
    for why, modules in sorted(reasons.items()):
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        names = ", ".join(f"`{module}`" for module in modules[:3])
        yield f"rounded to nearest, as {why}: {names}{more}"
