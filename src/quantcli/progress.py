"""How far the work is: a bar in bytes on a terminal, else one line a shard."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantcli.console import Output, human_bytes, make_console

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class ShardLines:
    """Progress where stderr is no terminal: one line a shard, nothing else."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._count = 0
        self._done = 0
        self._lock = threading.Lock()

    def begin(self, nbytes: int, shards: int) -> None:
        """Remember how many shards there will be."""
        self._count = self._done + shards

    def advance(self, nbytes: int) -> None:
        """Nothing to show."""

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """One line."""
        with self._lock:
            self._done += 1
            of = f"{self._done}/{self._count}" if self._count else "kept"
            kept = " (from an earlier run)" if reused else ""
            self._out.word(f"shard {of}: {file} {human_bytes(nbytes)}{kept}")


class ProgressBar:
    """Progress on a terminal: a bar in bytes."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("quantizing", total=None)
        self._pending = 0
        self._shown = 0.0
        self._lock = threading.Lock()

    def begin(self, nbytes: int, shards: int) -> None:
        """Set the length of the bar."""
        self._bar.update(self._task, total=nbytes, description=f"{shards} shards")

    def advance(self, nbytes: int) -> None:
        """Move on; ten times a second is enough for the eye."""
        with self._lock:
            self._pending += nbytes
            now = time.monotonic()
            if now - self._shown < 0.1:
                return
            step, self._pending, self._shown = self._pending, 0, now
        self._bar.advance(self._task, step)

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """Nothing to show: the bar says it."""
        with self._lock:
            step, self._pending = self._pending, 0
        self._bar.advance(self._task, step)


@contextmanager
def watch(out: Output) -> Iterator[ShardLines | ProgressBar]:
    """A bar on a terminal, else one line a shard."""
    if out.quiet or not sys.stderr.isatty():
        yield ShardLines(out)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=make_console(sys.stderr)) as bar:
        yield ProgressBar(bar)
