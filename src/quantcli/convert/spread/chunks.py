"""Shards that several nodes write at a time, in a folder that they share.

A chunk is a run of a shard's jobs. What it makes goes to its place in one file by whole extents: no two
nodes write to the same page, which some network file systems do not keep together. The bytes at the
edges of chunks go to small files, and a last task puts them in their places, hashes the file and gives
it its name.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import secrets
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.checkpoint.writer import TensorWriter
from quantcli.convert.destination import Entry, ShardSink
from quantcli.convert.folder import attempt_folder
from quantcli.convert.queue import Chunk, ordered_jobs
from quantcli.core.disk import Hashes, disk_errors, file_entry, sync_folder
from quantcli.core.extents import EXTENT, Buffers
from quantcli.planning.block import Job
from quantcli.planning.plan import Shard

LEAST = 256 * 2**20  # bytes of source in a chunk: less would not be worth its task


def chunk_counts(shards: Sequence[Shard], slots: int) -> list[int]:
    """The number of chunks of each shard, if so many tasks run at a time. One: it stays whole.

    The file of chunks is read again for its hash. Where links and disks set the pace, that takes longer
    than a last round of tasks in which some nodes have nothing to do: see benchmarks/cluster.py. So
    shards are cut only if each can have two tasks or more.
    """
    if slots < 2 * len(shards):
        return [1] * len(shards)
    sizes = [shard.source_nbytes for shard in shards]
    size = max(LEAST, math.ceil(sum(sizes) / slots))
    whole = (bool(shard.by_columns) for shard in shards)  # their bytes lie all over the shard
    return [
        1 if is_whole else max(1, round(n / size)) for n, is_whole in zip(sizes, whole, strict=True)
    ]


def chunks_of(shard: Shard, count: int) -> list[Chunk]:
    """A shard in chunks of about the same work; fewer than `count` if it has fewer jobs."""
    jobs = ordered_jobs(shard)
    ends = list(accumulate(job.nbytes for job in jobs))
    cuts = [0]
    for number in range(1, count):
        target = ends[-1] * number // count
        cut = next(index for index, end in enumerate(ends) if end > target)
        cuts.append(max(cut, cuts[-1]))
    cuts.append(len(jobs))
    return [_chunk(shard, jobs, begin, end) for begin, end in pairwise(cuts) if begin < end]


def _chunk(shard: Shard, jobs: list[Job], begin: int, end: int) -> Chunk:
    """Jobs [begin, end) of a shard, with the items that they need."""
    ids = {id(job.item) for job in jobs[begin:end]}
    items = tuple(item for item in shard.items if id(item) in ids)
    before = next(index for index, job in enumerate(jobs) if job.item is jobs[begin].item)
    return Chunk(shard.file, shard.tensors, items, begin - before, end - before)


@dataclass(frozen=True)
class Edges:
    """What a chunk leaves for the last task: bytes in a file, with their places in the shard.

    nbytes: that the chunk has made, these among them.
    """

    file: str
    places: tuple[tuple[int, int], ...]  # position, bytes
    nbytes: int


@dataclass(frozen=True)
class Finish:
    """The last task of a shard. folder: where its file and those of its edges are."""

    file: str
    folder: Path
    header: bytes
    nbytes: int
    edges: tuple[Edges, ...]


@dataclass(frozen=True)
class ChunkSink(ShardSink):
    """Writes chunks of one shard. folder: its own, with the file."""

    folder: Path
    most_shards = 1

    def extents(self, shards: Sequence[Shard]) -> int:
        """None: memory is taken as it is needed."""
        return 0

    def writer(self, shard: Shard, buffers: Buffers, *, checksum: bool) -> ChunkWriter:
        """A writer of a chunk; its entry has what is left at the edges."""
        return ChunkWriter(self.folder, shard)


class ChunkWriter(TensorWriter):
    """Writes the tensors of a chunk into the file of its shard."""

    _file: ChunkFile

    def __init__(self, folder: Path, shard: Shard) -> None:
        super().__init__(shard.tensors, checksum=False)
        self._edges = folder / f"edges.{secrets.token_hex(4)}"
        self._file = ChunkFile(folder / shard.file)

    def finish(self) -> dict[str, Any]:
        """Make it durable. Returns its edges."""
        return {"bytes": self.nbytes, "edges": self._file.finish(self._edges)}

    def abandon(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class _Extent:
    """Bytes of an extent, and which of them are there."""

    memory: memoryview
    missing: int
    spans: list[tuple[int, int]] = field(default_factory=list)


class ChunkFile:
    """A file that exists, into which whole extents are written. Threads may share it.

    An extent at the end of the file that is shorter than others is left to the last task: nothing is
    written past the end, not even by a process that others think dead.
    """

    backlog = 0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._extents: dict[int, _Extent] = {}
        self._free: list[memoryview] = []
        self._put = 0  # bytes
        self._lock = threading.Lock()
        self._fd = _open(path, os.O_WRONLY)

    def put(self, position: int, data: bytes | memoryview) -> None:
        """Put bytes at a position."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        start = 0
        while start < len(view):
            number, offset = divmod(position + start, EXTENT)
            size = min(len(view) - start, EXTENT - offset)
            self._fill(number, offset, view[start : start + size])
            start += size

    def put_runs(self, position: int, data: memoryview, run: int, step: int) -> None:
        """Put runs of `run` bytes at positions `step` apart."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), max(1, run)):
            self.put(position, view[start : start + run])
            position += step

    def _fill(self, number: int, offset: int, piece: memoryview) -> None:
        with self._lock:
            extent = self._extents.get(number)
            if extent is None:
                memory = self._free.pop() if self._free else memoryview(mmap.mmap(-1, EXTENT))
                extent = self._extents[number] = _Extent(memory, EXTENT)
        # without the GIL
        np.frombuffer(extent.memory, np.uint8)[offset : offset + len(piece)] = np.frombuffer(
            piece, np.uint8
        )
        with self._lock:
            extent.missing -= len(piece)
            extent.spans.append((offset, offset + len(piece)))
            self._put += len(piece)
            whole = extent.missing == 0
            if whole:
                del self._extents[number]
        if whole:
            self._write(number, extent.memory)
            with self._lock:
                self._free.append(extent.memory)

    def _write(self, number: int, memory: memoryview) -> None:
        done = 0
        with disk_errors(self._path):
            while done < EXTENT:
                try:
                    done += os.pwrite(self._fd, memory[done:EXTENT], number * EXTENT + done)
                except OSError as error:
                    flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                    if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                        raise
                    fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def finish(self, edges: Path) -> Edges:
        """Write what is left to a file of its own. All of it is durable then."""
        places = []
        with disk_errors(edges), edges.open("wb") as file:
            for number, extent in sorted(self._extents.items()):
                for begin, end in extent.spans:
                    places.append((number * EXTENT + begin, end - begin))
                    file.write(extent.memory[begin:end])
            file.flush()
            os.fsync(file.fileno())
            os.fsync(self._fd)
        self.close()
        return Edges(edges.name, tuple(places), self._put)

    def close(self) -> None:
        """Close the file. Twice does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: Path, flags: int) -> int:
    """A descriptor of a file, past the page cache if the file system can do that."""
    with disk_errors(path):
        try:
            return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.open(path, flags | os.O_CLOEXEC)


def begin_shard(folder: Path, shard: Shard) -> Path:
    """Make a folder for the chunks of a shard, with its file. Others that are left of it are deleted.

    folder: where the shard goes. Returns the new folder.
    """
    own = attempt_folder(folder, shard.file)
    with disk_errors(own):
        (folder / shard.file).unlink(missing_ok=True)
        with (own / shard.file).open("wb") as file:
            file.truncate(shard.nbytes)
    return own


def finish_shard(finish: Finish, *, checksum: bool) -> Entry:
    """Complete the file of a shard, and give it its name. Returns its entry of the manifest."""
    path, named = finish.folder / finish.file, finish.folder.parent / finish.file
    if not path.exists() and named.exists():  # an attempt that died had done all but report it
        return file_entry(named, checksum=checksum)
    put = len(finish.header) + sum(edges.nbytes for edges in finish.edges)
    assert put == finish.nbytes, (finish.file, put, finish.nbytes)
    with disk_errors(path), path.open("r+b") as file:
        fd = file.fileno()
        _put(fd, finish.header, 0)
        for edges in finish.edges:
            content, start = (finish.folder / edges.file).read_bytes(), 0
            for position, nbytes in edges.places:
                _put(fd, content[start : start + nbytes], position)
                start += nbytes
        os.fsync(fd)
    entry: Entry = {"bytes": finish.nbytes, **(_hashes(path) if checksum else {})}
    with disk_errors(path):
        path.rename(named)
        sync_folder(named.parent)
        shutil.rmtree(finish.folder, ignore_errors=True)
    return entry


def _hashes(path: Path) -> dict[str, str]:
    """The hashes of a file. It was written past the page cache, and is read so: a copy by the kernel
    would cost as much as both hashes."""
    hashes, block = Hashes(), memoryview(mmap.mmap(-1, 2 * EXTENT))
    fd = _open(path, os.O_RDONLY)
    try:
        with disk_errors(path):
            position = 0
            while n := os.preadv(fd, [block], position):
                hashes.update(block[:n])
                position += n
    finally:
        os.close(fd)
    return hashes.hex()


def _put(fd: int, content: bytes, position: int) -> None:
    done = 0
    while done < len(content):  # a write may be short
        done += os.pwrite(fd, content[done:], position + done)
