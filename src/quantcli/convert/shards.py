"""The shards of a run: read a row block, quantize it, pack it, write it; several shards under way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from quantcli.checkpoint.remote.ahead import most_memory
from quantcli.checkpoint.remote.file import RemoteFolder
from quantcli.checkpoint.tensors import tensor_bytes
from quantcli.checkpoint.writer import TensorWriter
from quantcli.convert.destination import Entry, ShardSink
from quantcli.convert.queue import JobQueue, Task, buffer_count, read_ahead
from quantcli.core.events import Progress
from quantcli.core.extents import EXTENT
from quantcli.core.kernels.machine import available
from quantcli.core.text import count
from quantcli.planning.block import (
    BLOCK_ELEMENTS,
    COMPILED,
    Computed,
    Job,
    Surveys,
    compute,
    read_calibrated,
    rows_of_job,
)
from quantcli.planning.plan import Item, Quantize, Repack, Shard, Work
from quantcli.targets.base import Target
from quantcli.targets.layouts import Output

_BASE = 24 * 2**20  # bytes that a nearly empty conversion takes: other imports, the plan
_COMPILER = 52 * 2**20  # bytes of the library that loads kernels


def memory_estimate(plan: Work, workers: int) -> int:
    """Peak bytes above a bare torch import: each worker's row block in its several forms, and the plan.

    Compiled kernels hold a block as stored, and as codes before and after they are packed. In torch a
    block is smaller, and held as stored, as float32 and as codes, with two temporaries while it is
    rounded, and with more while scales are searched for. If rows share a scale, a block has at least
    all of them; only some of their columns are float32 at a time. Outputs with the rows of a weight in
    their columns are held for a whole job.
    """
    widest = max(
        (s.spec.shape[-1] for s in plan.checkpoint.tensors.values() if s.spec.shape), default=1
    )
    block = max(BLOCK_ELEMENTS, widest)
    tallest = max(
        (
            item.row_multiple * item.source.spec.shape[1]
            for shard in plan.shards
            for item in shard.items
            if isinstance(item, Quantize)
        ),
        default=1,
    )
    nbytes = max((stored.buffer_nbytes for stored in plan.checkpoint.tensors.values()), default=0)
    items = (item for shard in plan.shards for item in shard.items)
    searched = any(isinstance(item, Quantize) and item.scheme.searches_scales for item in items)
    compiled = available()
    if compiled:
        nbytes += COMPILED * block * 5
    else:
        nbytes += block * (14 + 60 * searched)
    nbytes += max(0, tallest - block * (COMPILED if compiled else 1)) * 5
    nbytes += max((_columns_nbytes(item) for shard in plan.shards for item in shard.items), default=0)
    tensors = len(plan.checkpoint.on_disk) + sum(len(shard.tensors) for shard in plan.shards)
    shared = _BASE + _COMPILER * compiled + tensors * 1500
    if isinstance(plan.checkpoint.path, RemoteFolder):
        shared += most_memory()
    return workers * nbytes + buffer_count(workers) * EXTENT + shared


def _columns_nbytes(item: Item) -> int:
    """Bytes that a job of an item holds of matrices with the rows of the weight in columns."""
    gathered = sum(output.spec.nbytes for output in item.outputs if output.axis)
    nbytes = gathered * min(rows_of_job(item), item.height) // item.height if gathered else 0
    return nbytes + (item.module.buffer_nbytes if isinstance(item, Repack) else 0)


class _Columns:
    """Columns of the outputs of a job, gathered: those of single blocks are short runs of bytes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._gathered: dict[str, tuple[int, Tensor]] = {}  # by name, with the first column

    def add(self, output: Output, first: int, block: Tensor) -> None:
        """Take columns [h, columns] of an output, from column `first` on."""
        start, stop = output.first(self._job.start), -(-self._job.stop // output.rows)
        if output.spec.name not in self._gathered:
            columns = block.new_empty(len(block), stop - start)
            self._gathered[output.spec.name] = start, columns
        columns = self._gathered[output.spec.name][1]
        columns[:, first - start : first - start + block.shape[1]] = block

    def write(self, writer: TensorWriter) -> None:
        """Write all that was taken."""
        for name, (start, columns) in self._gathered.items():
            writer.write_columns(name, start, tensor_bytes(columns))


def _write(rows: Computed, writer: TensorWriter, columns: _Columns) -> None:
    """Write computed rows, or gather them if they are columns of what is stored."""
    for output, first, tensor in rows.written:
        if output.axis:
            columns.add(output, first, tensor)
        else:
            writer.write(output.spec.name, first * output.spec.row_nbytes, tensor_bytes(tensor))


class Keeper(Protocol):
    """What a run needs of a draft: see `Draft`."""

    sink: ShardSink

    @property
    def done(self) -> int:
        """Number of files that are whole."""

    @property
    def place(self) -> str:
        """Where it is, for messages."""

    def reuse(self, name: str, nbytes: int, *, checksum: bool) -> Entry | str | None:
        """The entry of a file of an earlier run; why it cannot be used; None if there is none."""

    def record(self, name: str, entry: Entry) -> None:
        """Note that a file is whole."""


class ShardRun:
    """The shards of one plan: those that are there, and the jobs of those that are not.

    label: before the names of its files in messages.
    """

    def __init__(
        self,
        target: Target,
        draft: Keeper,
        progress: Progress,
        checksum: bool,
        block_elements: int | None,
        label: str = "",
    ) -> None:
        self.target = target
        self.draft = draft
        self.progress = progress
        self.checksum = checksum
        self.block_elements = block_elements
        self.label = label
        self.files: dict[str, Entry] = {}
        self.missing: list[Shard] = []
        self.reused = self.count = 0
        self.keeps = self._keeps  # says what is there if the run ends now
        self._begins: dict[str, int] = {}

    def find(self, shards: Sequence[Shard]) -> int:
        """Begin with those of its shards that an earlier run finished; `missing` are the others.
        Returns the bytes of the source that are still to be read."""
        self.count, begin = len(shards), 0
        for shard in shards:
            self._begins[shard.file] = begin
            begin += shard.source_nbytes
        self.missing = [shard for shard in shards if not self._reuse(shard)]
        return sum(shard.source_nbytes for shard in self.missing)

    @property
    def done(self) -> int:
        """Number of shards that are whole."""
        return len(self.files) or self.draft.done

    def finished(self, file: str, entry: Entry) -> None:
        """A shard is whole: note it."""
        self.draft.record(file, entry)
        self.files[file] = entry
        self.keeps()
        self.progress.shard(self.label + file, entry["bytes"], reused=False)

    def _keeps(self) -> None:
        self.progress.keeps(f"{self.done} of {count(self.count, 'shard')} in {self.draft.place}")

    def queue(self, workers: int) -> JobQueue:
        """The jobs of missing shards. workers: those that are at this plan at a time, on average."""
        sink, checksum = self.draft.sink, self.checksum
        return JobQueue(self.missing, sink, workers, checksum=checksum, begins=self._begins)

    def work(self, queue: JobQueue, task: Task, surveys: Surveys, stop: threading.Event) -> None:
        """Do a job, unless `stop` is set."""
        open_shard, job = task.shard, task.job
        if job is not None:
            for later in task.later:
                read_ahead(later)
            calibrated = read_calibrated(job.item, surveys)
            columns = _Columns(job)
            for rows in compute(job, self.target, calibrated, self.block_elements):
                if stop.is_set() or queue.is_in_vain(task):
                    return
                _write(rows, open_shard.writer, columns)
                self.progress.advance(rows.nbytes)
                del rows  # its memory is that of the next block
            columns.write(open_shard.writer)
        # whoever does the last job of a shard finishes it at once
        if queue.done(task) and not stop.is_set():
            self.finished(open_shard.shard.file, open_shard.writer.finish())
            queue.finished(open_shard)

    def _reuse(self, shard: Shard) -> bool:
        """Whether an earlier run finished this shard and it has not changed since."""
        entry = self.draft.reuse(shard.file, shard.nbytes, checksum=self.checksum)
        if entry is None:
            return False
        if isinstance(entry, str):
            self.progress.detail(f"{self.label}{shard.file} is written again: {entry}")
            return False
        self.files[shard.file] = entry
        self.reused += 1
        self.progress.shard(self.label + shard.file, shard.nbytes, reused=True)
        return True
