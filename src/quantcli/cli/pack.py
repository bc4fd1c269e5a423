"""`quantcli pack`: its options and its output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from quantcli.cli import next as following
from quantcli.cli import options
from quantcli.cli.conversion import convert, show_job
from quantcli.cli.output import Output
from quantcli.core.errors import InputError
from quantcli.core.text import count

if TYPE_CHECKING:
    from quantcli.commands.job import Job
    from quantcli.convert.merge import Merge
    from quantcli.planning.repack import Repacking

_MERGE = "quantcli pack --merge OUT.part-* --out OUT"
_PACK = "quantcli pack CHECKPOINT --target TARGET --out OUT"


@options.on_screen
def pack(
    output: Output,
    checkpoint: Annotated[
        list[str] | None, typer.Argument(help="Quantized checkpoint; with --merge, all parts of one.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Format to write: see `quantcli inspect --support`.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Join the parts of `quantize --part` instead.")
    ] = False,
    out: Annotated[str | None, typer.Option(metavar="PLACE", help=f"{options.PLACES}.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set an option of the target."),
    ] = None,
    plan: options.PlanOnly = False,
    workers: options.Workers = None,
    fresh: options.Fresh = False,
    force: options.Force = False,
    checksum: options.Checksum = True,
    sign: options.Sign = None,
    hash_model: options.HashModel = False,
) -> None:
    """Write a quantized checkpoint in another format.

    No number is rounded again: codes and scales stay the same, and this is checked. Numbers that the
    other format cannot represent are refused. Float tensors are copied byte for byte.

    With --merge: join the parts of one conversion. The bytes are those of one run on one machine, and
    the model is not needed. The parts stay; on one file system their weight files are linked, not
    copied.

    The same command again resumes an interrupted run.
    """
    folders = checkpoint or []
    if not folders or out is None:
        what = "no checkpoint to pack" if not folders else "option --out is missing"
        raise InputError(what, fix=_MERGE if merge else _PACK)
    from quantcli.commands.job import JobOptions, signer_of

    if merge:
        refused = {"--target": target is not None, "--set": bool(set_), "--no-checksum": not checksum,
                   "--hash-model": hash_model}  # fmt: skip
        if option := next((name for name, is_given in refused.items() if is_given), None):
            raise InputError(f"--merge does not take {option}", fix=_MERGE)
        from quantcli.convert import merge as merging
        from quantcli.convert.destination import destination_of

        parts = [Path(folder) for folder in folders]
        signer, place = signer_of(sign), destination_of(out)
        merge_job = merging.plan_merge(
            parts, place, workers=workers, fresh=fresh, force=force, signer=signer
        )
        output.message(f"joining {count(parts, 'part')} as {out}")
        convert(
            output,
            plan,
            show=lambda: show_merge(output, merge_job),
            run=lambda progress: merging.merge(merge_job, progress),
            report=lambda _: merging.to_json(merge_job),
            closing=("", "; the parts are still there"),
        )
        _show_next(output, plan, following.after_merge(out))
        return
    if target is None:
        raise InputError("option --target is missing", fix=f"{_PACK}, or {_MERGE}")
    if len(folders) > 1:
        what = "`quantcli pack` takes one checkpoint"
        raise InputError(what, where=folders[1], fix=f"{_PACK}, or {_MERGE}")
    from quantcli.cli.progress import watch
    from quantcli.commands import pack as packing

    with watch(output) as planning:
        job = packing.plan_pack(
            folders[0],
            target,
            out,
            overrides=set_ or (),
            options=JobOptions(
                workers, fresh, force, checksum, signer=signer_of(sign), hash_model=hash_model
            ),
            progress=planning,
        )
    modules = count(sum(line.modules for line in job.plan.lines), "module")
    convert(
        output,
        plan,
        show=lambda: show_pack(output, job),
        run=lambda progress: packing.pack(job, progress),
        report=lambda _: packing.to_json(job),
        closing=("", f"; {modules} read back with the same codes and scales"),
    )
    _show_next(output, plan, following.after_pack(job, folders[0]))


def _show_next(out: Output, plan: bool, steps: list[following.Step]) -> None:
    """Show the steps after a conversion; after its plan, the conversion."""
    following.show(out, *([following.typed(out, without="--plan")] if plan else steps))


def show_merge(out: Output, job: Merge) -> None:
    """Print the parts, and the checkpoint that they become."""
    rows = []
    shards = job.parts[0].whole["shards"]
    for part in job.parts:
        weights = sum(name in shards for name in part.files)
        nbytes = sum(entry["bytes"] for entry in part.files.values())
        others = len(part.files) - weights
        rows.append([str(part.part), str(part.path), f"{weights}", f"{others}", decimal(nbytes)])
    columns = ["part", "folder", "shards", "other files", "size"]
    out.table(columns, rows, {*columns[2:]})
    out.line()
    how = "linked, which takes no space" if job.linked else "copied"
    out.line(f"weights      {count(shards, 'shard')}, {how}")
    out.line(f"output       {job.out}, {decimal(job.nbytes)}")


def show_pack(out: Output, job: Job[Repacking]) -> None:
    """Print the plan: the modules before and after, the cost."""
    plan = job.plan
    rows = []
    for line in plan.lines:
        sizes = decimal(line.nbytes_before), decimal(line.nbytes_after)
        rows.append([line.before, line.label, f"{line.modules}", *sizes])
    columns = [plan.origin.name, plan.target.name, "modules", "before", "after"]
    out.table(columns, rows, {"modules", "before", "after"})
    out.line()
    before, after = decimal(plan.checkpoint.nbytes), decimal(plan.weight_nbytes)
    out.line(f"weights      {before} -> {after} in {count(plan.shards, 'shard')}; no number is rounded")
    out.line(f"copied       {count(plan.floats, 'tensor')}, byte for byte")
    for loads_on in dict.fromkeys(f"{line.label}: {line.loads_on}" for line in plan.lines):
        out.line(f"loads on     {loads_on}")
    show_job(out, job)
