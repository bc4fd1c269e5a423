"""The shards of several plans of one model, written side by side, so that the source is read once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from quantcli.checkpoint.tensors import reading_through
from quantcli.convert.blocks import BLOCK, SharedBlocks
from quantcli.convert.queue import JobQueue, Task, buffer_count
from quantcli.convert.shards import ShardRun, memory_estimate
from quantcli.core.errors import QuantError
from quantcli.core.events import Progress
from quantcli.core.extents import EXTENT
from quantcli.core.text import count, size
from quantcli.planning.block import JOB_BYTES, Surveys
from quantcli.planning.plan import Work


def write_together(
    runs: Sequence[ShardRun], pool: ThreadPoolExecutor, workers: int, progress: Progress
) -> list[QuantError | None]:
    """Write the shards of each run that are not there yet. Gives the first error of each run.

    Each worker takes the next job of the plan that is least far in the source. A few shards of a plan
    are under way at a time: no worker waits for the last job of a shard.
    """
    together = _Together(runs, workers, progress)
    try:
        for worker in [pool.submit(together.serve) for _ in range(workers)]:
            worker.result()
    except BaseException:
        together.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        together.close()
    return together.errors()


class _Together:
    """What threads share while they write the shards of several plans."""

    def __init__(self, runs: Sequence[ShardRun], workers: int, progress: Progress) -> None:
        self._runs = runs
        self._progress = progress
        self._count = sum(len(run.shards) for run in runs)
        self.stop = threading.Event()
        self._surveys = Surveys()
        self._lock = threading.Lock()
        self._keeps(sum(run.draft.done for run in runs))
        nbytes = [run.find() for run in runs]
        progress.begin(sum(nbytes), sum(len(run.missing) for run in runs))
        self._busy = [run for run in runs if run.missing]
        self._blocks: SharedBlocks | None = None
        if len(self._busy) > 1:
            stored = self._busy[0].plan.checkpoint.on_disk.values()
            limit = shared_nbytes(workers, len(self._busy))
            self._blocks = SharedBlocks({tensor.file for tensor in stored}, limit)
        share = -(-workers // max(1, len(self._busy)))
        self._queues: dict[ShardRun, JobQueue] = {run: run.open(share) for run in self._busy}

    def serve(self) -> None:
        """Do jobs until none is left."""
        with reading_through(self._blocks):
            while not self.stop.is_set() and (taken := self._take()) is not None:
                run, task = taken
                try:
                    if run.work(self._queues[run], task, self._surveys, self.stop):
                        self._keeps(sum(len(each.files) for each in self._runs))
                except BaseException as error:
                    self._queues[run].fail(task, error)

    def _take(self) -> tuple[ShardRun, Task] | None:
        """The next job of the plan that is least far in the source; None if there is none."""
        with self._lock:
            while self._busy:
                run = min(self._busy, key=lambda each: self._queues[each].position)
                task = self._queues[run].take()
                if task is not None:
                    return run, task
                self._busy.remove(run)
        return None

    def _keeps(self, done: int) -> None:
        """What is there if the run ends now."""
        places = [run.draft.place for run in self._runs]
        where = f"in {places[0]}" if len(places) == 1 else f"of {len(places)} checkpoints"
        self._progress.keeps(f"{done} of {count(self._count, 'shard')} {where}")

    def errors(self) -> list[QuantError | None]:
        """The first error of each run. Raises one that is a bug."""
        errors: list[QuantError | None] = []
        for run in self._runs:
            error = self._queues[run].error if run in self._queues else None
            if error is not None and not isinstance(error, QuantError):
                raise error
            errors.append(error)
        if self._blocks is not None:
            fetched, of = size(self._blocks.fetched), size(self._runs[0].plan.checkpoint.nbytes)
            self._progress.detail(
                f"{fetched} were read of a model of {of}, for {len(self._queues)} checkpoints"
            )
        return errors

    def close(self) -> None:
        """Close the shards that are still under way. No worker may be at one."""
        for queue in self._queues.values():
            queue.close()


def shared_nbytes(workers: int, plans: int) -> int:
    """Bytes of blocks that plans share: of the jobs that are under way or next."""
    return (workers + plans + 2) * max(JOB_BYTES, BLOCK)


def memory_together(plans: Sequence[Work], workers: int) -> int:
    """Peak bytes above a bare torch import if these plans are carried out side by side: what the
    hungriest takes, the blocks that they share, and extents of each."""
    estimates = [memory_estimate(plan, workers) for plan in plans]
    if len(plans) < 2:
        return sum(estimates)
    share = -(-workers // len(plans))
    extents = len(plans) * buffer_count(share) - buffer_count(workers)
    objects = sum(sum(len(shard.tensors) for shard in plan.shards) for plan in plans) * 1500
    return max(estimates) + shared_nbytes(workers, len(plans)) + extents * EXTENT + objects
