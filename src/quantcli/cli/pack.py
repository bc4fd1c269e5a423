"""The options of `quantcli pack`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.cli.options import Checksum, Force, Fresh, Json, PlanOnly, Quiet, Workers
from quantcli.cli.output import Output
from quantcli.core.errors import InputError
from quantcli.core.text import count, human_bytes

if TYPE_CHECKING:
    from quantcli.commands.pack import PackJob
    from quantcli.convert.execute import Written
    from quantcli.convert.merge import Merge, Merged
    from quantcli.planning.repack import Repacking

_MERGE = "quantcli pack --merge OUT.part-* --out OUT"
_PACK = "quantcli pack CHECKPOINT --target TARGET --out OUT"


def pack(
    checkpoint: Annotated[
        list[str] | None,
        typer.Argument(help="Quantized checkpoint, whoever wrote it; with --merge the parts."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Format to write: see `quantcli inspect --support`.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Put the parts of `quantize --part` together instead.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Output directory.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the target."),
    ] = None,
    plan: PlanOnly = False,
    workers: Workers = None,
    fresh: Fresh = False,
    force: Force = False,
    checksum: Checksum = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a quantized checkpoint for another engine, without rounding any number again.

    Codes and scales are the same, which is checked on the way; what the other format cannot hold is
    refused. Float tensors are copied byte for byte.

    With --merge: put the parts of one conversion together. The bytes are those of one run on one
    machine, and the model is not needed. The parts stay; on one file system their weight files are
    linked, not copied.

    The same command again resumes an interrupted run.
    """

    output = Output(as_json=as_json, quiet=quiet)
    given = checkpoint or []
    if not given or out is None:
        what = "nothing to pack" if not given else "no --out"
        raise InputError(what, fix=_MERGE if merge else _PACK)
    if merge:
        for option, unwanted in (
            ("--target", target is not None),
            ("--set", bool(set_)),
            ("--no-checksum", not checksum),
        ):
            if unwanted:
                raise InputError(f"--merge takes no {option}", fix=_MERGE)
        _merge(output, [Path(folder) for folder in given], out, plan, workers, fresh, force)
        return
    if target is None:
        raise InputError("no --target", fix=f"{_PACK}, or {_MERGE}")
    if len(given) > 1:
        raise InputError("one checkpoint at a time", where=given[1], fix=f"{_PACK}, or {_MERGE}")
    from quantcli.cli import progress
    from quantcli.commands import pack as packing

    job = packing.prepare_pack(
        given[0],
        target,
        out,
        options=set_ or (),
        workers=workers,
        checksum=checksum,
        fresh=fresh,
        force=force,
    )
    if not as_json and (plan or not quiet):
        show_pack(output, job)
    if plan:
        if as_json:
            output.document({"ok": True, "plan": packing.to_json(job)})
        return
    started = time.monotonic()
    with progress.watch(output) as watcher:
        written = packing.pack(job, watcher)
    show_packed(output, job, written, time.monotonic() - started)
    if as_json:
        result = {"ok": True, "out": str(written.out), "bytes": written.nbytes}
        result |= {"shards_reused": written.shards_reused, "files": written.files}
        output.document({**result, "plan": packing.to_json(job)})


def _merge(
    output: Output,
    folders: list[Path],
    out: Path,
    plan: bool,
    workers: int | None,
    fresh: bool,
    force: bool,
) -> None:
    from quantcli.cli import progress
    from quantcli.convert import merge as merging

    job = merging.prepare_merge(folders, out, workers=workers, fresh=fresh, force=force)
    if not output.as_json and (plan or not output.quiet):
        show_merge(output, job)
    if plan:
        if output.as_json:
            output.document({"ok": True, "plan": merging.to_json(job)})
        return
    started = time.monotonic()
    with progress.watch(output) as watcher:
        merged = merging.merge(job, watcher)
    show_merged(output, job, merged, time.monotonic() - started)
    if output.as_json:
        result = {
            "ok": True,
            "out": str(merged.out),
            "bytes": job.nbytes,
            "shards_reused": merged.reused,
        }
        output.document({**result, "files": merged.files, "plan": merging.to_json(job)})


def show_merge(out: Output, job: Merge) -> None:
    """The parts, and what is made of them."""
    rows = []
    shards = job.parts[0].whole["shards"]
    for part in job.parts:
        weights = sum(name in shards for name in part.files)
        nbytes = sum(entry["bytes"] for entry in part.files.values())
        beside = len(part.files) - weights
        rows.append([str(part.part), str(part.path), f"{weights}", f"{beside}", human_bytes(nbytes)])
    columns = ["part", "folder", "shards", "other files", "size"]
    out.table(columns, rows, {*columns[2:]})
    out.line()
    how = "linked, which takes no space" if job.linked else "copied"
    out.line(f"weights      {count(shards, 'shard')}, {how}")
    out.line(f"output       {job.out}, {human_bytes(job.nbytes)}")


def show_merged(out: Output, job: Merge, merged: Merged, seconds: float) -> None:
    """What the source lacks, and the closing line."""
    for note in merged.notes:
        out.word(f"note: {note}")
    reused = f", {count(merged.reused, 'shard')} from an earlier run" if merged.reused else ""
    out.word(
        f"done: {merged.out}, {human_bytes(job.nbytes)}, {seconds:.1f} s{reused}; the parts are still "
        "there"
    )


def show_pack(out: Output, job: PackJob) -> None:
    """The plan: what each kind of module becomes, what it costs."""
    plan = job.plan
    rows = [
        [
            line.before,
            line.label,
            f"{line.modules}",
            human_bytes(line.nbytes_before),
            human_bytes(line.nbytes_after),
        ]
        for line in plan.lines
    ]
    columns = [plan.origin.name, plan.target.name, "modules", "before", "after"]
    out.table(columns, rows, {"modules", "before", "after"})
    out.line()
    before, after = human_bytes(plan.checkpoint.nbytes), human_bytes(plan.weight_nbytes)
    out.line(f"weights      {before} -> {after} in {count(plan.shards, 'shard')}; no number is rounded")
    out.line(f"copied       {count(plan.floats, 'tensor')}, byte for byte")
    for loads_on in dict.fromkeys(f"{line.label}: {line.loads_on}" for line in plan.lines):
        out.line(f"loads on     {loads_on}")
    out.line(f"disk         needs {human_bytes(plan.nbytes)}, {human_bytes(job.disk_free)} free")
    out.line(f"memory       about {human_bytes(job.memory)} with {count(job.workers, 'worker')}")
    out.line(f"output       {job.out}")
    if job.shards_done:
        out.line(f"resumes      {count(job.shards_done, 'shard')} done by an interrupted run")
    for note in plan.notes:
        out.line(f"note         {note}")


def show_packed(out: Output, job: PackJob, written: Written[Repacking], seconds: float) -> None:
    """What the source lacks, and the closing line."""
    for note in written.notes:
        out.word(f"note: {note}")
    kept = written.shards_reused
    reused = f", {count(kept, 'shard')} from an earlier run" if kept else ""
    modules = count(sum(line.modules for line in job.plan.lines), "module")
    out.word(
        f"done: {written.out}, {human_bytes(written.nbytes)}, {seconds:.1f} s{reused}; {modules} "
        "unpacked again to the same codes and scales"
    )
