"""The options of `quantcli pack`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from quantcli.errors import InputError
from quantcli.options import Force, Fresh, Json, PlanOnly, Quiet, Workers


def pack(
    folders: Annotated[list[Path] | None, typer.Argument(help="Parts to merge.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Put the parts of `quantize --part` together.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Output directory.")] = None,
    plan: PlanOnly = False,
    workers: Workers = None,
    fresh: Fresh = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Put the parts of a conversion together: the bytes are those of one run on one machine.

    The model is not needed. Parts stay as they are; on one file system their weight files are linked,
    not copied. The same command again resumes an interrupted run.
    """
    from quantcli import console, merging, pack_shown, progress

    if not folders:
        raise InputError("nothing to pack", fix="quantcli pack --merge OUT.part-* --out OUT")
    if not merge:
        raise InputError("say what to do", fix="quantcli pack --merge OUT.part-* --out OUT")
    if out is None:
        raise InputError("no --out", fix="quantcli pack --merge OUT.part-* --out OUT")
    output = console.Output(as_json=as_json, quiet=quiet)
    job = merging.prepare_merge(folders, out, workers=workers, fresh=fresh, force=force)
    if not as_json and (plan or not quiet):
        pack_shown.show_merge(output, job)
    if plan:
        if as_json:
            output.document({"ok": True, "plan": merging.account(job)})
        return
    started = time.monotonic()
    with progress.watch(output) as watcher:
        merged = merging.merge(job, watcher)
    pack_shown.show_merged(output, job, merged, time.monotonic() - started)
    if as_json:
        result = {
            "ok": True,
            "out": str(merged.out),
            "bytes": job.nbytes,
            "shards_reused": merged.reused,
        }
        output.document({**result, "files": merged.files, "plan": merging.account(job)})
