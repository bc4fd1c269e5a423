"""Progress of a run: the events that it reports while it works."""

from __future__ import annotations


class Progress:
    """Receives the events of a run, and ignores each one that a subclass does not override."""

    def begin(self, nbytes: int, shards: int) -> None:
        """Work begins: bytes of source weights to read, number of shards to write."""

    def advance(self, nbytes: int) -> None:
        """Bytes of source weights that were read since the last call. Called from any thread."""

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """A shard is complete; `reused` if an earlier run wrote it."""

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        """Layers begin to run: their number, how many an earlier run did, tokens of data."""

    def layer(self, name: str, index: int, note: str = "") -> None:
        """A layer is done; `index` counts from 0, `note` is a remark on its result."""

    def say(self, text: str) -> None:
        """A message for people."""


SILENT = Progress()
