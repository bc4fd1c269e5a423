"""A checkpoint that is to be verified: opened so that damage is a finding and not the end."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint, scan_checkpoint
from quantcli.checkpoint.files import INDEX, MANIFEST, PART, has_byte_order_mark
from quantcli.checkpoint.manifest import read_manifest
from quantcli.core.errors import InputError, QuantError
from quantcli.core.findings import Finding, failed, noted, of_error


@dataclass(frozen=True)
class Opened:
    """A checkpoint as far as it could be read, and what opening it has found.

    whole: no weight file is missing, so that what is not there is nowhere.
    """

    checkpoint: Checkpoint | None
    manifest: dict[str, Any] | None
    findings: tuple[Finding, ...]
    whole: bool = True


def open_for_verification(path: Path) -> Opened:
    """Read headers, index, config and manifest of `path`.

    Raises InputError where there is no checkpoint at all: no such directory, no weights in it, or a
    part of a conversion.
    """
    findings: list[Finding] = []
    try:
        checkpoint = scan_checkpoint(path)
    except InputError as error:
        none = not path.is_dir() or not any(path.glob("*.safetensors"))
        if none or (path / PART).is_file():
            raise
        return Opened(None, None, (of_error(_check_of(error), error),))
    findings += _problems(checkpoint.problems)
    for name, check in _ENGINE_READS.items():
        if has_byte_order_mark(checkpoint.path / name):
            what, fix = "begins with a byte order mark, at which engines stop", "save it without"
            findings.append(failed(check, what, name, fix))
    findings += [noted("files", note) for note in checkpoint.notes if "stale" not in note]
    manifest = None
    if (checkpoint.path / MANIFEST).is_file():
        try:
            manifest = read_manifest(checkpoint.path)
            findings += _manifest(checkpoint, manifest)
        except InputError as error:
            findings.append(of_error("manifest", error))
            manifest = None
    else:
        findings.append(
            noted("manifest", f"there is no {MANIFEST}: sizes and hashes of files are not known")
        )
    forgotten = list(_forgotten(checkpoint))
    missing = any(problem.what.startswith("shard ") for problem in checkpoint.problems)
    return Opened(checkpoint, manifest, (*findings, *forgotten), not missing and not forgotten)


def _forgotten(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weight files that belong to the others by their names, and that the index does not list."""
    sets = {_PART.sub("", shard) for shard in checkpoint.shards if _PART.search(shard)}
    for name in sorted(checkpoint.left_out):
        if _PART.search(name) and _PART.sub("", name) in sets:
            what = f"does not list `{name}`, though its name makes it one of the others"
            yield failed("index", what, INDEX, _AGAIN)


def _problems(problems: Iterable[QuantError]) -> Iterator[Finding]:
    """Each problem; what is wrong with the index once for each kind, as one cause has many tensors."""
    kinds: dict[str, list[QuantError]] = defaultdict(list)
    for problem in problems:
        shape = re.sub(r"`[^`]*`", "", problem.what)
        kinds[shape if problem.where == INDEX else problem.what].append(problem)
    for first, *more in kinds.values():
        found = of_error(_check_of(first), first)
        what = f"{found.what}; {len(more)} more like it" if more else found.what
        yield replace(found, what=what)


def _check_of(error: QuantError) -> str:
    if CONFIG in error.what or (error.where or "").endswith(CONFIG):
        return "config"
    index = "index" in error.what or INDEX in (error.where or "") or "shard" in error.what
    return "index" if index else "headers"


def _manifest(checkpoint: Checkpoint, manifest: dict[str, Any]) -> Iterator[Finding]:
    """Every listed file is there with its size, and every file is listed."""
    files = manifest["files"]
    for name, entry in files.items():
        path = checkpoint.path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            what = f"names a file outside of the checkpoint: {name!r:.80}"
            yield failed("manifest", what, MANIFEST, _AGAIN)
        elif not path.is_file():
            yield failed("manifest", f"file `{name}` is missing", where=MANIFEST, fix=_AGAIN)
        elif path.stat().st_size != entry.get("bytes"):
            yield failed(
                "manifest",
                f"file has {path.stat().st_size} bytes; the manifest says {entry.get('bytes')}",
                where=name,
                fix=_AGAIN,
            )
    present = {*checkpoint.shards, *checkpoint.aux, *checkpoint.left_out, INDEX}
    for name in sorted(present - files.keys() - {MANIFEST}):
        if name in checkpoint.shards:
            what = "weight file is not in the manifest, so that nothing vouches for it"
            yield failed("manifest", what, name, _AGAIN)
        elif (checkpoint.path / name).is_file():
            yield noted("manifest", "file is not in the manifest: it came later", where=name)


_ENGINE_READS = {CONFIG: "config", INDEX: "index", "quant_model_description.json": "description"}
_PART = re.compile(r"\d{5,}(?=-of-\d{5,}\.safetensors$)")
_AGAIN = "copy the checkpoint again, or convert it again"
