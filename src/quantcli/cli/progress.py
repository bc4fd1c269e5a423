"""How far the work is: a bar on a terminal, else one line a shard or layer."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantcli.cli.output import Output, make_console
from quantcli.core.text import count, human_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class ShardLines:
    """Progress where stderr is no terminal: one line a shard or layer, nothing else."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._count = 0
        self._done = 0
        self._layers = 0
        self._began = 0.0
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

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        """One line, and remember how many layers there are."""
        self._layers = layers
        self._began = time.monotonic()
        kept = f", {count(done, 'layer')} done by an earlier run" if done else ""
        self._out.word(f"running: {count(layers, 'layer')}, {tokens:,} tokens{kept}")

    def layer(self, name: str, index: int, note: str = "") -> None:
        """One line."""
        more = f", {note}" if note else ""
        now = time.monotonic()
        self._out.word(f"layer {index + 1}/{self._layers}: {name} {now - self._began:.1f} s{more}")
        self._began = now

    def say(self, text: str) -> None:
        """One line."""
        self._out.word(text)


class ProgressBar:
    """Progress on a terminal: a bar in layers, then one in bytes."""

    def __init__(self, bar: Bar, out: Output) -> None:
        self._bar = bar
        self._out = out
        self._task = bar.add_task("", total=None, visible=False, amount="")
        self._layers = bar.add_task("", total=None, visible=False, amount="")
        self._pending = self._done = self._total = 0
        self._shown = self._began = 0.0
        self._lock = threading.Lock()

    def begin(self, nbytes: int, shards: int) -> None:
        """Set the length of the bar."""
        self._total = nbytes
        self._began = time.monotonic()
        self._bar.update(self._layers, visible=False)
        self._bar.update(self._task, total=nbytes, description=f"{shards} shards", visible=True)

    def advance(self, nbytes: int) -> None:
        """Move on; ten times a second is enough for the eye."""
        with self._lock:
            self._pending += nbytes
            now = time.monotonic()
            if now - self._shown < 0.1:
                return
            step, self._pending, self._shown = self._pending, 0, now
        self._advance(step)

    def _advance(self, step: int) -> None:
        self._done += step
        seconds = max(time.monotonic() - self._began, 0.1)
        speed = human_bytes(self._done / seconds)
        amount = f"{human_bytes(self._done)} of {human_bytes(self._total)}, {speed}/s"
        self._bar.update(self._task, completed=self._done, amount=amount)

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """Nothing to show: the bar says it."""
        with self._lock:
            step, self._pending = self._pending, 0
        self._advance(step)

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        """Set the length of the bar, in layers."""
        self._bar.update(
            self._layers, total=layers, completed=done, description="running", visible=True
        )

    def layer(self, name: str, index: int, note: str = "") -> None:
        """Move on."""
        more = f", {note}" if note else ""
        self._bar.update(self._layers, completed=index + 1, amount=f"{name} is done{more}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._out.word(text)


@contextmanager
def watch(out: Output) -> Iterator[ShardLines | ProgressBar]:
    """A bar on a terminal, else one line a shard."""
    if out.quiet or not sys.stderr.isatty():
        yield ShardLines(out)
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=make_console(sys.stderr)) as bar:
        yield ProgressBar(bar, out)
