"""The commands as plain functions: what the command line and Python callers share.

Torch is imported when a function needs it, so that `inspect` stays fast.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.commands.calibrate import calibrate
from quantcli.commands.job import (
    Job,
    calibration_folder,
    default_name,
    make_job,
    open_both,
    run_job,
    to_json,
)
from quantcli.core.errors import AnswerNo, InputError
from quantcli.core.events import SILENT, Progress

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.convert.execute import Written
    from quantcli.planning.plan import Plan


def plan(
    recipe: str | Path,
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
    progress: Progress = SILENT,
) -> Job[Plan]:
    """Check everything that can be checked before the first byte of weights is read.

    Succeeds exactly when `quantize` with the same arguments would begin, but for the recipe's
    `expect` block: see `check`. recipe: a file, or the name of a shipped one. part: as in "2/3"; it
    goes to `out`.part-2-of-3.
    """
    from quantcli.convert.publish import check_destination
    from quantcli.core.threads import default_workers
    from quantcli.planning.parts import parse_part

    opened = open_both(recipe, model, overrides, "quantize", progress)
    checkpoint = opened.checkpoint
    if out is None:
        out = Path(opened.written.file.output or default_name(opened.model, recipe))
    whole, share = out, None
    if part is not None:
        share = parse_part(part)
        check_destination(whole, checkpoint.path, force=True)  # it need not be free yet
        out = share.folder(whole)
    check_destination(out, checkpoint.path, force=force)
    progress.say(f"planning {recipe} for {opened.model}")

    from quantcli.convert.execute import RunOptions
    from quantcli.planning.planner import make_plan
    from quantcli.recipe.recipe import resolve

    loaded = resolve(opened.written)
    plan = make_plan(loaded, checkpoint)
    session = None
    if plan.needs_calibration:
        from quantcli.calibration.session import load, prepare_session

        folder = calibration or calibration_folder(whole)
        session = prepare_session(plan, folder, out=out)
        if session.complete:
            plan = make_plan(loaded, checkpoint, load(session))
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
    options = RunOptions(workers or default_workers(), fresh, force, checksum)
    return make_job(plan, out, options, session, share)


def _calibrate_command(
    recipe: str | Path, model: str | None, overrides: tuple[str, ...], folder: Path
) -> str:
    """What to type for the calibration of a conversion that was given these options."""
    words = ["quantcli", "calibrate", str(recipe)]
    if model is not None:
        words += ["--model", model]
    for override in overrides:
        words += ["--set", override]
    return shlex.join([*words, "--out", str(folder)])


def check(job: Job[Plan]) -> None:
    """AnswerNo if the plan misses a limit of the recipe's `expect` block; its payload is the plan."""
    from quantcli.planning.planner import compare_expected

    for expected in compare_expected(job.plan):
        if not expected.ok:
            raise AnswerNo(
                f"expected {expected.key} {expected.limit}; the plan has {expected.value:.4g}",
                where=job.plan.recipe.where("expect", expected.key),
                fix="see the plan's table for what stays float and why",
                payload={"plan": to_json(job)},
            )


def quantize(
    job: Job[Plan], progress: Progress | None = None, resources: Resources | None = None
) -> Written[Plan]:
    """Run a planned conversion, calibrating first where the recipe needs that.

    Interrupted, the same job continues where it stopped.
    """
    check(job)
    if job.session is not None and not job.session.complete:
        from quantcli.calibration.session import load
        from quantcli.planning.planner import make_plan

        calibrate(job.session, resources, progress)
        plan = make_plan(job.plan.recipe, job.plan.checkpoint, load(job.session))
        job = replace(job, plan=plan)
        check(job)
    return run_job(job, progress)
