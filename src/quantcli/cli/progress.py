"""Progress of a run: one line at the bottom of a terminal, otherwise lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.text import Text

from quantcli.cli.output import Output
from quantcli.core.events import GOES_ON, Event, Events, Progress
from quantcli.core.untrusted.names import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_REFRESHES = 8  # a second
_DROPPED = ("rate", "elapsed", "loss", "done")  # in this order, if the terminal is narrow
_CELLS = 20  # of a bar


class Bar:
    """The bottom line of a terminal: the latest event, as far as it fits, and messages above it."""

    def __init__(self, out: Output) -> None:
        from rich.live import Live

        self._out = out
        self._event: Event | None = None
        self._since = 0.0
        self._live = Live(
            console=out.messages,
            refresh_per_second=_REFRESHES,
            get_renderable=self._line,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )

    def receive(self, event: Event) -> None:
        """Show an event: a message above the line, others in it; a layer or a file in both."""
        if event.kind not in GOES_ON:
            self._out.event(event)
        if event.kind not in {"message", "detail"}:
            self._event, self._since = event, time.monotonic()
            if not self._live.is_started:
                self._live.start()

    def stop(self) -> None:
        """Take the line off the terminal."""
        self._live.stop()

    def _line(self) -> RenderableType:
        if self._event is None:
            return Text("")
        passed = time.monotonic() - self._since
        return fitted(_later(self._event, passed), self._out.messages.width)


def _later(event: Event, seconds: float) -> Event:
    """An event as it is after a while without another one."""
    return replace(
        event,
        elapsed=None if event.elapsed is None else event.elapsed + seconds,
        eta=None if event.eta is None else max(0.0, event.eta - seconds),
    )


def fitted(event: Event, width: int) -> Text:
    """An event in one line of at most `width` - 1 cells: a bar if there is room, and less important
    figures only if they fit."""
    text = event.text
    if event.kind in {"file", "layer"} and ": " in text:
        text = text[: text.index(": ")]  # the line above it says more
    figures = event.figures
    room = max(1, width - 1)
    for name in ("", *_DROPPED):
        figures.pop(name, None)
        line = Text(printable(" · ".join(filter(None, [text, *figures.values()]))))
        if line.cell_len <= room:
            break
    line.truncate(room, overflow="ellipsis")
    if event.total and event.done is not None and line.cell_len + _CELLS + 1 <= room:
        filled = min(_CELLS, _CELLS * event.done // event.total)
        bar = Text("━" * filled, style="green") + Text("━" * (_CELLS - filled), style="bright_black")
        return bar + " " + line
    return line


@contextmanager
def watch(out: Output) -> Iterator[Progress]:
    """Progress of the block: a line on a terminal, otherwise lines, which --quiet leaves out."""

    def follow(events: Events) -> None:
        out.kept, out.doing = lambda: events.kept, lambda: events.doing
        out.is_over = lambda: events.is_over

    if out.quiet or not sys.stderr.isatty() or out.messages.is_dumb_terminal:
        events = Events(out.event)
        events.detailed = out.wants_details
        follow(events)
        yield events
        return
    bar = Bar(out)
    events = Events(bar.receive, 1 / _REFRESHES)
    events.also(out.log_progress)
    events.detailed = out.wants_details
    follow(events)
    try:
        yield events
    finally:
        bar.stop()
