"""The commands as plain functions: what the command line and Python callers share.

Torch is imported when a function needs it, so that `inspect` stays fast.
"""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.commands.calibrate import calibrate
from quantcli.commands.job import (
    USUAL,
    Download,
    Job,
    JobOptions,
    accepted_place,
    calibration_folder,
    default_name,
    make_job,
    needless,
    open_both,
    run_job,
    say_if_new,
    to_json,
    with_model,
)
from quantcli.core.cluster.connect import connected
from quantcli.core.errors import AnswerNo, InputError
from quantcli.core.events import SILENT, Progress
from quantcli.core.place import existing_ancestor

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.calibration.session import Session
    from quantcli.calibration.text.examples import Examples
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.checkpoint.hub import Pending
    from quantcli.convert.execute import Written
    from quantcli.planning.plan import Plan
    from quantcli.recipe.written import GivenRecipe


def plan(
    recipe: GivenRecipe,
    *,
    model: str | Checkpoint | None = None,
    out: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    options: JobOptions = USUAL,
    examples: Examples | None = None,
    progress: Progress = SILENT,
) -> Job[Plan]:
    """Check everything that can be checked before the first byte of weights is read.

    Succeeds exactly when `quantize` with the same arguments would begin, but for the recipe's
    `expect` block: see `check`. recipe: a file, the name of a shipped one, or a mapping with a file's
    content. model: its name, or the checkpoint itself. examples: the data of the calibration,
    in place of what the recipe names. out: a folder, or a URL as text.
    """
    from quantcli.convert.destination import destination_of
    from quantcli.recipe.written import name_of

    given = overrides
    overrides += () if examples is None else examples.overrides
    opened = open_both(recipe, model, overrides, "quantize", progress, headers=True)
    checkpoint = opened.checkpoint
    named = out if out is not None else opened.written.file.output
    named = default_name(opened.model, recipe) if named is None else named
    whole = destination_of(named, progress)
    place, share = accepted_place(whole, options, checkpoint.path)
    progress.say(f"planning {name_of(recipe)} for {opened.model}")

    from quantcli.planning.planner import make_plan
    from quantcli.recipe.recipe import resolve

    loaded = resolve(opened.written)
    if loaded.file.rotate is not None:
        from quantcli.calibration.rotation.basis import in_basis

        checkpoint = in_basis(loaded, checkpoint, trust_remote_code=options.trust_remote_code)
    planned = make_plan(loaded, checkpoint)
    session = None
    if planned.needs_calibration:
        from quantcli.calibration.session import prepare_session

        folder = options.calibration or calibration_folder(whole)
        say_if_new(options.calibration, progress)
        session = prepare_session(planned, folder, out=place.folder, examples=examples)
        if session.complete:
            planned = with_statistics(planned, session)
        elif share:
            raise InputError(
                "all parts need one calibration, and this one is not done",
                where=str(folder),
                fix=f"{_how_to_calibrate(recipe, model, overrides, folder)} once, and give a "
                "copy of its folder to every part with --calibration",
            )
    elif options.calibration is not None or examples is not None:
        if examples is None:
            raise needless("--calibration", options.calibration)
        raise needless("example_inputs", "")
    if options.executor is not None:
        from quantcli.convert.spread.run import check_spread

        check_spread(planned)
    job = make_job(planned, place, options.of_run(), session, share)
    if opened.pending is not None:
        if why := _why_streamed(job, opened.pending):
            progress.say(why)
        else:
            again = partial(
                plan, recipe, out=whole.value, overrides=given, options=options, examples=examples
            )
            download = Download(opened.pending, lambda fetched: again(model=fetched))
            job = replace(job, download=download)
    from quantcli.commands.explain import explain_job, explain_plan, explain_session

    explain_plan(planned, progress)
    if session is not None:
        explain_session(session, progress)
    explain_job(job, progress)
    return job


def _why_streamed(job: Job[Plan], pending: Pending) -> str | None:
    """Why a model of the Hub is read where it is; None if it is to be fetched, since the disk has room
    for it next to the output and what the calibration keeps."""
    if job.out.begun and not job.options.fresh:  # its journal knows the files by their hashes
        return f"streaming {pending.given}, as the interrupted run did"
    others = 0
    if job.room is not None and _is_on(job.out.folder, pending.place):
        others += job.room.needed
    calibrates = job.session is not None and not job.session.complete
    if job.session is not None and calibrates and _is_on(job.session.folder, pending.place):
        others += job.session.states_nbytes(on_cluster=job.options.executor is not None)
    why = pending.why_streamed(others)
    return f"{why}; the calibration reads them, too" if why and calibrates else why


def _is_on(folder: Path | None, place: Path) -> bool:
    """Whether a folder, which need not exist, is on the disk of a place. A destination without one
    takes the disk of temporary files."""
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    return existing_ancestor(folder).stat().st_dev == place.stat().st_dev


def _how_to_calibrate(
    recipe: GivenRecipe, model: str | Checkpoint | None, overrides: tuple[str, ...], folder: Path
) -> str:
    """How to run the calibration of a conversion that was given these options: the command, if a
    command line can hold them."""
    if not isinstance(recipe, str | Path) or not (model is None or isinstance(model, str)):
        return "call `calibrate` with the same recipe, model and data"
    words = ["quantcli", "calibrate", str(recipe)]
    if model is not None:
        words += ["--model", model]
    for override in overrides:
        words += ["--set", override]
    return f"run `{shlex.join([*words, '--out', str(folder)])}`"


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
    job = with_model(job, progress)
    with connected(job.options.executor, progress or SILENT):
        if job.session is not None and not job.session.complete:
            job = calibrated(job, resources, progress)
            check(job)
        if job.session is not None and progress is not None:
            progress.keeps(f"the calibration {job.session.folder}", lasting=True)
        return run_job(job, progress)


def calibrated(
    job: Job[Plan], resources: Resources | None = None, progress: Progress | None = None
) -> Job[Plan]:
    """The job of a recipe that needs data, after its calibration: its plan has the statistics."""
    job = with_model(job, progress)
    assert job.session is not None
    calibrate(job.session, resources, progress)
    plan = with_statistics(job.plan, job.session)
    return replace(job, plan=plan, session=replace(job.session, complete=True))


def with_statistics(plan: Plan, session: Session) -> Plan:
    """A plan with the statistics of its finished calibration."""
    from quantcli.calibration.rotation.basis import learned_basis
    from quantcli.calibration.session import load
    from quantcli.planning.planner import make_plan

    return make_plan(plan.recipe, learned_basis(plan, session.folder), load(session))
