"""Text for people."""

from __future__ import annotations

from collections.abc import Sized


def count(things: int | Sized, noun: str) -> str:
    """A number with its noun: `1 shard`, `2 shards`."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun}" + ("" if number == 1 else "s")
