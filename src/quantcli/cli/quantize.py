"""`quantcli quantize`: its options, and what it prints."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcli.cli.options import (
    Checksum,
    Device,
    Force,
    Fresh,
    Json,
    MaxMemory,
    Model,
    PlanOnly,
    Quiet,
    Trust,
    Workers,
    resources_of,
)
from quantcli.cli.output import Output
from quantcli.core.text import count, human_bytes

if TYPE_CHECKING:
    from quantcli.commands.job import Job
    from quantcli.convert.execute import Written
    from quantcli.planning.plan import Plan


def quantize(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(help="Output directory [default: MODEL-RECIPE here].")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override the recipe: rules.0.scheme=keep."),
    ] = None,
    plan: PlanOnly = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Write the I-th of N parts to OUT.part-I-of-N, for `quantcli pack --merge`.",
        ),
    ] = None,
    workers: Workers = None,
    fresh: Fresh = False,
    force: Force = False,
    checksum: Checksum = True,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Calibration to use or to make [default: OUT.calibration]."),
    ] = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint as a recipe says. The same command again resumes an interrupted run.

    Several machines: run it with --part 1/N to N/N, each where it likes, and put the parts together
    with `quantcli pack --merge`. Parts of a recipe that calibrates need one --calibration.
    """
    from quantcli.cli import progress
    from quantcli.commands import job as jobs
    from quantcli.commands import quantize as commands

    output = Output(as_json=as_json, quiet=quiet)
    job = commands.prepare(
        recipe,
        model=model,
        out=out,
        overrides=tuple(set_ or ()),
        workers=workers,
        checksum=checksum,
        fresh=fresh,
        force=force,
        calibration=calibration,
        part=part,
    )
    resources = resources_of(device, workers, max_memory, trust=trust_remote_code)
    if not as_json and (plan or not quiet):
        show_plan(output, job)
    commands.check(job)
    if as_json and plan:
        output.document({"ok": True, "plan": jobs.to_json(job)})
    if plan:
        return
    started = time.monotonic()
    with progress.watch(output) as watcher:
        written = commands.quantize(job, watcher, resources)
    show_written(output, job, written, time.monotonic() - started)
    job = replace(job, plan=written.plan)
    if as_json:
        result: dict[str, Any] = {"ok": True, "out": str(written.out), "bytes": written.nbytes}
        result |= {"shards_reused": written.shards_reused, "files": written.files}
        output.document({**result, "plan": jobs.to_json(job)})


def show_plan(out: Output, job: Job) -> None:
    """The plan: what each rule does, what stays float and why, what it costs."""
    plan = job.plan
    rows = []
    for rule in plan.rules:
        sizes = human_bytes(rule.nbytes_before), human_bytes(rule.nbytes_after)
        rows.append([f"rules.{rule.number - 1}: {rule.scheme}", rule.label, f"{rule.modules}", *sizes])
    for kept in plan.kept:
        sizes = human_bytes(kept.nbytes_before), human_bytes(kept.nbytes)
        rows.append([f"stays: {kept.reason}", "", f"{kept.tensors}", *sizes])
    columns = ["weights", "engine's name", "count", "before", "after"]
    out.table(columns, rows, {"count", "before", "after"})
    out.line()
    for kept in plan.kept:
        out.line(f"{kept.reason}: {', '.join(kept.names)}")
    out.line()
    before, after = plan.checkpoint.nbytes, plan.weight_nbytes
    out.line(
        f"weights      {human_bytes(before)} -> {human_bytes(after)} in {count(plan.shards, 'shard')}; "
        f"{plan.quantized_params_pct:.1f} % of {plan.params:,} parameters quantized"
    )
    for loads_on in dict.fromkeys(f"{r.label}: {r.loads_on}" for r in plan.rules if r.modules):
        out.line(f"loads on     {loads_on}")
    out.line(f"serving in   {'bfloat16' if plan.serving_dtype == 'BF16' else 'float16'}")
    if job.part is not None:
        files = ", ".join(shard.file for shard in job.shards) or "none"
        beside = f", and {count(plan.sidecars.keys() | plan.copies.keys(), 'file')} beside the weights"
        out.line(f"{job.part!s:<13}{files}{beside if job.part.carries else ''}")
    out.line(f"disk         needs {human_bytes(job.nbytes)}, {human_bytes(job.disk_free)} free")
    out.line(f"memory       about {human_bytes(job.memory)} with {count(job.workers, 'worker')}")
    out.line(f"output       {job.out}")
    if job.session is not None:
        out.line(f"calibration  {_calibration_words(job)}")
    if job.out.exists():
        out.line(f"replaces     {job.out}{job.replaced}")
    if job.shards_done:
        out.line(f"resumes      {count(job.shards_done, 'shard')} done by an interrupted run")
    for note in plan.notes:
        out.line(f"note         {note}")


def _calibration_words(job: Job) -> str:
    session = job.session
    assert session is not None
    asked = [f"{what} of {count(n, 'module')}" for what, n in session.plan.asked.items() if n]
    if session.plan.recipe.file.smooth is not None and not (asked and session.complete):
        asked.append("smoothing")
    what = " and ".join(asked)
    if session.complete:
        smoothed = f"; {count(job.plan.smoothed, 'group')} smoothed" if job.plan.smoothed else ""
        return f"{session.folder}, {what}{smoothed}"
    done = f", goes on after {count(session.layers_done, 'layer')}" if session.layers_done else ""
    source = session.source
    memory = human_bytes(job.memory + session.memory_nbytes(job.workers))
    return (
        f"runs first: {what} from {source.samples} samples of {source.length} tokens of "
        f"{source.data}, kept in {session.folder}{done}; about {memory} of "
        f"memory, and up to {human_bytes(session.states_nbytes)} of hidden states on disk"
    )


def show_written(out: Output, job: Job, written: Written[Plan], seconds: float) -> None:
    """What only calibration could tell, and the closing line."""
    for note in (*written.plan.notes, *written.notes):
        if note not in job.plan.notes:
            out.word(f"note: {note}")
    if job.part is not None:
        out.word(
            f"done: {written.out}, {human_bytes(written.nbytes)}, {job.part}, {seconds:.1f} s; all "
            "parts make the checkpoint with `quantcli pack --merge`"
        )
        return
    before = job.plan.checkpoint.nbytes
    ratio = job.plan.weight_nbytes / before if before else 1.0
    kept = written.shards_reused
    reused = f", {count(kept, 'shard')} from an earlier run" if kept else ""
    out.word(
        f"done: {written.out}, {human_bytes(written.nbytes)}, weights {100 * ratio:.1f} % of "
        f"the source, {seconds:.1f} s{reused}"
    )
