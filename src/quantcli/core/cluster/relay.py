"""Progress of work on another machine: calls are noted there, and made again where the user is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

from quantcli.core.events import Progress

Call: TypeAlias = tuple[str, tuple[Any, ...], dict[str, Any]]  # name of a method, its arguments

_RELAYED = (
    "say", "detail", "phase", "begin", "shard", "begin_layers", "begin_layer", "step", "layer",
)  # fmt: skip


class Relay(Progress):
    """Notes all calls, from any thread, until `take` gives them. Bytes are added up."""

    def __init__(self, *, detailed: bool) -> None:
        self.detailed = detailed
        self._calls: list[Call] = []
        self._nbytes = 0
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        """Bytes that were read since the last call."""
        with self._lock:
            self._nbytes += nbytes

    def take(self) -> list[Call]:
        """What was noted since the last call."""
        with self._lock:
            calls, self._calls = self._calls, []
            if self._nbytes:
                calls.append(("advance", (self._nbytes,), {}))
                self._nbytes = 0
        return calls

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._lock:
            self._calls.append((name, args, kwargs))


def _noting(name: str) -> Callable[..., None]:
    def note(self: Relay, *args: Any, **kwargs: Any) -> None:
        self._note(name, args, kwargs)

    return note


for _name in _RELAYED:
    setattr(Relay, _name, _noting(_name))


class Heard:
    """Makes the calls of several relays again. A message that each of them has is made once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._messages: set[object] = set()

    def make(self, calls: list[Call]) -> int:
        """Make some calls. Returns the bytes that they count."""
        nbytes = 0
        for name, args, kwargs in calls:
            if name == "advance":
                nbytes += args[0]
            if name == "say":
                if args in self._messages:
                    continue
                self._messages.add(args)
            getattr(self._progress, name)(*args, **kwargs)
        return nbytes

    def take_back(self, nbytes: int) -> None:
        """Bytes that were counted, and whose work is to be done again."""
        if nbytes:
            self._progress.advance(-nbytes)
