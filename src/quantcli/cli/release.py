"""`quantcli release`: its options and its output."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from quantcli.cli import next as following
from quantcli.cli import options
from quantcli.cli.conversion import show_memory
from quantcli.cli.output import FAILED, OK, WARNING, Output
from quantcli.core.cluster.executor import THREADS
from quantcli.core.errors import QuantError
from quantcli.core.text import count

if TYPE_CHECKING:
    from quantcli.commands.release.planning import Member, Release
    from quantcli.commands.release.running import MemberOutcome

_STATES = {"new": "", "done": "is there already", "unsure": "is there; the calibration will tell"}
_COLUMNS = ["checkpoint", "recipe", "target", "weights", "coverage", "goes to"]


@options.on_screen
def release(
    output: Output,
    file: Annotated[str, typer.Argument(metavar="RELEASE", help="YAML file: see docs/release.md.")],
    model: Annotated[
        str | None, typer.Option(help="Folder, Hub id or address; wins over the release's.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Checkpoints go to PLACE/NAME; wins over `output` [default: MODEL-RELEASE here].",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this checkpoint; may be given several times."),
    ] = None,
    plan: options.PlanOnly = False,
    workers: options.Workers = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Start over what was interrupted; with --force also checkpoints that are done.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace checkpoints that exist and are of another plan.")
    ] = False,
    calibration: options.Calibration = None,
    device: options.Device = "cpu",
    max_memory: options.MaxMemory = None,
    executor: options.Executor = THREADS,
    trust_remote_code: options.Trust = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="Also write one page on all checkpoints."),
    ] = None,
) -> None:
    """Make several checkpoints of a model in one run.

    The text runs through the model once for all recipes, and the weights are read once. Everything is
    checked before the first checkpoint is written. The same command again resumes an interrupted run,
    and leaves checkpoints that are done as they are. Exits with 1 if a plan misses its `expect` block,
    or a checkpoint its verification; the others are written.
    """
    from quantcli.cli.progress import watch
    from quantcli.commands.release import outcome, planning, running

    resources = options.resources_of(device, workers, max_memory, executor, trust=trust_remote_code)
    chosen = planning.ReleaseOptions(
        tuple(only or ()),
        out,
        workers,
        fresh,
        force,
        calibration,
        report,
        resources.executor,
        trust_remote_code,
    )
    with watch(output) as progress:
        planned = planning.plan_release(file, model=model, options=chosen, progress=progress)
    output.show(lambda: show_plan(output, planned), on_screen=plan or not output.quiet)
    if plan:
        missed = next((m.missed for m in planned.members if m.missed is not None), None)
        if output.as_json:
            output.document({"plan": outcome.planned(planned).to_dict()}, missed)
        following.show(output, following.typed(output, without="--plan"))
        if missed is not None:
            raise typer.Exit(missed.exit_code)
        return
    began = time.monotonic()
    with watch(output) as progress:
        outcomes = running.run_release(planned, resources, progress)
    seconds = time.monotonic() - began
    failed = outcome.failure(outcomes)
    steps = following.after_release(output, planned, outcomes)
    if report is not None and any(o.report is not None for o in outcomes):
        output.message(f"written: {report}")
    with following.after(output, *steps):
        for note in _new_notes(planned, outcomes):
            output.message(f"note: {note}", WARNING)
        result = outcome.released(planned, outcomes).to_dict()
        output.result(result, lambda out, _: show_outcomes(out, outcomes, failed, seconds), failed)


def show_plan(out: Output, release: Release) -> None:
    """Print the plan: a line for each checkpoint, and what all of them cost."""
    out.table(_COLUMNS, [_row(member) for member in release.members], {"weights", "coverage"})
    out.line()
    jobs = [member.job for member in release.missing]
    before = decimal(release.checkpoint.nbytes)
    how = "once for all of them" if release.options.executor is None else "for each of them"
    reads = f"reads        {before} of weights" + (f", {how}" if jobs[1:] else "")
    out.line(reads if jobs else "writes       nothing")
    for member in release.members:
        if member.missed is not None:
            out.line(f"not written  {member.name}: {member.missed.what}", FAILED)
        elif _STATES[member.state]:
            out.line(f"kept         {member.name}: {member.job.out} {_STATES[member.state]}")
        elif member.job.out.exists:
            out.line(f"replaces     {member.job.out}, which is {member.job.out.fate}")
        if member.job.shards_done:
            done = count(member.job.shards_done, "shard")
            out.line(f"resumes      {member.name}: {done} done by an interrupted run")
    if release.joint is not None:
        out.line(f"calibration  {calibration_text(release)}")
    if rooms := [job.room for job in jobs if job.room is not None]:
        needed, free = sum(room.needed for room in rooms), min(room.free for room in rooms)
        out.line(f"disk         needs {decimal(needed)}, {decimal(free)} free")
    if uploads := sum(job.nbytes for job in jobs if job.out.folder is None):
        out.line(f"uploads      {decimal(uploads)}")
    if jobs and release.options.executor is not None:
        out.line(f"runs on      {release.options.executor}, shard by shard")
    if jobs:
        show_memory(out, release.memory, release.options.of_run())
    if release.verify is not None:
        out.line(f"verifies     {', '.join(release.verify.depths)}")
    for note in [*release.notes, *_plan_notes(release)]:
        out.line(f"note         {note}", WARNING)


def _row(member: Member) -> list[str]:
    plan = member.job.plan
    coverage = f"{plan.coverage.quantizable_pct:.1f} %"
    sizes = decimal(plan.weight_nbytes)
    return [
        member.name,
        Path(member.entry.recipe).stem,
        plan.target.name,
        sizes,
        coverage,
        str(member.job.out),
    ]


def calibration_text(release: Release) -> str:
    """Where the calibration is, and what it will do."""
    joint = release.joint
    assert joint is not None
    sessions = [m.job.session for m in release.members if m.job.session is not None]
    todo = [session for session in sessions if not session.complete]
    if not todo:
        return f"{joint.folder}, complete"
    source = todo[0].source
    workers = release.options.of_run().workers
    memory = release.memory + max(session.memory_nbytes(workers) for session in todo)
    on_cluster = release.options.executor is not None
    states = max(session.states_nbytes(on_cluster=on_cluster) for session in todo)
    done = max(session.layers_done for session in todo)
    resumes = f", continues after {count(done, 'layer')}" if done else ""
    return (
        f"runs first, for {count(todo, 'checkpoint')}: {source.samples} samples of {source.length} "
        f"tokens of {source.data}, kept in {joint.folder}{resumes}; about {decimal(memory)} of memory, "
        f"and up to {decimal(states)} of hidden states on disk"
    )


def _plan_notes(release: Release) -> list[str]:
    """Notes of the plans."""
    return _together({member.name: member.job.plan.notes for member in release.members})


def _new_notes(release: Release, outcomes: Sequence[MemberOutcome]) -> list[str]:
    """Notes of the conversions, and those of plans that only the calibration brought."""
    new: dict[str, list[str]] = {}
    for before, outcome in zip(release.members, outcomes, strict=True):
        written = () if outcome.written is None else outcome.written.notes
        notes = [*outcome.member.job.plan.notes, *written]
        new[before.name] = [note for note in notes if note not in before.job.plan.notes]
    return _together(new)


def _together(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Notes of checkpoints, by name: each once, with the names unless all have it."""
    names: dict[str, list[str]] = {}
    for name, own in notes.items():
        for note in dict.fromkeys(own):
            names.setdefault(note, []).append(name)
    return [n if len(who) == len(notes) else f"{', '.join(who)}: {n}" for n, who in names.items()]


def show_outcomes(
    out: Output, outcomes: list[MemberOutcome], failed: QuantError | None, seconds: float
) -> None:
    """Print what became of each checkpoint."""
    verified = any(outcome.report is not None for outcome in outcomes)
    columns = ["checkpoint", "", "bytes", *(["verified"] if verified else []), "place"]
    rows = []
    for outcome in outcomes:
        answer = [_answer(outcome.report)] if verified else []
        size = decimal(outcome.nbytes) if outcome.error is None else "-"
        place = str(outcome.member.job.out)
        rows.append([outcome.member.name, outcome.status, size, *answer, place])
    styles = {outcome.member.name: OK if outcome.ok else FAILED for outcome in outcomes}
    out.table(columns, rows, {"bytes"}, styles=styles)
    for outcome in outcomes:
        if outcome.error is not None:
            out.line(f"FAILED       {outcome.error.what}", FAILED)
            for prefix, text in (("  --> ", outcome.error.where), ("  fix: ", outcome.error.fix)):
                if text:
                    out.line(prefix + text)
        elif not outcome.ok:
            _show_findings(out, outcome)
    there = sum(outcome.ok for outcome in outcomes)
    word, style = ("FAILED", FAILED) if failed else ("done", OK)
    out.line(f"{word}: {there} of {count(outcomes, 'checkpoint')}, {seconds:.1f} s", style)


def _answer(report: dict[str, Any] | None) -> str:
    return "-" if report is None else "passed" if report["ok"] else "FAILED"


def _show_findings(out: Output, outcome: MemberOutcome) -> None:
    """Print why a checkpoint did not pass its verification."""
    from quantcli.cli.verify import show_errors, verdict
    from quantcli.verification.report import words

    assert outcome.report is not None
    show_errors(out, words.errors(outcome.report))
    out.line(verdict(outcome.report), FAILED)
