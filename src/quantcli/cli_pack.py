"""The options of `quantcli pack`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.core.errors import InputError
from quantcli.options import Checksum, Force, Fresh, Json, PlanOnly, Quiet, Workers

if TYPE_CHECKING:
    from quantcli.console import Output

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
    from quantcli import console

    output = console.Output(as_json=as_json, quiet=quiet)
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
    from quantcli import pack_shown, progress
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
        pack_shown.show_pack(output, job)
    if plan:
        if as_json:
            output.document({"ok": True, "plan": packing.account(job)})
        return
    started = time.monotonic()
    with progress.watch(output) as watcher:
        written = packing.pack(job, watcher)
    pack_shown.show_packed(output, job, written, time.monotonic() - started)
    if as_json:
        result = {"ok": True, "out": str(written.out), "bytes": written.nbytes}
        result |= {"shards_reused": written.shards_reused, "files": written.files}
        output.document({**result, "plan": packing.account(job)})


def _merge(
    output: Output,
    folders: list[Path],
    out: Path,
    plan: bool,
    workers: int | None,
    fresh: bool,
    force: bool,
) -> None:
    from quantcli import pack_shown, progress
    from quantcli.convert import merge as merging

    job = merging.prepare_merge(folders, out, workers=workers, fresh=fresh, force=force)
    if not output.as_json and (plan or not output.quiet):
        pack_shown.show_merge(output, job)
    if plan:
        if output.as_json:
            output.document({"ok": True, "plan": merging.account(job)})
        return
    started = time.monotonic()
    with progress.watch(output) as watcher:
        merged = merging.merge(job, watcher)
    pack_shown.show_merged(output, job, merged, time.monotonic() - started)
    if output.as_json:
        result = {
            "ok": True,
            "out": str(merged.out),
            "bytes": job.nbytes,
            "shards_reused": merged.reused,
        }
        output.document({**result, "files": merged.files, "plan": merging.account(job)})
