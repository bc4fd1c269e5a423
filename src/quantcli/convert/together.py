"""The shards of several plans of one model, written side by side, so that the source is read once."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from quantcli.checkpoint.tensors import reading_through
from quantcli.convert.blocks import BLOCK, SharedBlocks
from quantcli.convert.queue import JobQueue, Task, buffer_count
from quantcli.convert.shards import ShardRun, memory_estimate
from quantcli.core.errors import QuantError
from quantcli.core.events import Progress
from quantcli.core.extents import EXTENT
from quantcli.core.memory.shortage import is_out_of_memory, shortage
from quantcli.core.text import count, size
from quantcli.planning.block import JOB_BYTES, Surveys
from quantcli.planning.plan import Item, Shard, Work


def begin_together(work: Sequence[tuple[ShardRun, Sequence[Shard]]], progress: Progress) -> None:
    """Find what earlier runs have left of the shards of each run, and say what is to be done."""
    runs = [run for run, _ in work]
    if len(runs) > 1:
        for run in runs:
            run.keeps = partial(_keeps, runs, progress)
    for run, shards in work:
        run.count = len(shards)
    for run in runs[:1]:
        run.keeps()
    nbytes = sum(run.find(shards) for run, shards in work)
    progress.begin(nbytes, sum(len(run.missing) for run in runs))


def _keeps(runs: Sequence[ShardRun], progress: Progress) -> None:
    """Say what is there if several runs end now."""
    done, of = sum(run.done for run in runs), sum(run.count for run in runs)
    progress.keeps(f"{done} of {count(of, 'shard')} of {len(runs)} checkpoints")


def write_together(
    work: Sequence[tuple[ShardRun, Sequence[Shard]]],
    source: Collection[Path],
    pool: ThreadPoolExecutor,
    workers: int,
    progress: Progress,
) -> list[QuantError | None]:
    """Write the shards of each run that are not there yet. Gives the first error of each run.

    source: the files of the model, which all plans read. Each worker takes the next job of the plan
    that is least far in them. A few shards of a plan are under way at a time: no worker waits for the
    last job of a shard.
    """
    begin_together(work, progress)
    together = _Together([run for run, _ in work], source, workers)
    try:
        for worker in [pool.submit(together.serve) for _ in range(workers)]:
            worker.result()
    except BaseException:
        together.stop()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        together.close()
    if together.blocks is not None:
        fetched = size(together.blocks.fetched)
        progress.detail(f"{fetched} of the model were read for {len(work)} checkpoints")
    return together.errors()


class _Together:
    """What threads share while they write the shards of several plans."""

    def __init__(self, runs: Sequence[ShardRun], source: Collection[Path], workers: int) -> None:
        self._runs = runs
        self._busy = [run for run in runs if run.missing]
        self._lock = threading.Lock()
        self._surveys = Surveys()
        self.stopped = threading.Event()
        plans = len(self._busy)
        items = (item for run in self._busy for shard in run.missing for item in shard.items)
        limit = shared_nbytes(workers, plans, items) if plans > 1 else 0
        self.blocks = SharedBlocks(source, limit) if plans > 1 else None
        share = -(-workers // max(1, plans))
        self._queues: dict[ShardRun, JobQueue] = {run: run.queue(share) for run in self._busy}

    def serve(self) -> None:
        """Do jobs until none is left."""
        with reading_through(self.blocks):
            while not self.stopped.is_set() and (taken := self._take()) is not None:
                run, task = taken
                queue = self._queues[run]
                try:
                    run.work(queue, task, self._surveys, self.stopped)
                except BaseException as error:
                    queue.fail(task, _explained(error, task))
                finally:
                    queue.let_go()

    def _take(self) -> tuple[ShardRun, Task] | None:
        """The next job of the plan that is least far in the source; None if there is none left."""
        while True:
            with self._lock:
                for run in sorted(self._busy, key=lambda each: self._queues[each].position):
                    if (task := self._queues[run].take(wait=False)) is not None:
                        return run, task
                    if self._queues[run].is_over:
                        self._busy.remove(run)
                if not self._busy:
                    return None
                waiting = self._busy[0]  # all that is left waits until a shard is complete
            if (task := self._queues[waiting].take()) is not None:
                return waiting, task

    def errors(self) -> list[QuantError | None]:
        """The first error of each run. Raises one that is a bug."""
        errors: list[QuantError | None] = []
        for run in self._runs:
            error = self._queues[run].error if run in self._queues else None
            if error is not None and not isinstance(error, QuantError):
                raise error
            errors.append(error)
        return errors

    def stop(self) -> None:
        """Hand out no further job, and give up those that are under way."""
        self.stopped.set()
        for queue in self._queues.values():
            queue.stop()

    def close(self) -> None:
        """Close the shards that are still under way. No worker may be at one."""
        for queue in self._queues.values():
            queue.close()


def _explained(error: BaseException, task: Task) -> BaseException:
    """An error of a job; one for want of memory names the tensor."""
    if task.job is None or isinstance(error, QuantError) or not is_out_of_memory(error):
        return error
    return shortage(error, "a row block", f"`{task.job.item.source.spec.name}`")


def shared_nbytes(workers: int, plans: int, items: Iterable[Item]) -> int:
    """Bytes of blocks that plans share: of the jobs that are under way or next.

    items: of the plans. If a reader of one keeps more than a job has otherwise, so has its job.
    """
    most = max((item.source.buffer_nbytes for item in items), default=0)
    return (workers + plans + 2) * max(JOB_BYTES, BLOCK, most)


def memory_together(plans: Sequence[Work], workers: int) -> int:
    """Peak bytes above a bare torch import if these plans are carried out side by side: what the
    hungriest takes, the blocks that they share, and extents of each."""
    estimates = [memory_estimate(plan, workers) for plan in plans]
    if len(plans) < 2:
        return sum(estimates)
    share = -(-workers // len(plans))
    extents = len(plans) * buffer_count(share) - buffer_count(workers)
    objects = sum(sum(len(shard.tensors) for shard in plan.shards) for plan in plans) * 1500
    items = (item for plan in plans for item in plan.items)
    shared = shared_nbytes(workers, len(plans), items)
    return max(estimates) + shared + extents * EXTENT + objects
