"""A checkpoint that is to be verified: opened so that damage is a finding and not the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.checkpoint import CONFIG, Checkpoint, scan_checkpoint
from quantcli.errors import InputError, QuantError
from quantcli.findings import Finding, failed, noted, of_error
from quantcli.folder import INDEX
from quantcli.journal import MANIFEST
from quantcli.manifest import read_manifest


@dataclass(frozen=True)
class Opened:
    """A checkpoint as far as it could be read, and what opening it has found."""

    checkpoint: Checkpoint | None
    manifest: dict[str, Any] | None
    findings: tuple[Finding, ...]


def open_for_verification(path: Path) -> Opened:
    """Read headers, index, config and manifest of `path`.

    Raises InputError where there is no checkpoint at all: no such directory, or no weights in it.
    """
    findings: list[Finding] = []
    try:
        checkpoint = scan_checkpoint(path)
    except InputError as error:
        if not path.is_dir() or not any(path.glob("*.safetensors")):
            raise
        return Opened(None, None, (of_error(_check_of(error), error),))
    findings += [of_error(_check_of(problem), problem) for problem in checkpoint.problems]
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
    return Opened(checkpoint, manifest, tuple(findings))


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
            yield failed(
                "manifest", f"names a file outside of the checkpoint: {name!r}", where=MANIFEST
            )
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
        if (checkpoint.path / name).is_file():
            yield noted("manifest", "file is not in the manifest: it came later", where=name)


_AGAIN = "copy the checkpoint again, or convert it again"
