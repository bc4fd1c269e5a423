"""`quantcli.release`: the command as a function of the Python API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from quantcli.commands.api import resources_of
from quantcli.commands.keywords import DEFAULTS, PathLike, path_of, takes
from quantcli.commands.release import outcome, planning, running
from quantcli.commands.steps import OnProgress, progress_of


class Releasing(TypedDict, total=False):
    """Options of a release."""

    only: Sequence[str]
    workers: int | None
    fresh: bool
    force: bool
    calibration: PathLike | None
    device: str
    max_memory: int | str | None
    executor: str
    trust_remote_code: bool
    report: PathLike | None


@takes(Releasing, {**DEFAULTS, "only": (), "report": None})
def release(
    file: PathLike | Mapping[str, Any],
    *,
    model: PathLike | None = None,
    out: PathLike | None = None,
    on_progress: OnProgress = None,
    **options: Unpack[Releasing],
) -> outcome.Released:
    """Make several checkpoints of a model. `ok` of the result says whether all are there and sound.

    The same call again continues an interrupted run, and leaves checkpoints that are done.

    file:        a release file, or its content as a mapping: see docs/release.md.
    model:       wins over the file's.
    out:         where checkpoints go, as OUT/NAME; wins over the file's.
    only:        names of checkpoints; by default all.
    fresh:       start over what was interrupted; with `force` also checkpoints that are done.
    force:       replace what is in the place of a checkpoint, unless it is that checkpoint.
    calibration: the folder of a calibration to use or to make; by default OUT.calibration.
    report:      an HTML page on all checkpoints, to be written.
    on_progress, workers, device, max_memory, executor, trust_remote_code: as of `quantize`.

    What concerns one checkpoint is in its `error`. Raises InputError for a release of which one
    checkpoint could not be written, and MachineError for the disk, the memory or the device.
    """
    resources, progress = resources_of(options), progress_of(on_progress)
    chosen = planning.ReleaseOptions(
        tuple(options["only"]),
        None if out is None else str(out),
        options["workers"],
        options["fresh"],
        options["force"],
        path_of(options["calibration"]),
        path_of(options["report"]),
        resources.executor,
        resources.trust_remote_code,
    )
    planned = planning.plan_release(
        file if isinstance(file, Mapping) else str(file),
        model=None if model is None else str(model),
        options=chosen,
        progress=progress,
    )
    return outcome.released(planned, running.run_release(planned, resources, progress))
