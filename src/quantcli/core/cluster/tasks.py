"""Requests as tasks of a cluster: a few under way, and done again if their process or node is gone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from quantcli.core.cluster.relay import Heard
from quantcli.core.cluster.streams import Lost, Stream, cancel, error_of, ready
from quantcli.core.cluster.worker import Place, Result, Setting, Shared, task
from quantcli.core.errors import MachineError
from quantcli.core.events import Progress
from quantcli.core.text import count

if TYPE_CHECKING:
    from quantcli.core.cluster.cluster import Cluster

Done: TypeAlias = Callable[[int, Any], Iterable[Any] | None]  # index, result -> requests that follow

_MOST_CRASHES = 4  # of one request, on nodes that live on
_PATIENCE = 300.0  # seconds without a node that could work
_TICK = 1.0  # seconds
_ACCELERATOR: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cuda": {"num_gpus": 1},
    "npu": {"resources": {"NPU": 1}},
}


@dataclass(frozen=True)
class TaskOptions:
    """How requests are done. cpus: of each. noun: what one is, for messages. device: cpu, cuda or npu:
    whether each takes an accelerator."""

    cpus: int = 1
    noun: str = "task"
    device: str = "cpu"


class TaskRun:
    """Requests that are being done. Their results are in the order of the requests."""

    def __init__(
        self,
        cluster: Cluster,
        work: Callable[[Any, Any, Progress], Any],
        shared: Shared,
        options: TaskOptions,
        progress: Progress,
    ) -> None:
        import ray

        self._cluster, self._work, self._shared = cluster, work, shared
        self._options, self._progress = options, progress
        self._heard = Heard(progress)
        self._task = ray.remote(task).options(
            num_cpus=options.cpus,
            **_ACCELERATOR[options.device],
            num_returns="streaming",
            max_retries=0,  # `_again` counts and reports it
            scheduling_strategy="SPREAD",
        )
        self._live: list[Stream] = []
        self._crashes: Counter[int] = Counter()
        self._errors: dict[int, BaseException] = {}
        self._idle_since: float | None = None

    def results(self, given: Iterable[Any], done: Done) -> list[Any]:
        """The result of each request; `done(index, result)` is called as soon as there is one. Requests
        that it returns are done next, and have the indexes behind all others.

        If some fail, the error of the first of them is raised, after all before it were done.
        """
        requests = list(given)
        results: list[Any] = [None] * len(requests)
        pending = list(range(len(requests)))[::-1]
        try:
            while pending or self._live:
                setting = self._cluster.setting(self._progress)
                while pending and len(self._live) < self._cluster.slots(self._options.cpus):
                    self._start(requests, pending.pop(), setting)
                for index, value in self._finished(pending):
                    results[index] = value
                    for request in done(index, value) or ():
                        pending.append(len(requests))
                        requests.append(request)
                        results.append(None)
        finally:
            cancel(self._live)
        if self._errors:
            raise self._errors[min(self._errors)]
        return results

    def _start(self, requests: Sequence[Any], index: int, setting: Setting) -> None:
        generator = self._task.remote(self._work, self._shared, requests[index], setting)
        self._live.append(Stream(generator, index))

    def _finished(self, pending: list[int]) -> list[tuple[int, Any]]:
        """Requests that are done by now, with their results. Those that are to be done again are put
        at the end of `pending`, which come first."""
        finished, lost = [], []
        for stream in ready(self._live, _TICK):
            if stream not in self._live:  # cancelled, as one before it has just failed
                continue
            try:
                outcome = stream.read(self._heard)
            except Lost as why:
                self._live.remove(stream)
                self._heard.take_back(stream.nbytes)
                lost.append((stream, why))
                continue
            if outcome is None:
                continue
            self._live.remove(stream)
            if isinstance(outcome, Result):
                finished.append((stream.index, outcome.value))
            else:
                self._fail(stream.index, error_of(outcome), pending)
        if lost:
            self._again(lost, pending)
        self._check_idle()
        return finished

    def _fail(self, index: int, error: BaseException, pending: list[int]) -> None:
        """Note an error: what comes after it is in vain."""
        self._errors[index] = error
        first = min(self._errors)
        pending[:] = [other for other in pending if other < first]
        vain = [stream for stream in self._live if stream.index > first]
        cancel(vain)
        self._live = [stream for stream in self._live if stream.index < first]

    def _again(self, lost: list[tuple[Stream, Lost]], pending: list[int]) -> None:
        """Do requests again whose process is gone, and say so. One that no process had begun
        is not reported."""
        gone: Counter[tuple[str, bool]] = Counter()
        for stream, why in lost:
            if self._errors and stream.index > min(self._errors):
                continue
            pending.append(stream.index)
            if stream.place is None:
                continue
            node_gone = why.with_node or self._cluster.is_gone(stream.place.node)
            gone[stream.place.address, node_gone] += 1
            self._progress.detail(f"{self._options.noun} {stream.index + 1}: {why}")
            if not node_gone:
                self._crashes[stream.index] += 1
                if self._crashes[stream.index] == _MOST_CRASHES:
                    self._fail(stream.index, self._crashed(stream.place, str(why)), pending)
        for (address, node_gone), number in gone.items():
            who = f"node {address} is gone" if node_gone else f"a process on node {address} has died"
            again = "is" if number == 1 else "are"
            self._progress.say(f"{who}: {count(number, self._options.noun)} {again} done again")

    def _crashed(self, place: Place, why: str) -> MachineError:
        return MachineError(
            f"a process on the cluster died {_MOST_CRASHES} times at the same {self._options.noun}",
            where=f"node {place.address}: {why}",
            fix="look into Ray's logs on that node; if its memory was full, give fewer --workers",
        )

    def _check_idle(self) -> None:
        """Say that no node can work, and MachineError if that lasts."""
        if not self._live or self._cluster.slots(self._options.cpus, spare=0):
            self._idle_since = None
            return
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
            self._progress.say(f"waiting for a node with {count(self._options.cpus, 'CPU')}")
        elif now - self._idle_since > _PATIENCE:
            raise MachineError(
                f"no node of the cluster has {count(self._options.cpus, 'CPU')}",
                where=f"since {_PATIENCE:.0f} s",
                fix="add nodes, or give fewer --workers; the same command continues",
            )
