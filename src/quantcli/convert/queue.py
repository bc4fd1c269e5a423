"""The jobs of a run in the order of the output's bytes, and the shards that are under way."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from quantcli.checkpoint.tensors import will_read
from quantcli.checkpoint.writer import TensorWriter
from quantcli.convert.destination import ShardSink
from quantcli.core.extents import Buffers
from quantcli.planning.block import Job, jobs_of
from quantcli.planning.plan import Shard


@dataclass(frozen=True)
class Chunk(Shard):
    """A share of a shard: jobs [begin, end) of those of its items, and all of its tensors."""

    begin: int = 0
    end: int = 0


def ordered_jobs(shard: Shard) -> list[Job]:
    """The jobs of a shard, or of a chunk of it, in the order of the output's bytes."""
    place = {spec.name: number for number, spec in enumerate(shard.tensors)}
    items = sorted(shard.items, key=lambda item: min(place[out.spec.name] for out in item.outputs))
    jobs = list(jobs_of(items))
    return jobs[shard.begin : shard.end] if isinstance(shard, Chunk) else jobs


class OpenShard:
    """A shard being written, and its jobs that nobody has taken.

    first: the number of its first job among those of the run.
    """

    def __init__(self, shard: Shard, first: int, writer_of: Callable[[Shard], TensorWriter]) -> None:
        self.shard = shard
        self.writer = writer_of(shard)
        self.jobs: deque[Job | None] = deque(ordered_jobs(shard))
        if not self.jobs:  # nothing but empty tensors: the shard is still to be finished
            self.jobs.append(None)
        self.count = self.left = len(self.jobs)
        self.taken = 0  # bytes of the source, of the jobs that were handed out
        self._end = first + self.count

    @property
    def number(self) -> int:
        """The number of its next job among those of the run."""
        return self._end - len(self.jobs)

    def take(self) -> Job | None:
        """Its next job."""
        job = self.jobs.popleft()
        if job is not None:
            self.taken += job.nbytes
        return job


@dataclass(frozen=True, slots=True)
class Task:
    """A job for a worker.

    number: among the jobs of the run, in the order of the plan's shards and of their bytes.
    later:  jobs that workers will take soon, and that were not in a `later` yet.
    """

    number: int
    shard: OpenShard
    job: Job | None
    later: tuple[Job, ...]


class JobQueue:
    """Hands out jobs in the order of the output's bytes. Threads share it.

    So the pieces of an extent come at about the same time, and extents in the order in which they are
    hashed. If the hash of a shard falls behind, jobs of the next one are handed out: shards are hashed
    by several threads.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        sink: ShardSink,
        workers: int,
        *,
        checksum: bool,
        begins: Mapping[str, int] | None = None,
    ) -> None:
        """begins: bytes of the source before each shard, by file; see `position`."""
        self._shards = deque(shards)
        self._begins = begins or {}
        self._sink = sink
        self._workers = workers
        self._checksum = checksum
        self._writing = ThreadPoolExecutor(1, "quantcli-writing")
        count = buffer_count(workers) + sink.extents(shards)
        self._buffers = Buffers(count, 2 * workers, self._writing)
        self._open: list[OpenShard] = []
        self._next = 0  # number of the first job of the next shard
        self._errors: dict[int, BaseException] = {}
        self._end = float("inf")  # jobs from this number on are in vain
        self._taken = 0  # jobs that workers are at
        self._lock = threading.Condition()

    def take(self, *, wait: bool = True) -> Task | None:
        """The next job; None if there is none left, or none before one that failed. Call `let_go` when
        nothing is left to do of it.

        It waits if the next shard may not be opened yet. If extents can only stay in memory, and there
        is none, it waits until another worker is ready with its job. A job never waits for memory: only
        a later one may free some. wait: without it the answer is None in place of waiting.
        """
        with self._lock:
            shard = None
            while shard is None:
                if not self._is_short():
                    shard = self._choose()
                    if shard is None and self._is_last():
                        return None
                if shard is None:
                    if not wait:
                        return None
                    self._lock.wait()
            number, job = shard.number, shard.take()
            ahead = 2 * self._workers + 4
            begin = 0 if len(shard.jobs) == shard.count - 1 else ahead - 1
            later = tuple(islice(shard.jobs, begin, ahead))
            self._taken += 1
            return Task(number, shard, job, tuple(job for job in later if job is not None))

    @property
    def is_over(self) -> bool:
        """Whether no job will be handed out any more, if none could be just now."""
        with self._lock:
            ready = any(shard.jobs and shard.number < self._end for shard in self._open)
            return not ready and self._is_last()

    @property
    def position(self) -> float:
        """Bytes of the source before the next job, in the order of the plan."""
        with self._lock:
            for shard in self._open:
                if shard.jobs:
                    return self._begins.get(shard.shard.file, 0) + shard.taken
            return self._begins.get(self._shards[0].file, 0) if self._shards else float("inf")

    def _is_short(self) -> bool:
        """Whether memory is used up, and a worker may free some."""
        return self._sink.in_memory and self._buffers.exhausted and self._taken > 0

    def _is_last(self) -> bool:
        """Whether no shard will be opened any more."""
        return not self._open or not self._shards or self._next >= self._end

    def _choose(self) -> OpenShard | None:
        """The shard of the next job."""
        ready = [shard for shard in self._open if shard.jobs and shard.number < self._end]
        shard = next((s for s in ready if s.writer.backlog <= 2 * self._workers), None)
        return shard or self._opened() or (ready[0] if ready else None)

    def _opened(self) -> OpenShard | None:
        """The next shard, if there is one and not too many are under way."""
        if not self._shards or self._is_full() or self._next >= self._end:
            return None
        try:
            shard = OpenShard(self._shards.popleft(), self._next, self._writer_of)
        except BaseException as error:
            self._note(self._next, error)
            return None
        self._next += shard.count
        self._open.append(shard)
        return shard

    def _is_full(self) -> bool:
        """Whether no further shard may be under way."""
        if self._sink.most_shards == 1:
            return bool(self._open)
        most = max(2, min(self._workers, self._sink.most_shards))
        return sum(1 for shard in self._open if shard.jobs) >= most

    def _writer_of(self, shard: Shard) -> TensorWriter:
        return self._sink.writer(shard, self._buffers, checksum=self._checksum)

    def is_in_vain(self, task: Task) -> bool:
        """Whether a job before this one failed, so that nobody needs its result."""
        return task.number > self._end

    def let_go(self) -> None:
        """A worker has left its job, done or not."""
        with self._lock:
            self._taken -= 1
            self._lock.notify_all()

    def done(self, task: Task) -> bool:
        """Count a job of a shard; whether it was the last one."""
        with self._lock:
            task.shard.left -= 1
            return task.shard.left == 0

    def finished(self, shard: OpenShard) -> None:
        """A shard has its name."""
        with self._lock:
            self._open.remove(shard)
            self._lock.notify_all()

    def fail(self, task: Task, error: BaseException) -> None:
        """A job failed: jobs after it are not handed out any more. Those before it are, so that a run
        fails with the same error for any number of workers."""
        with self._lock:
            self._note(task.number, error)

    def _note(self, number: int, error: BaseException) -> None:
        self._errors[number] = error
        self._end = min(self._errors)
        self._lock.notify_all()

    def stop(self) -> None:
        """Hand out no further job."""
        with self._lock:
            self._end = -1
            self._lock.notify_all()

    @property
    def error(self) -> BaseException | None:
        """The error of the first job that failed, if any did."""
        return self._errors[min(self._errors)] if self._errors else None

    def close(self) -> None:
        """Close the shards that are still under way. No worker may be at one."""
        for shard in self._open:
            shard.writer.abandon()
        self._writing.shutdown()


def buffer_count(workers: int) -> int:
    """Extents that a run holds at most."""
    return 4 * workers + 2


def read_ahead(job: Job) -> None:
    """Have the source of a job that comes soon read, while others compute."""
    item = job.item
    for stored in item.source.parts:
        begin, end = (stored.nbytes * row // item.height for row in (job.start, job.stop))
        will_read(stored, begin, end)
