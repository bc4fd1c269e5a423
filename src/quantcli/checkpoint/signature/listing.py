"""The files of a checkpoint as a signature sees them: all of them, and none that is a link."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from quantcli.checkpoint.files import hub_blob
from quantcli.checkpoint.remote.file import RemoteFolder
from quantcli.core.errors import MachineError


def file_names(root: Path) -> Iterator[str]:
    """The names of all files below a folder, and of links to folders, with a slash between parts."""
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in sorted([*files, *links]):
            yield os.path.relpath(Path(folder, name), root)


def _unreadable(error: OSError) -> None:
    raise MachineError(f"cannot read: {error.strerror}", where=str(error.filename)) from None


def why_no_file(root: Path, name: str) -> str | None:
    """Why something is not a file of its own; None if it is one, or a link into the Hub's cache."""
    file = Path(root, name)
    if isinstance(root, RemoteFolder) or (file.is_file() and not file.is_symlink()):
        return None
    if not file.is_symlink():
        return "is not a regular file"
    blob = file.is_file() and hub_blob(file.resolve(), root)
    return None if blob else "is a link, and a signature is over files"
