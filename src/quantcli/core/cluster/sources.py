"""Whether all nodes see the files that they are to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from quantcli.core.errors import MachineError
from quantcli.core.events import Progress

_MOST_HEADER = 16 * 2**20  # bytes


def see_sources(common: Mapping[Path, tuple[int, str]], node: Any, progress: Progress) -> None:
    """Check the files of the source on a node."""
    check_sources(common)


_seen: list[Mapping[Path, tuple[int, str]]] = []  # sources that this process has checked


def check_sources(sources: Mapping[Path, tuple[int, str]]) -> None:
    """MachineError if a file is not here, or is another one than the driver has."""
    if any(sources is seen for seen in _seen):
        return
    from quantcli.core.cluster.worker import node_address

    for file, expected in sources.items():
        try:
            problem = "is another one" if identity(file) != expected else ""
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            raise MachineError(
                f"a file of the source {problem} on a node of the cluster",
                where=f"{file} on node {node_address()}",
                fix="give a model in a folder that all nodes share, or a URL such as s3://",
            )
    _seen[:] = [sources]


def identity(file: Path) -> tuple[int, str]:
    """Size of a safetensors file, and a digest of its header."""
    with file.open("rb") as stream:
        length = stream.read(8)
        header = stream.read(min(int.from_bytes(length, "little"), _MOST_HEADER))
    return file.stat().st_size, blake3(length + header).hexdigest()


def identities(files: Iterable[Path]) -> dict[Path, tuple[int, str]]:
    """The identity of each file."""
    return {file: identity(file) for file in files}
