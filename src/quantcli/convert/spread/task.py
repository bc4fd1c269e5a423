"""A shard or a chunk as a task: a node reads the source, and writes to where the checkpoint goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from quantcli.convert.destination import Entry, ShardSink
from quantcli.convert.queue import Chunk
from quantcli.convert.shards import ShardRun
from quantcli.convert.spread.chunks import ChunkSink, Finish, finish_shard
from quantcli.convert.together import write_together
from quantcli.core.cluster.sources import check_sources
from quantcli.core.events import Inner, Progress
from quantcli.core.kernels.machine import announced
from quantcli.core.threads import thread_pool
from quantcli.planning.plan import Shard
from quantcli.targets.base import Target


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


class Within(Inner):
    """The progress of a task within that of its run, which alone counts shards."""

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
