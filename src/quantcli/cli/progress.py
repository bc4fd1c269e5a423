"""Progress of a run: a bar on a terminal, otherwise one line for each shard or layer."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.filesize import decimal

from quantcli.cli.output import Output, literal
from quantcli.core.events import Progress
from quantcli.core.text import count

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn


class ShardLines(Progress):
    """Progress without a terminal: one line on stderr for each shard or layer."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._shards = self._done = self._layers = 0
        self._began = 0.0
        self._lock = threading.Lock()

    def begin(self, nbytes: int, shards: int) -> None:
        """Print nothing; the lines that follow show the number of shards."""
        self._shards = self._done + shards

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """Print `shard 2/7: FILE 5.0 GB`; `kept` in place of the numbers before `begin`."""
        with self._lock:
            self._done += 1
            of = f"{self._done}/{self._shards}" if self._shards else "kept"
            origin = " (from an earlier run)" if reused else ""
            self._out.message(f"shard {of}: {file} {decimal(nbytes)}{origin}")

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        """Print the number of layers and of tokens."""
        self._layers = layers
        self._began = time.monotonic()
        earlier = f", {count(done, 'layer')} done by an earlier run" if done else ""
        self._out.message(f"running: {count(layers, 'layer')}, {tokens:,} tokens{earlier}")

    def layer(self, name: str, index: int, note: str = "") -> None:
        """Print `layer 2/32: NAME 1.5 s, NOTE`."""
        more = f", {note}" if note else ""
        now = time.monotonic()
        self._out.message(f"layer {index + 1}/{self._layers}: {name} {now - self._began:.1f} s{more}")
        self._began = now

    def say(self, text: str) -> None:
        """Print the message."""
        self._out.message(text)


class ProgressBar(Progress):
    """Progress on a terminal: one bar at a time, over bytes or over layers."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._bar: Bar | None = None

    def begin(self, nbytes: int, shards: int) -> None:
        """Start a bar over bytes."""
        from rich.progress import DownloadColumn, TransferSpeedColumn

        self._start(count(shards, "shard"), nbytes, 0, DownloadColumn(), TransferSpeedColumn())

    def advance(self, nbytes: int) -> None:
        """Move the bar."""
        if self._bar:
            self._bar.advance(self._bar.task_ids[0], nbytes)

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        """Start a bar over layers."""
        from rich.progress import TextColumn

        self._start("running", layers, done, TextColumn("{task.fields[layer]}", markup=False))

    def layer(self, name: str, index: int, note: str = "") -> None:
        """Move the bar."""
        if self._bar:
            layer = f"{name} is done" + (f", {note}" if note else "")
            self._bar.update(self._bar.task_ids[0], completed=index + 1, layer=literal(layer).plain)

    def say(self, text: str) -> None:
        """Print the message above the bar."""
        self._out.message(text)

    def stop(self) -> None:
        """Stop the bar; it stays on the terminal."""
        if self._bar:
            self._bar.stop()

    def _start(self, description: str, total: int, done: int, *columns: ProgressColumn) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.stop()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            *columns,
            TimeRemainingColumn(),
            console=self._out.messages,
        )
        self._bar.add_task(description, total=total, completed=done, layer="")
        self._bar.start()


@contextmanager
def watch(out: Output) -> Iterator[Progress]:
    """Progress of the block: a bar on a terminal, otherwise lines, which --quiet leaves out."""
    if out.quiet or not sys.stderr.isatty():
        yield ShardLines(out)
        return
    bar = ProgressBar(out)
    try:
        yield bar
    finally:
        bar.stop()
