"""A shard or a chunk as a task: a node reads the source, and writes to where the checkpoint goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3

from quantcli.convert.destination import Entry, ShardSink
from quantcli.convert.queue import Chunk
from quantcli.convert.shards import ShardRun
from quantcli.convert.spread.chunks import ChunkSink, Finish, finish_shard
from quantcli.convert.together import write_together
from quantcli.core.errors import MachineError
from quantcli.core.events import Progress
from quantcli.core.kernels.machine import announced
from quantcli.core.threads import thread_pool
from quantcli.planning.plan import Shard
from quantcli.targets.base import Target

_MOST_HEADER = 16 * 2**20  # bytes


@dataclass(frozen=True)
class Common:
    """What all tasks of a run share.

    sources: the files that are read: size and digest of the header, by path.
    """

    target: Target
    sink: ShardSink
    workers: int
    checksum: bool
    block_elements: int | None
    sources: Mapping[Path, tuple[int, str]]


class Within(Progress):
    """The progress of a task within that of its run, which alone counts shards."""

    def __init__(self, outer: Progress) -> None:
        self._outer = outer
        self.detailed = outer.detailed

    def say(self, text: str) -> None:
        """A message."""
        self._outer.say(text)

    def detail(self, text: str) -> None:
        """A detail."""
        self._outer.detail(text)

    def advance(self, nbytes: int) -> None:
        """Bytes that were read."""
        self._outer.advance(nbytes)


@dataclass
class _Kept:
    """The draft of a task: the driver has the real one."""

    sink: ShardSink
    done = 0
    place = ""
    entries: dict[str, Entry] = field(default_factory=dict)

    def reuse(self, name: str, nbytes: int, *, checksum: bool) -> None:
        """Nothing: the driver has looked."""

    def record(self, name: str, entry: Entry) -> None:
        """Keep the entry for the driver."""
        self.entries[name] = entry


@dataclass(frozen=True)
class InChunks:
    """A chunk to write. folder: its shard's."""

    chunk: Chunk
    folder: Path


Request: TypeAlias = Shard | InChunks | Finish


def write(common: Common, request: Request, progress: Progress) -> Entry:
    """Do a part of a conversion. Returns the entry of a shard that is whole; of a chunk, its edges."""
    check_sources(common.sources)
    if isinstance(request, Finish):
        return finish_shard(request, checksum=common.checksum)
    if isinstance(request, InChunks):
        return _written(common, request.chunk, ChunkSink(request.folder), progress)
    with common.sink.attempt(request.file) as sink:
        return _written(common, request, sink, progress)


def _written(common: Common, shard: Shard, sink: ShardSink, progress: Progress) -> Entry:
    kept = _Kept(sink)
    within = Within(progress)
    run = ShardRun(common.target, kept, within, common.checksum, common.block_elements)
    with thread_pool(common.workers) as pool, announced(progress.say):
        (error,) = write_together([(run, [shard])], (), pool, common.workers, within)
    if error is not None:
        raise error
    return kept.entries[shard.file]


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
