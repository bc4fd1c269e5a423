"""What comes from tasks, as the driver reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.core.cluster.relay import Heard
from quantcli.core.cluster.worker import Failure, Place, Result


class Lost(Exception):
    """The process that did some work is gone. with_node: and its node, as far as Ray knows."""

    def __init__(self, why: str, *, with_node: bool = False) -> None:
        super().__init__(why)
        self.with_node = with_node


@dataclass(eq=False)
class Stream:
    """Messages of a task.

    place:  where it runs; None before it has begun.
    nbytes: that it has counted as progress.
    """

    generator: Any
    index: int  # of its request
    place: Place | None = None
    nbytes: int = 0

    def read(self, heard: Heard) -> Result | Failure | None:
        """Take the next message, which must be there: the outcome if it is that. Lost if the process is
        gone."""
        import ray

        try:
            message = ray.get(next(self.generator))
        except StopIteration:
            raise Lost("it ended without a result") from None
        except ray.exceptions.RayTaskError:  # not in the work: see `worker`
            raise
        except ray.exceptions.RayError as error:
            gone = isinstance(error, ray.exceptions.NodeDiedError)
            raise Lost(str(error).partition("\n")[0], with_node=gone) from None
        if isinstance(message, Place):
            self.place = message
        elif isinstance(message, list):
            self.nbytes += heard.make(message)
        else:
            outcome: Result | Failure = message
            return outcome
        return None

    def cancel(self) -> None:
        """Kill the process of a task."""
        import ray

        ray.cancel(self.generator, force=True)


def ready(streams: Sequence[Stream], seconds: float) -> list[Stream]:
    """Those that have a message, as soon as one does; none after some seconds."""
    import ray

    waiting = [stream.generator for stream in streams]
    found, _ = ray.wait(waiting, num_returns=1, timeout=seconds, fetch_local=False)
    if found and len(waiting) > 1:
        found, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
    numbers = set(map(id, found))
    return [stream for stream in streams if id(stream.generator) in numbers]


def error_of(failure: Failure) -> BaseException:
    """The error of some work, as it is raised where the user is."""
    if failure.trace:
        failure.error.add_note(f"on another machine of the cluster:\n{failure.trace}")
    return failure.error


def cancel(streams: Iterable[Stream]) -> None:
    """Kill the processes of some tasks."""
    for stream in streams:
        stream.cancel()
