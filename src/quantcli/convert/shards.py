"""The shards of a run: read a row block, quantize it, pack it, write it; several shards under way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from quantcli.checkpoint.tensors import tensor_bytes
from quantcli.checkpoint.writer import TensorWriter
from quantcli.convert.destination import Draft, Entry
from quantcli.convert.queue import JobQueue, OpenShard, Task, buffer_count, read_ahead
from quantcli.core.events import Progress
from quantcli.core.extents import EXTENT
from quantcli.core.kernels.machine import available
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
from quantcli.targets.layouts import Output

if TYPE_CHECKING:
    from quantcli.convert.execute import RunOptions

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


class ShardRun:
    """The shards of one plan: those that are there, and a queue of the jobs of those that are not.

    label: before the names of its files in messages.
    """

    def __init__(
        self,
        plan: Work,
        shards: Sequence[Shard],
        draft: Draft,
        progress: Progress,
        options: RunOptions,
        label: str = "",
    ) -> None:
        self.plan = plan
        self.shards = shards
        self.draft = draft
        self.progress = progress
        self.options = options
        self.label = label
        self.files: dict[str, Entry] = {}
        self.reused = 0
        self.missing: list[Shard] = []

    def find(self) -> int:
        """Take over what an earlier run finished; `missing` is the rest. Returns bytes of the source
        that are still to be read."""
        self.missing = [shard for shard in self.shards if not self._reuse(shard)]
        return sum(item.source.nbytes for shard in self.missing for item in shard.items)

    def open(self, workers: int) -> JobQueue:
        """The queue of the jobs of missing shards. workers: those that serve this plan, on average."""
        begins, begin = {}, 0
        for shard in self.shards:
            begins[shard.file] = begin
            begin += sum(item.source.nbytes for item in shard.items)
        checksum = self.options.checksum
        return JobQueue(self.missing, self.draft.sink, workers, checksum=checksum, begins=begins)

    def work(self, queue: JobQueue, task: Task, surveys: Surveys, stop: threading.Event) -> bool:
        """Do a job. Whether it completed a shard."""
        open_shard, job = task.shard, task.job
        if job is not None:
            for later in task.later:
                read_ahead(later)
            calibrated = read_calibrated(job.item, surveys)
            columns = _Columns(job)
            for rows in compute(job, self.plan.target, calibrated, self.options.block_elements):
                if stop.is_set() or queue.is_in_vain(task):
                    return False
                _write(rows, open_shard.writer, columns)
                self.progress.advance(rows.nbytes)
                del rows  # its memory is that of the next block
            columns.write(open_shard.writer)
        # whoever does the last job of a shard finishes it at once
        if not queue.done(task) or stop.is_set():
            return False
        self._finish(open_shard)
        queue.finished(open_shard)
        return True

    def _finish(self, open_shard: OpenShard) -> None:
        writer, file = open_shard.writer, open_shard.shard.file
        entry = writer.finish()
        self.draft.record(file, entry)
        self.files[file] = entry
        self.progress.shard(self.label + file, writer.nbytes, reused=False)

    def _reuse(self, shard: Shard) -> bool:
        """Whether an earlier run finished this shard and it has not changed since."""
        entry = self.draft.reuse(shard.file, shard.nbytes, checksum=self.options.checksum)
        if entry is None:
            return False
        if isinstance(entry, str):
            self.progress.detail(f"{self.label}{shard.file} is written again: {entry}")
            return False
        self.files[shard.file] = entry
        self.reused += 1
        self.progress.shard(self.label + shard.file, shard.nbytes, reused=True)
        return True
