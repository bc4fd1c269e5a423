"""What a run tells of itself while it works."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Who wants to know how far the work is."""

    def begin(self, nbytes: int, shards: int) -> None:
        """The work ahead: bytes of source weights, shards to write."""

    def advance(self, nbytes: int) -> None:
        """Bytes of source weights done since the last call. Called from any thread."""

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """A shard is whole; `reused` if an earlier run had finished it."""


class Silent:
    """Progress for nobody."""

    def begin(self, nbytes: int, shards: int) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """Nothing."""


SILENT = Silent()
