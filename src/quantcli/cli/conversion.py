"""The steps that `quantize`, `pack` and `pack --merge` share: print the plan, run it, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from rich.filesize import decimal

from quantcli.cli.output import OK, WARNING, Output
from quantcli.core.events import Progress
from quantcli.core.text import count

if TYPE_CHECKING:
    from quantcli.commands.job import Job
    from quantcli.convert.execute import RunOptions, Written

R = TypeVar("R", bound="Written[Any]")


def convert(
    out: Output,
    plan_only: bool,
    *,
    show: Callable[[], None],
    check: Callable[[], None] = lambda: None,
    run: Callable[[Progress], R],
    report: Callable[[R | None], dict[str, Any]],
    closing: tuple[str, str],
) -> None:
    """Print the plan of a job, run it with progress, and print its outcome.

    plan_only: print the plan and stop.
    show:      prints the plan for people.
    check:     raises AnswerNo if the plan misses a limit; called after the plan is shown.
    report:    the plan as JSON-able data: before the run of None, after it of the result.
    closing:   text for the closing line, after the size and at its end.
    """
    from quantcli.cli.progress import watch

    out.show(show, on_screen=plan_only or not out.quiet)
    check()
    if plan_only:
        if out.as_json:
            out.document({"plan": report(None)})
        return
    began = time.monotonic()
    with watch(out) as progress:
        result = run(progress)
    for note in result.notes:
        out.message(f"note: {note}", WARNING)
    nbytes = sum(entry["bytes"] for entry in result.files.values())
    seconds, reused = time.monotonic() - began, result.shards_reused
    earlier = f", {count(reused, 'shard')} from an earlier run" if reused else ""
    out.message(
        f"done: {result.out}, {decimal(nbytes)}{closing[0]}, {seconds:.1f} s{earlier}{closing[1]}", OK
    )
    if out.as_json:
        document = {"out": str(result.out), "bytes": nbytes, "shards_reused": reused}
        document |= {"files": result.files, "notes": list(result.notes)}
        out.document({**document, "plan": report(result)})


def show_job(out: Output, job: Job[Any], *facts: str) -> None:
    """Print the cost and the place of a job, more `facts`, and the notes of its plan."""
    if job.download is not None:
        pending = job.download.pending
        out.line(
            f"download     {decimal(pending.nbytes)} of {pending.given} first, into the Hub's cache"
        )
    if job.options.parts:
        out.line(f"disk         needs {decimal(job.nbytes)} in all, on the nodes")
    elif job.room is None:
        out.line("disk         none on this machine")
    else:
        needed, free = decimal(job.room.needed), decimal(job.room.free)
        out.line(f"disk         needs {needed}{job.room.where}, {free} free")
    if job.out.folder is None:
        out.line(f"uploads      {decimal(job.nbytes)}")
    show_memory(out, job.memory, job.options)
    out.line(f"output       {job.out}{job.out.remark}")
    for fact in facts:
        out.line(fact)
    if job.out.exists:
        out.line(f"replaces     {job.out}, which is {job.out.fate}")
    if job.shards_done:
        out.line(f"resumes      {count(job.shards_done, 'shard')} done by an interrupted run")
    for note in job.plan.notes:
        out.line(f"note         {note}", WARNING)


def show_memory(out: Output, nbytes: int, options: RunOptions) -> None:
    """Print the memory that conversions take."""
    workers = count(options.workers, "worker")
    out.line(f"memory       about {decimal(nbytes)} in addition to Python and torch, with {workers}")
