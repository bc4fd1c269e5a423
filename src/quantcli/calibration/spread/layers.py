"""Layers as tasks, for `inputs: float`: one pass through the float model writes the inputs of all
layers, then each of them is measured on its own, in any order.

A layer counts when its report is there, and its inputs are deleted then.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from quantcli.calibration.calibrate import Share, tell
from quantcli.calibration.replay.states import states_file
from quantcli.calibration.spread.crew import Crew, Steps, shares_of
from quantcli.calibration.spread.worker import Forward, Measure, Measured, forward, measure
from quantcli.core.disk import disk_errors
from quantcli.core.errors import MachineError
from quantcli.core.events import Progress
from quantcli.core.text import count, size


class LayerTasks:
    """A calibration of all layers, by a crew."""

    def __init__(
        self, shares: Sequence[Share], crew: Crew, progress: Progress, states_nbytes: int
    ) -> None:
        """shares: of all recipes. states_nbytes: of the hidden states at one place of the model."""
        self._shares = shares
        self._crew = crew
        self._progress = progress
        self._states_nbytes = states_nbytes
        self._run, self._store = shares[0].calibration, shares[0].store
        self._names = [name for name, _ in self._run.skeleton.layers]

    def run(self) -> None:
        """Measure all layers that are not done yet. The files are the same after any interruption."""
        last = max(share.last for share in self._shares)
        recipes = {
            index: [n for n, share in enumerate(self._shares) if not share.has(index)]
            for index in range(last + 1)
        }
        missing = [index for index, numbers in recipes.items() if numbers]
        tokens = sum(batch.input_ids.numel() for batch in self._run.batches)
        self._left = len(missing)
        self._progress.begin_layers(len(self._names), self._done, tokens)
        self._keeps()
        if missing:
            self._forward(missing)
            requests = [Measure(index, recipes[index]) for index in missing]
            self._progress.phase("measuring layers", passes=0)
            self._crew.run(
                measure,
                requests,
                noun="layer",
                progress=self._progress,
                done=lambda place, measured: self._tell(requests[place], measured),
            )
        for share in self._shares:
            share.finish(range(len(self._names)))
            share.store.tidy()

    def _forward(self, missing: Sequence[int]) -> None:
        """Write the inputs of layers, as far as an earlier run has not."""
        self._check_space(len(missing))
        passes = shares_of(len(self._run.batches) + 1, self._crew)
        steps = Steps(self._progress, max(missing) * len(self._run.batches))
        self._progress.phase(f"float inputs of {count(missing, 'layer')}", passes=0)
        requests = [Forward(batches, missing) for batches in passes]
        self._crew.run(forward, requests, noun="share of the samples", progress=steps)

    def _check_space(self, layers: int) -> None:
        """The inputs of all layers are on disk at a time."""
        folder, needed = self._store.folder, self._states_nbytes * (layers + 1)
        with disk_errors(folder):
            there = sum(path.stat().st_size for path in folder.glob("*states-*"))
            free = shutil.disk_usage(folder).free
        self._progress.say(f"float inputs of {count(layers, 'layer')}: {size(needed)} in {folder}")
        if free + there < needed:
            raise MachineError(
                f"disk is too full for hidden states: needs {needed:,} bytes, {free + there:,} are "
                "free",
                where=str(folder),
                fix="free some space, or take fewer or shorter samples",
            )

    @property
    def _done(self) -> int:
        return len(self._names) - self._left

    def _keeps(self) -> None:
        layers = f"{self._done} of {count(self._names, 'layer')}"
        self._progress.keeps(
            f"{layers} in {self._store.folder}, and inputs of others; unfinished layers are computed "
            "again"
        )

    def _tell(self, request: Measure, measured: Measured) -> None:
        """A layer is done."""
        self._store.drop(f"{states_file(request.layer).removesuffix('safetensors')}*")  # and all parts
        self._left -= 1
        self._keeps()
        reports = [
            (self._shares[n].name, *words)
            for n, words in zip(request.recipes, measured.words, strict=True)
        ]
        note = tell(self._progress, reports, several=len(self._shares) > 1)
        name = self._names[request.layer]
        self._progress.layer(name, request.layer, note, seconds=measured.seconds)
