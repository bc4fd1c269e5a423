"""What does the checks: threads of this process, or tasks of a cluster, each with some threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, TypeAlias

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.remote.file import RemoteFile
from quantcli.core.cluster.cluster import Cluster
from quantcli.core.cluster.sources import check_sources, identities, see_sources
from quantcli.core.cluster.tasks import TaskOptions
from quantcli.core.events import Progress
from quantcli.core.kernels.machine import announced
from quantcli.core.threads import thread_pool

# An object for all requests, a request, the progress -> a small result. A function of a module.
Check: TypeAlias = Callable[[Any, Any, Progress], Any]

_LEAST = 64 * 2**20  # bytes that a task reads, or more: less would not be worth it
_EACH = 8  # tasks for each that runs at a time, so that all end at about the same time


@dataclass(frozen=True)
class Pool:
    """Does requests. workers: threads, of each task if there is a cluster. sources: files that are
    read; each node must have the same."""

    workers: int
    cluster: Cluster | None = None
    sources: tuple[Path, ...] = ()

    def each(
        self,
        check: Check,
        common: Any,
        requests: Sequence[Any],
        nbytes: Sequence[int],
        progress: Progress,
    ) -> list[Any]:
        """The result of `check(common, request, progress)` for each request, in their order.

        nbytes: that each request reads. Requests that stand together are done on one node, if that
        leaves work for all. The error of the first request that fails is raised. MachineError if a node
        does not see the sources.
        """
        if self.cluster is None or not requests:
            return _in_threads(check, common, requests, self.workers, progress)
        sources = self._identities
        self.cluster.everywhere(see_sources, common=sources, progress=progress)
        cpus = self.cluster.task_cpus(self.workers)
        ends = [*accumulate(nbytes)]
        count = _count(len(requests), ends[-1], cpus, self.cluster.slots(cpus, spare=0))
        shared = _Common(check, common, cpus, sources)
        results = self.cluster.run(
            _several,
            [requests[begin:end] for begin, end in _cuts(ends, count)],
            common=shared,
            options=TaskOptions(cpus),
            progress=progress,
        )
        return [*chain.from_iterable(results)]

    @cached_property
    def _identities(self) -> Mapping[Path, tuple[int, str]]:
        return identities(self.sources)


@dataclass(frozen=True)
class _Common:
    """What all tasks get."""

    check: Check
    common: Any
    workers: int
    sources: Mapping[Path, tuple[int, str]]


def _several(common: _Common, requests: Sequence[Any], progress: Progress) -> list[Any]:
    """Some requests as a task."""
    check_sources(common.sources)
    with announced(progress.say):
        return _in_threads(common.check, common.common, requests, common.workers, progress)


def _in_threads(
    check: Check, common: Any, requests: Iterable[Any], workers: int, progress: Progress
) -> list[Any]:
    with thread_pool(workers) as pool:
        jobs = [pool.submit(check, common, request, progress) for request in requests]
        return [job.result() for job in jobs]


def _count(requests: int, nbytes: int, cpus: int, slots: int) -> int:
    """The number of tasks: as many as make sense for their bytes, but so that each has a request for
    each of its CPUs, unless places for tasks would stay empty."""
    most = min(max(slots, requests // cpus), slots * _EACH, requests)
    return max(1, min(most, nbytes // _LEAST))


def _cuts(ends: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Requests [begin, end) of each task, about as many bytes for each. ends: the bytes up to the end
    of each request. Tasks without requests are left out."""
    groups = [min(count - 1, max(0, end - 1) * count // max(1, ends[-1])) for end in ends]
    begins = [0, *(i for i, (a, b) in enumerate(pairwise(groups), start=1) if a != b), len(ends)]
    return [*pairwise(begins)]


def weight_files(checkpoints: Iterable[Checkpoint]) -> tuple[Path, ...]:
    """Weight files that are there, in folders; one that is elsewhere is checked when it is read."""
    files = (checkpoint.path / name for checkpoint in checkpoints for name in checkpoint.shards)
    return tuple(file for file in files if not isinstance(file, RemoteFile) and file.is_file())
