"""The Python API: the commands as functions of a script or a notebook.

They print nothing, touch no signal handlers, and leave no setting of the process changed. What is wrong
with the input or the machine is a QuantError.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from quantcli.commands.job import JobOptions
from quantcli.commands.keywords import (
    Calibrating,
    Converting,
    Packing,
    PathLike,
    Planning,
    Verifying,
    assignments,
    path_of,
    takes,
    verify_defaults,
    verify_options,
)
from quantcli.commands.results import (
    Calibrated,
    Converted,
    Inspection,
    Merged,
    Outliers,
    Packed,
    Planned,
    Repacked,
    Support,
    Verification,
)
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Event, Events, Progress

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.commands.job import Job as PlannedJob
    from quantcli.convert.execute import Written
    from quantcli.planning.plan import Plan

Recipe = PathLike | Mapping[str, Any]
OnProgress = Callable[[Event], None] | None


def _progress(receive: OnProgress) -> Progress:
    return SILENT if receive is None else Events(receive)


@takes(Planning)
def plan(
    recipe: Recipe,
    *,
    model: PathLike | None = None,
    out: PathLike | None = None,
    on_progress: OnProgress = None,
    **options: Unpack[Planning],
) -> Planned:
    """What `quantize` with the same arguments would write. Reads headers only.

    Arguments are those of `quantize`. Raises AnswerNo if the plan misses a limit of the recipe's
    `expect` block, InputError for a recipe or a model that cannot be converted so, and MachineError if
    the disk is too small.
    """
    from quantcli.commands import quantize as commands

    job = _plan(recipe, model, out, on_progress, options)
    commands.check(job)
    return _planned(job)


@takes(Converting)
def quantize(
    recipe: Recipe,
    *,
    model: PathLike | None = None,
    out: PathLike | None = None,
    on_progress: OnProgress = None,
    **options: Unpack[Converting],
) -> Converted:
    """Convert a checkpoint with a recipe; calibrate first if the recipe needs data.

    The same call again continues an interrupted run.

    recipe:      the name of a shipped recipe, a YAML file, or its content as a mapping.
    model:       a folder or a Hub id; wins over the recipe's.
    out:         the folder to write, which appears whole or not at all. By default the recipe's, or
                 MODEL-RECIPE here.
    on_progress: is called with each `Event`, from any thread; `print` shows them.
    set:         changes of the recipe: {"calibration.samples": 64}, or ["calibration.samples=64"].
    workers:     threads; by default one for each core.
    fresh:       start over in place of continuing.
    force:       replace `out` once the new checkpoint is complete.
    checksum:    hash every file for the manifest.
    calibration: the folder of a calibration to use or to make; by default OUT.calibration.
    part:        "2/3": write only part 2 of 3, for `pack(..., merge=True)`.
    device:      where a calibration computes: cpu, cuda or npu.
    max_memory:  bytes that a calibration may use, or a text such as "8GB".
    trust_remote_code: allow the model's own Python code to run.

    Raises AnswerNo if the plan misses a limit of the recipe's `expect` block, InputError for a recipe
    or a model that cannot be converted so, and MachineError for the disk, the memory or the device.
    """
    resources = _resources(options)
    return Job(_plan(recipe, model, out, on_progress, options), resources)._run(on_progress)


@takes(Converting)
def prepare(
    recipe: Recipe,
    model: PathLike | None = None,
    *,
    out: PathLike | None = None,
    on_progress: OnProgress = None,
    **options: Unpack[Converting],
) -> Job:
    """A conversion in steps: `job.plan`, `job.calibrate()` if the recipe needs data, `job.convert()`.

    Arguments and errors are those of `quantize`; nothing is written yet. Limits of the recipe's
    `expect` block are checked by `convert`.
    """
    resources = _resources(options)
    return Job(_plan(recipe, model, out, on_progress, options), resources)


def _plan(
    recipe: Recipe,
    model: PathLike | None,
    out: PathLike | None,
    on_progress: OnProgress,
    options: Mapping[str, Any],
) -> PlannedJob[Plan]:
    from quantcli.commands import quantize as commands

    return commands.plan(
        recipe if isinstance(recipe, Mapping) else str(recipe),
        model=None if model is None else str(model),
        out=path_of(out),
        overrides=assignments(options["set"]),
        options=JobOptions(
            options["workers"],
            options["fresh"],
            options["force"],
            options["checksum"],
            path_of(options["calibration"]),
            options["part"],
        ),
        progress=_progress(on_progress),
    )


def _resources(options: Mapping[str, Any]) -> Resources:
    """The resources of a calibration. InputError for a device or a size that does not exist."""
    from quantcli.calibration.resources import Resources, check_device
    from quantcli.core.threads import default_workers
    from quantcli.recipe.fields import parse_size

    check_device(options["device"])
    limit = options["max_memory"]
    try:
        size = None if limit is None else parse_size(limit)
    except ValueError as error:
        fix = 'give bytes, or a text such as "8GB"'
        raise InputError(f"`max_memory`: {error}", where=f"max_memory={limit!r}", fix=fix) from None
    workers = options["workers"] or default_workers()
    return Resources(options["device"], workers, size, options["trust_remote_code"])


def _planned(job: PlannedJob[Plan]) -> Planned:
    from quantcli.commands.job import to_json

    return Planned(**{**to_json(job), "out": job.out})


def _files(written: Written[Any]) -> dict[str, Any]:
    """What is known of every checkpoint that was written."""
    reused = written.shards_reused
    return {
        "out": written.out,
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
        return _planned(self._job)

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
                self._job = commands.calibrated(self._job, self._resources, _progress(on_progress))
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
        return self._run(on_progress)

    def _run(self, on_progress: OnProgress) -> Converted:
        """Calibrate, if that is still to do, and convert."""
        from quantcli.commands import quantize as commands

        with self._one_call():
            if self._converted:
                raise InputError(
                    "this job was converted already",
                    where=str(self._job.out),
                    fix="call quantcli.prepare() again for another output",
                )
            progress = _progress(on_progress)
            written = commands.quantize(self._job, progress, self._resources)
            self._job = replace(self._job, plan=written.plan)
            self._converted = True
        notes = dict.fromkeys((*written.plan.notes, *written.notes))
        return Converted(
            **_files(written),
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


@takes(Calibrating)
def calibrate(
    recipe: Recipe,
    *,
    model: PathLike | None = None,
    out: PathLike | None = None,
    on_progress: OnProgress = None,
    **options: Unpack[Calibrating],
) -> Calibrated:
    """Run samples through the model, one layer at a time, and keep statistics for `quantize`.

    The same call again continues an interrupted one after its last layer.

    recipe, model, set, workers, device, max_memory, trust_remote_code, on_progress: as of `quantize`.
    out:   the folder to write, for `quantize(..., calibration=out)`.
    fresh: start over in place of continuing.

    Raises InputError for a recipe that needs no data, or for data or a model that cannot be used, and
    MachineError for the disk, the memory or the device.
    """
    from quantcli.commands import calibrate as commands

    resources, progress = _resources(options), _progress(on_progress)
    session = commands.plan_calibration(
        recipe if isinstance(recipe, Mapping) else str(recipe),
        model=None if model is None else str(model),
        out=path_of(out),
        overrides=assignments(options["set"]),
        fresh=options["fresh"],
        progress=progress,
    )
    return Calibrated.of(commands.calibrate(session, resources, progress, fresh=options["fresh"]))


@takes(Packing)
def pack(
    checkpoint: PathLike | Sequence[PathLike],
    target: str | None = None,
    *,
    out: PathLike,
    merge: bool = False,
    on_progress: OnProgress = None,
    **options: Unpack[Packing],
) -> Packed:
    """Write a quantized checkpoint in another format, its codes and scales unchanged; or join parts.

    checkpoint:  a folder or a Hub id; with `merge` the folders of all parts of one conversion.
    target:      the format to write, such as "compressed-tensors".
    out:         the folder to write, which appears whole or not at all.
    set:         options of the target.
    on_progress, workers, fresh, force, checksum: as of `quantize`.

    Raises InputError for a checkpoint that the format cannot hold, and for parts that make no whole.
    """
    progress = _progress(on_progress)
    workers, fresh, force = options["workers"], options["fresh"], options["force"]
    if merge:
        from quantcli.convert import merge as merging

        if target is not None or options["set"] or not options["checksum"]:
            raise InputError("`merge` takes no `target`, `set` or `checksum`", fix="leave them out")
        folders = [checkpoint] if isinstance(checkpoint, str | os.PathLike) else checkpoint
        parts = [Path(folder) for folder in folders]
        merge_job = merging.plan_merge(parts, Path(out), workers=workers, fresh=fresh, force=force)
        joined = merging.merge(merge_job, progress)
        merged = Merged(**{**merging.to_json(merge_job), "out": merge_job.out})
        return Packed(**_files(joined), notes=list(joined.notes), plan=merged)
    from quantcli.commands import pack as commands

    if target is None or not isinstance(checkpoint, str | os.PathLike):
        raise InputError("`pack` takes one checkpoint and a `target`", fix='such as target="fp8"')
    job = commands.plan_pack(
        str(checkpoint),
        target,
        Path(out),
        overrides=assignments(options["set"]),
        options=JobOptions(workers, fresh, force, options["checksum"]),
        progress=progress,
    )
    written = commands.pack(job, progress)
    data = {**commands.to_json(job), "out": job.out}
    repacked = Repacked(origin=data.pop("from"), **data)
    return Packed(**_files(written), notes=list(written.notes), plan=repacked)


@takes(Verifying, verify_defaults())
def verify(
    checkpoint: PathLike, *, on_progress: OnProgress = None, **options: Unpack[Verifying]
) -> Verification:
    """Check that a quantized checkpoint is whole, loadable and faithful. `ok` of the result says so.

    checkpoint:  a folder or a Hub id, whoever wrote it.
    full:        read every byte: hashes, NaN, ranges.
    against:     the float model, or another quantized one, to compare with.
    calibration: the folder of the calibration: numbers that follow from it are computed again.
    run, data:   run both models on a text file, as the engine computes; needs `against`.
    samples, length: windows of that text, and tokens of each.
    tp:          tensor parallel sizes to serve with, as in "1,2,4".
    recipe:      a recipe, whose `verify` block sets limits.
    min_sqnr, max_ppl_ratio, max_kl: limits: dB, a ratio, nats per token.
    junit, report: files to write: JUnit XML, and one HTML page.
    on_progress, workers, trust_remote_code: as of `quantize`.

    Raises InputError if there is nothing to verify, or for options that do not go together.
    """
    from quantcli.commands import verify as commands

    chosen = verify_options(checkpoint, options)
    return Verification(**commands.run(chosen, _progress(on_progress)))


@overload
def inspect(
    model: PathLike,
    *,
    tensors: str | None = None,
    outliers: Literal[False] = False,
    on_progress: OnProgress = None,
) -> Inspection: ...


@overload
def inspect(
    model: PathLike,
    *,
    outliers: Literal[True],
    report: PathLike | None = None,
    on_progress: OnProgress = None,
) -> Outliers: ...


@takes()
def inspect(
    model: PathLike,
    *,
    tensors: str | None = None,
    outliers: bool = False,
    report: PathLike | None = None,
    on_progress: OnProgress = None,
) -> Inspection | Outliers:
    """The contents of a checkpoint, from its headers; with `outliers`, its weights ranked.

    model:    a folder or a Hub id.
    tensors:  a glob; the tensors that match are listed in `matches`.
    outliers: read the weights and rank them by how hard they are to quantize.
    report:   with `outliers`, an HTML page to write.

    Raises InputError if nothing can be shown. Faults that do not hide the contents are in `problems`.
    """
    from quantcli.commands import inspect as commands

    progress = _progress(on_progress)
    if not outliers:
        if report is not None:
            raise InputError("`report` needs `outliers`", fix="add outliers=True")
        contents = commands.inspect(str(model), tensors, progress)
        return Inspection(**{**contents, "path": Path(contents["path"])})
    if tensors is not None:
        raise InputError("`outliers` does not take `tensors`", fix="leave `tensors` out")
    ranking = commands.outliers(str(model), progress, path_of(report))
    return Outliers(**{**ranking, "path": Path(ranking["path"])})


@takes()
def support(*, on_progress: OnProgress = None) -> Support:
    """Which schemes and targets go together, and how each pair is stored."""
    from quantcli.commands import inspect as commands

    return Support(commands.support(_progress(on_progress)))
