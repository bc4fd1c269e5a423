"""Objects on the nodes of a cluster, each in a process of its own, which keep what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from quantcli.core.cluster.relay import Heard
from quantcli.core.cluster.streams import Lost, Stream, error_of, ready
from quantcli.core.cluster.worker import Host, Result, Shared
from quantcli.core.errors import MachineError
from quantcli.core.events import SILENT, Progress

if TYPE_CHECKING:
    from quantcli.core.cluster.cluster import Cluster

_TICK = 1.0  # seconds


class ActorLost(MachineError):
    """The process of an actor is gone, or its node. number: of the actor, from 0."""

    def __init__(self, number: int, address: str, why: str) -> None:
        super().__init__(
            "a process on the cluster is gone",
            where=f"node {address}: {why}",
            fix="run the same command again: it continues where it stopped",
        )
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _lost, (self.number, self.where)


def _lost(number: int, where: str) -> ActorLost:
    address, _, why = where.removeprefix("node ").partition(": ")
    return ActorLost(number, address, why)


class Actors:
    """Some actors. They end with the block."""

    def __init__(self, cluster: Cluster, count: int, cpus: int) -> None:
        import ray

        kind = ray.remote(Host).options(
            num_cpus=cpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._cluster = cluster
        self._hosts = [kind.remote() for _ in range(count)]
        self._addresses = ["of the cluster"] * count

    def __len__(self) -> int:
        return len(self._hosts)

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for host in self._hosts:
            ray.kill(host)
        self._hosts = []

    def make(
        self,
        make: Callable[[Any, Any, Progress], Any],
        shared: Shared,
        requests: Sequence[Any],
        progress: Progress = SILENT,
    ) -> None:
        """Make the object of each actor from its request."""
        setting = self._cluster.setting(progress)
        streams = [
            Stream(host.make.options(num_returns="streaming").remote(make, shared, request, setting), i)
            for i, (host, request) in enumerate(zip(self._hosts, requests, strict=True))
        ]
        heard = Heard(progress)
        for _ in self._outcomes(streams, heard, {stream: stream.index for stream in streams}):
            pass

    def each(self, method: str, requests: Sequence[Any], progress: Progress = SILENT) -> list[Any]:
        """Call a method of every actor, each with its own request. Results in the order of the actors.

        ActorLost if one is gone; an error of a method is that of the first actor that has one.
        """
        streams = [
            self._call(number, method, request, number, progress)
            for number, request in enumerate(requests)
        ]
        results: list[Any] = [None] * len(streams)
        errors: dict[int, BaseException] = {}
        numbers = {stream: stream.index for stream in streams}
        for index, result, error in self._outcomes(streams, Heard(progress), numbers):
            results[index] = result
            if error is not None:
                errors[index] = error
        if errors:
            raise errors[min(errors)]
        return results

    def map(
        self, method: str, requests: Sequence[Any], progress: Progress = SILENT
    ) -> Iterator[tuple[int, Any]]:
        """Call a method with each request, on whichever actor is free: (index, result) as they come.

        ActorLost if one is gone. An error of a method is raised at once.
        """
        heard, waiting = Heard(progress), list(enumerate(requests))[::-1]
        streams: list[Stream] = []
        numbers: dict[Stream, int] = {}

        def start(number: int) -> None:
            if waiting:
                index, request = waiting.pop()
                stream = self._call(number, method, request, index, progress)
                numbers[stream] = number
                streams.append(stream)

        for number in range(len(self._hosts)):
            start(number)
        for index, result, error in self._outcomes(streams, heard, numbers, start):
            if error is not None:
                raise error
            yield index, result

    def _call(self, number: int, method: str, request: Any, index: int, progress: Progress) -> Stream:
        call = self._hosts[number].call.options(num_returns="streaming")
        return Stream(call.remote(method, request, self._cluster.setting(progress)), index)

    def _outcomes(
        self,
        streams: list[Stream],
        heard: Heard,
        numbers: dict[Stream, int],
        free: Callable[[int], None] = lambda _: None,
    ) -> Iterator[tuple[int, Any, BaseException | None]]:
        """Index, result and error of calls as they end. free(number) is called
        for each actor that has nothing to do."""
        while streams:
            for stream in ready(streams, _TICK):
                number = numbers[stream]
                try:
                    outcome = stream.read(heard)
                except Lost as why:
                    raise ActorLost(number, self._addresses[number], str(why)) from None
                if stream.place is not None:
                    self._addresses[number] = stream.place.address
                if outcome is None:
                    continue
                streams.remove(stream)
                free(number)
                if isinstance(outcome, Result):
                    yield stream.index, outcome.value, None
                else:
                    yield stream.index, None, error_of(outcome)
