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

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        """Calibration begins: decoder layers in all, those that are done already, tokens of data."""

    def layer(self, name: str, index: int, note: str = "") -> None:
        """A layer is calibrated; `index` from 0. note: what is to be said of it."""

    def say(self, text: str) -> None:
        """A sentence for people."""


class Silent:
    """Progress for nobody."""

    def begin(self, nbytes: int, shards: int) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """Nothing."""

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        """Nothing."""

    def layer(self, name: str, index: int, note: str = "") -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


SILENT = Silent()
