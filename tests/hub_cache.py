"""Models laid out as the Hub's client lays them out: snapshots of links, blobs, a shared store."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

MARKER = ".huggingface-shared-blobs"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_model(model: Path, hub: Path, *, shared: bool = False) -> Path:
    """Move a model into a cache as `org/name`; returns its snapshot, a folder of links.

    shared: the weights are in the store that all repositories of a cache share, two hops away.
    """
    repository = hub / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for file in [path for path in model.rglob("*") if path.is_file()]:
        digest = hashlib.sha256(file.read_bytes() + bytes(file)).hexdigest()
        blob, link = repository / "blobs" / digest, snapshot / file.relative_to(model)
        if shared and file.suffix == ".safetensors":
            stored = hub / "blobs" / digest[:2] / digest
            stored.parent.mkdir(parents=True, exist_ok=True)
            (hub / "blobs" / MARKER).write_text("1\n")
            file.rename(stored)
            blob.symlink_to(Path("../../blobs", digest[:2], digest))
        else:
            file.rename(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def link_files(snapshot: Path, folder: Path) -> Path:
    """A download into `folder` whose files are links to where the snapshot's links end."""
    for link in [path for path in snapshot.rglob("*") if path.is_file()]:
        place = folder / link.relative_to(snapshot)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(link.resolve())
    return folder
