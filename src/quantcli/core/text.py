"""Numbers as words for people: sizes and counts."""

from __future__ import annotations

from collections.abc import Sized


def human_bytes(nbytes: float) -> str:
    """1234567 -> 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def count(things: int | Sized, word: str) -> str:
    """1 shard, 2 shards."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {word}" + ("" if number == 1 else "s")
