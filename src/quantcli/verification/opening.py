"""Opens a checkpoint to verify: damage becomes a finding and does not end the command."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint, scan_checkpoint
from quantcli.checkpoint.files import INDEX, MANIFEST, PART
from quantcli.checkpoint.manifest import read_manifest
from quantcli.core.errors import InputError, QuantError
from quantcli.core.findings import Finding, failed, noted, of_error
from quantcli.verification.outcome import COPY

_PART = re.compile(r"\d{5,}(?=-of-\d{5,}\.safetensors$)")


@dataclass(frozen=True)
class Opened:
    """A checkpoint as far as it could be read, and findings from opening it.

    whole: no weight file is missing.
    """

    checkpoint: Checkpoint | None
    manifest: dict[str, Any] | None
    findings: tuple[Finding, ...]
    whole: bool = True


def open_for_verification(path: Path) -> Opened:
    """Read headers, index, config and manifest of `path`.

    Raises InputError if there is no checkpoint: no such directory, no weights in it, or a part of a
    conversion.
    """
    try:
        checkpoint = scan_checkpoint(path)
    except InputError as error:
        none = not path.is_dir() or not any(path.glob("*.safetensors"))
        if none or (path / PART).is_file():
            raise
        return Opened(None, None, (of_error(_check_of(error), error),))
    findings = [*_problems(checkpoint.problems)]
    findings += [noted("files", note) for note in checkpoint.notes if "stale" not in note]
    manifest = None
    if (checkpoint.path / MANIFEST).is_file():
        try:
            manifest = read_manifest(checkpoint.path)
            findings += _manifest(checkpoint, manifest["files"])
        except InputError as error:
            findings.append(of_error("manifest", error))
    else:
        what = f"there is no {MANIFEST}: sizes and hashes of files are not known"
        findings.append(noted("manifest", what))
    forgotten = list(_forgotten(checkpoint))
    missing = any(problem.what.startswith("shard ") for problem in checkpoint.problems)
    return Opened(checkpoint, manifest, (*findings, *forgotten), not missing and not forgotten)


def _forgotten(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weight files that belong to the others by their names, but that the index does not list."""
    sets = {_PART.sub("", shard) for shard in checkpoint.shards if _PART.search(shard)}
    for name in sorted(checkpoint.left_out):
        if _PART.search(name) and _PART.sub("", name) in sets:
            what = f"does not list `{name}`, though its name makes it one of the others"
            yield failed("index", what, INDEX, COPY)


def _problems(problems: Iterable[QuantError]) -> Iterator[Finding]:
    """A finding for each problem, but one for all of a kind in the index: they have one cause."""
    kinds: dict[str, list[QuantError]] = defaultdict(list)
    for problem in problems:
        shape = re.sub(r"`[^`]*`", "", problem.what)
        kinds[shape if problem.where == INDEX else problem.what].append(problem)
    for first, *more in kinds.values():
        finding = of_error(_check_of(first), first)
        more_text = f"; {len(more)} more like it" if more else ""
        yield replace(finding, what=finding.what + more_text)


def _check_of(error: QuantError) -> str:
    if CONFIG in error.what or (error.where or "").endswith(CONFIG):
        return "config"
    index = "index" in error.what or INDEX in (error.where or "") or "shard" in error.what
    return "index" if index else "headers"


def _manifest(checkpoint: Checkpoint, files: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Findings for listed files that are missing or have another size, and for files not listed."""
    for name, entry in files.items():
        path = checkpoint.path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            what = f"names a file outside of the checkpoint: {name!r:.80}"
            yield failed("manifest", what, MANIFEST, COPY)
        elif not path.is_file():
            yield failed("manifest", f"file `{name}` is missing", MANIFEST, COPY)
        elif (size := path.stat().st_size) != entry.get("bytes"):
            what = f"file has {size} bytes; the manifest says {entry.get('bytes')}"
            yield failed("manifest", what, name, COPY)
    present = {*checkpoint.shards, *checkpoint.aux, *checkpoint.left_out, INDEX}
    for name in sorted(present - files.keys() - {MANIFEST}):
        if name in checkpoint.shards:
            what = "weight file is not in the manifest: its content cannot be checked"
            yield failed("manifest", what, name, COPY)
        elif (checkpoint.path / name).is_file():
            yield noted("manifest", "file is not in the manifest: it was added later", where=name)
