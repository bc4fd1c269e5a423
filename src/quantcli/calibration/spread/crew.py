"""Processes that do the requests of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from quantcli.calibration.spread.worker import Work
from quantcli.core.cluster.tasks import TaskOptions
from quantcli.core.events import Inner, Progress

if TYPE_CHECKING:
    from quantcli.core.cluster.cluster import Cluster

Function = Callable[[Work, Any, Progress], Any]  # of `worker`


class Crew(Protocol):
    """Processes that do requests.

    size: how many requests at a time. threads: of each, and a thread computes a batch.
    """

    size: int
    threads: int

    def run(
        self,
        function: Function,
        requests: Sequence[Any],
        *,
        noun: str,
        progress: Progress,
        done: Callable[[int, Any], None] = lambda index, result: None,
    ) -> list[Any]:
        """The results of a function of `worker` for some requests, in their order. done(index, result)
        is called as results come. noun: what a request is, for messages."""


class ClusterCrew:
    """The nodes of a cluster. Requests of lost nodes are done again on others."""

    def __init__(self, cluster: Cluster, work: Work, workers: int | None) -> None:
        """workers: threads of a task; None: one for each CPU of a node, which has one task then."""
        self._cluster = cluster
        self._cpus = cluster.task_cpus(workers)
        # Ray shows a task one accelerator, whatever its number
        self._device = work.resources.device.partition(":")[0]
        resources = replace(work.resources, workers=self._cpus, device=self._device)
        self._work = cluster.share(replace(work, resources=resources))
        self.size = max(1, cluster.slots(self._cpus, spare=0))
        self.threads = self._cpus if self._device == "cpu" else 1

    def run(
        self,
        function: Function,
        requests: Sequence[Any],
        *,
        noun: str,
        progress: Progress,
        done: Callable[[int, Any], None] = lambda index, result: None,
    ) -> list[Any]:
        """As tasks with so many CPUs as a calibration has workers, and an accelerator if it has one."""
        options = TaskOptions(self._cpus, noun, self._device)
        return self._cluster.run(
            function, requests, common=self._work, options=options, done=done, progress=progress
        )


def shares_of(count: int, crew: Crew) -> list[tuple[int, ...]]:
    """The numbers of `count` batches in as many runs as can be worked on at a time, of like lengths.

    Each run loads the layers that it goes through. So it has a batch for each of its threads at least:
    more runs would load more, and end no sooner.
    """
    size = min(crew.size, -(-count // crew.threads))
    ends = [count * (n + 1) // size for n in range(size)]
    return [tuple(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


class Steps(Inner):
    """Counts steps of several processes as those of one phase."""

    def __init__(self, outer: Progress, total: int) -> None:
        super().__init__(outer)
        self._total = total
        self._done = 0

    def step(
        self, done: int, total: int, *, noun: str = "batch", tokens: int = 0, loss: float | None = None
    ) -> None:
        """One more step."""
        self._done = min(self._done + 1, self._total)  # some are done again if a process is lost
        self._outer.step(self._done, self._total, noun=noun, tokens=tokens)
