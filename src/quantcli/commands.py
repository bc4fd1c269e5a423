"""The commands as plain functions: what the command line and Python callers share.

Torch is imported when a function needs it, so that `inspect` stays fast.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import open_checkpoint, scan_checkpoint
from quantcli.checkpoint.hub import find_model
from quantcli.checkpoint.inspection import inspect_checkpoint
from quantcli.core.errors import InputError
from quantcli.jobs import Job

if TYPE_CHECKING:
    from quantcli.calibration.session import Resources, Session
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.convert.execute import Written
    from quantcli.core.events import Progress
    from quantcli.planning.plan import Plan
    from quantcli.recipe.recipe import Recipe


def inspect(model: str, tensors: str | None = None) -> dict[str, Any]:
    """What a checkpoint holds, from its headers alone. `tensors` is a glob of names to list."""
    return inspect_checkpoint(scan_checkpoint(find_model(model)), tensors)


def support() -> list[dict[str, Any]]:
    """Every scheme x target, found by quantizing and packing a weight without data."""
    from quantcli.checkpoint.spec import TensorSpec
    from quantcli.core.registry import discover
    from quantcli.planning.items import dry_run
    from quantcli.schemes.base import Scheme
    from quantcli.targets.base import Target

    cells = []
    for scheme_name, scheme_class in discover(Scheme).items():
        for target_name, target_class in discover(Target).items():
            scheme, target = scheme_class(), target_class()
            cell: dict[str, Any] = {"scheme": scheme_name, "target": target_name}
            try:
                weight = TensorSpec("weight", "BF16", (256, 256))
                specs = dry_run(scheme, target, weight, "BF16").specs
                label = target.label(scheme.numerics)
                cell |= {"supported": True, "label": label, "loads_on": target.loads_on(label)}
                cell["tensors"] = {s.name: {"dtype": s.dtype, "shape": s.shape} for s in specs}
            except InputError as error:
                cell |= {"supported": False, "why": error.what}
            cells.append(cell)
    return cells


def prepare(
    recipe: Path,
    *,
    model: str | None = None,
    out: Path | None = None,
    overrides: tuple[str, ...] = (),
    workers: int | None = None,
    checksum: bool = True,
    fresh: bool = False,
    force: bool = False,
    calibration: Path | None = None,
    part: str | None = None,
) -> Job:
    """Check everything that can be checked before the first byte of weights is read.

    Succeeds exactly when `quantize` with the same arguments would begin, but for the recipe's
    `expect` block: see `check`. part: as in "2/3"; it goes to `out`.part-2-of-3.
    """
    from quantcli.convert.execute import run_head
    from quantcli.convert.journal import check_folder
    from quantcli.convert.publish import check_destination, only_ours, replaced_folder
    from quantcli.convert.shards import memory_estimate
    from quantcli.core.place import check_space, partial_folder
    from quantcli.core.threads import default_workers
    from quantcli.planning.parts import parse_part
    from quantcli.planning.planner import make_plan

    loaded, named, checkpoint = _load(recipe, model, overrides)
    made = make_plan(loaded, checkpoint)
    if out is None:
        out = Path(loaded.file.output or _default_name(named, recipe))
    whole, share = out, None
    if part is not None:
        share = parse_part(part)
        check_destination(whole, checkpoint.path, force=True)  # it need not be free yet
        out = share.folder(whole)
    check_destination(out, checkpoint.path, force=force)
    session = None
    if made.needs_calibration:
        from quantcli.calibration.session import load, prepare_session

        folder = calibration or _calibration_folder(whole)
        session = prepare_session(made, folder, out=out)
        if session.complete:
            made = make_plan(loaded, checkpoint, load(session))
        elif share:
            raise InputError(
                "all parts need one calibration, and this one is not done",
                where=str(folder),
                fix=f"run `{_calibrate_command(recipe, model, overrides, folder)}` once, and give a "
                "copy of it to every part with --calibration",
            )
    elif calibration is not None:
        raise InputError(
            "nothing in this recipe needs a calibration",
            where=f"--calibration {calibration}",
            fix="leave --calibration out",
        )
    unknown = fresh or (session is not None and not session.complete)
    head = None if unknown else run_head(made, checksum=checksum)
    done = check_folder(partial_folder(out), head)
    count = workers or default_workers()
    free = check_space(out, share.nbytes(made) if share else made.nbytes)
    memory = memory_estimate(made, count)
    kept = out.is_dir() and not only_ours(out)
    replaced = f", which is kept as {replaced_folder(out)}" if kept else ", which is deleted then"
    return Job(made, out, count, checksum, fresh, force, free, memory, done, replaced, session, share)


def _calibrate_command(
    recipe: Path, model: str | None, overrides: tuple[str, ...], folder: Path
) -> str:
    """What to type for the calibration of a conversion that was given these options."""
    words = ["quantcli", "calibrate", str(recipe)]
    if model is not None:
        words += ["--model", model]
    for override in overrides:
        words += ["--set", override]
    return shlex.join([*words, "--out", str(folder)])


def _load(
    recipe: Path, model: str | None, overrides: tuple[str, ...], verb: str = "quantize"
) -> tuple[Recipe, str, Checkpoint]:
    """The recipe, how the model was named, and the model."""
    from quantcli.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    named = model or loaded.file.model
    if named is None:
        raise InputError(
            f"no model to {verb}", where=str(recipe), fix="give --model, or `model:` in the recipe"
        )
    return loaded, named, open_checkpoint(find_model(named))


def _default_name(model: str, recipe: Path) -> str:
    return f"{Path(os.path.abspath(model)).name}-{recipe.stem}"  # noqa: PTH100 - keeps links


def _calibration_folder(out: Path) -> Path:
    """Where the calibration of a checkpoint in `out` is kept, if nothing else is said."""
    return out.with_name(out.name + ".calibration")


def prepare_calibration(
    recipe: Path,
    *,
    model: str | None = None,
    out: Path | None = None,
    overrides: tuple[str, ...] = (),
    fresh: bool = False,
) -> Session:
    """Check all that can be checked before a calibration reads weights."""
    from quantcli.calibration.session import prepare_session
    from quantcli.planning.planner import make_plan

    loaded, named, checkpoint = _load(recipe, model, overrides, "calibrate")
    made = make_plan(loaded, checkpoint)
    if not made.needs_calibration:
        raise InputError(
            "nothing in this recipe needs a calibration",
            where=str(recipe),
            fix="`quantcli quantize` converts with it as it is",
        )
    folder = out or _calibration_folder(Path(loaded.file.output or _default_name(named, recipe)))
    return prepare_session(made, folder, fresh=fresh)


def calibrate(
    session: Session,
    resources: Resources | None = None,
    progress: Progress | None = None,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run a calibration, or go on with one; what it found, JSON-able. One that is done is not run."""
    from quantcli.calibration.session import Resources, run, summary
    from quantcli.core.events import SILENT

    if not session.complete:
        run(session, resources or Resources(), progress or SILENT, fresh=fresh)
    return summary(session)


def check(job: Job) -> None:
    """AnswerNo where the plan misses a limit of the recipe's `expect` block."""
    from quantcli.planning.planner import check_expectations

    check_expectations(job.plan)


def quantize(
    job: Job, progress: Progress | None = None, resources: Resources | None = None
) -> Written[Plan]:
    """Run a planned conversion, calibrating first where the recipe needs that.

    Interrupted, the same job continues where it stopped.
    """
    from quantcli.convert.execute import execute
    from quantcli.core.events import SILENT

    check(job)
    plan = job.plan
    if job.session is not None and not job.session.complete:
        from quantcli.calibration.session import load
        from quantcli.planning.planner import check_expectations, make_plan

        calibrate(job.session, resources, progress)
        plan = make_plan(plan.recipe, plan.checkpoint, load(job.session))
        check_expectations(plan)
    return execute(
        plan,
        job.out,
        workers=job.workers,
        progress=progress or SILENT,
        fresh=job.fresh,
        force=job.force,
        checksum=job.checksum,
        part=job.part,
    )
