"""A conversion in steps, for the Python API."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantcli.commands.keywords import takes
from quantcli.commands.results import Calibrated, Converted, Planned
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Event, Events, Progress

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.commands.job import Job as PlannedJob
    from quantcli.convert.execute import Written
    from quantcli.planning.plan import Plan

OnProgress = Callable[[Event], None] | None


def progress_of(receive: OnProgress) -> Progress:
    """The progress of a call, which hands its events on."""
    return SILENT if receive is None else Events(receive)


def planned_of(job: PlannedJob[Plan]) -> Planned:
    """The result that says what a job writes."""
    from quantcli.commands.job import to_json

    data = {**to_json(job), "out": job.out.value}
    if job.plan.checkpoint.in_memory:
        data["model"] = job.plan.checkpoint.path.name
    return Planned(**data)


def files_of(written: Written[Any]) -> dict[str, Any]:
    """What is known of every checkpoint that was written."""
    reused = written.shards_reused
    return {
        "out": written.out.value,
        "bytes": written.nbytes,
        "shards_reused": reused,
        "files": written.files,
    }


class Job:
    """A conversion that was planned. `prepare` makes it; its calls belong in this order:

    plan:        what will be written.
    calibrate(): only if the recipe needs data.
    convert():   writes the checkpoint.
    """

    def __init__(self, job: PlannedJob[Plan], resources: Resources) -> None:
        self._job = job
        self._resources = resources
        self._notes = job.plan.notes  # which the user could read before
        self._converted = False
        self._lock = threading.Lock()

    @property
    def plan(self) -> Planned:
        """What `convert` will write. After `calibrate` it is the plan with the statistics."""
        return planned_of(self._job)

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrate` must be called before `convert`."""
        return self._job.session is not None and not self._job.session.complete

    @takes()
    def calibrate(self, on_progress: OnProgress = None) -> Calibrated:
        """Run samples through the model and keep the statistics, in the folder that `plan.calibration`
        names. An interrupted call continues after its last layer; a second call reads the result.

        on_progress: is called with each `Event`. Raises InputError if the recipe needs no data, or for
        data that cannot be used, and MachineError for the memory or the device.
        """
        from quantcli.calibration.session import summary
        from quantcli.commands import quantize as commands

        with self._one_call():
            if self._job.session is None:
                raise InputError(
                    "nothing in this recipe needs a calibration", fix="call job.convert() right away"
                )
            if self.needs_calibration:
                self._job = commands.calibrated(self._job, self._resources, progress_of(on_progress))
            assert self._job.session is not None
            return Calibrated.of(summary(self._job.session))

    @takes()
    def convert(self, on_progress: OnProgress = None) -> Converted:
        """Write the checkpoint. An interrupted call continues where it stopped.

        on_progress: is called with each `Event`. Raises AnswerNo if the plan misses a limit of the
        recipe's `expect` block, InputError before `calibrate` if the recipe needs data and for a second
        call, and MachineError for the disk.
        """
        if self.needs_calibration:
            raise InputError(
                "the calibration has not run",
                where=str(self._job.out),
                fix="call job.calibrate() first",
            )
        return self.run(on_progress)

    def run(self, on_progress: OnProgress) -> Converted:
        """Calibrate, if that is still to do, and convert."""
        from quantcli.commands import quantize as commands

        with self._one_call():
            if self._converted:
                raise InputError(
                    "this job was converted already",
                    where=str(self._job.out),
                    fix="call quantcli.prepare() again for another output",
                )
            progress = progress_of(on_progress)
            written = commands.quantize(self._job, progress, self._resources)
            self._job = replace(self._job, plan=written.plan)
            self._converted = True
        notes = dict.fromkeys((*written.plan.notes, *written.notes))
        return Converted(
            **files_of(written),
            notes=[note for note in notes if note not in self._notes],
            plan=self.plan,
        )

    @contextmanager
    def _one_call(self) -> Iterator[None]:
        """InputError if another call of this job is running."""
        if not self._lock.acquire(blocking=False):
            raise InputError("another call of this job is running", fix="wait until it returns")
        try:
            yield
        finally:
            self._lock.release()
