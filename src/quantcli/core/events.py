"""Progress of a run: what it reports while it works, as calls and as events.

A run calls a `Progress`. `Events` makes an `Event` of each call that people want to see; `str` of it is
the line that a log shows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from quantcli.core.text import count, duration, of_bytes, short_number, size

Kind = Literal["message", "detail", "phase", "bytes", "file", "layer", "step"]

GOES_ON: frozenset[Kind] = frozenset({"phase", "bytes", "step"})  # what tells of work that is not done
_AT_ONCE = 1.0  # seconds: what gets events more often than that shows the present state
LINE_EVERY = 30.0  # seconds between lines about work that goes on


class Progress:
    """Receives the calls of a run, from any thread, and ignores each one that a subclass does not
    override.

    detailed: whether anybody wants details, which can cost time to put together.
    """

    detailed = False

    def say(self, text: str) -> None:
        """A message for people."""

    def detail(self, text: str) -> None:
        """A decision and its reason, for people who ask for it (`-v`)."""

    def phase(self, name: str, passes: float = 1.0) -> None:
        """What the run does from now on, such as `reading text`. Within a layer: a part of its work.

        passes: how much, where running all tokens through the layer once counts as 1.
        """

    def keeps(self, what: str, *, lasting: bool = False) -> None:
        """What a later run can use if this one ends now, such as `2 of 7 shards in OUT.partial`.

        lasting: whether that stays so, whatever is kept next to it later.
        """

    def over(self) -> None:
        """All work is done; only words about it are left."""

    def begin(self, nbytes: int, files: int, noun: str = "shard") -> None:
        """Work on bytes begins: bytes to read, number of files to complete; noun: what these are."""

    def advance(self, nbytes: int) -> None:
        """Bytes that were read since the last call."""

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """A file is complete; `reused` if an earlier run wrote it."""

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        """Layers begin to run: their number, how many an earlier run did, tokens of data."""

    def begin_layer(self, name: str, index: int, passes: float = 1.0) -> None:
        """A layer begins; `index` counts from 0. passes: those of all its phases."""

    def step(
        self, done: int, total: int, *, noun: str = "batch", tokens: int = 0, loss: float | None = None
    ) -> None:
        """Steps of the present phase of a layer: how many are done and there are.

        noun: what a step is. tokens: of this step. loss: the learner's, after it.
        """

    def layer(self, name: str, index: int, note: str = "", seconds: float | None = None) -> None:
        """A layer is done; `index` counts from 0, `note` is a remark on its result. seconds: that it
        took, if other layers are worked on at the same time."""


SILENT = Progress()


class Inner(Progress):
    """Progress of a part of a run. It passes messages on to the run, and nothing else."""

    def __init__(self, outer: Progress) -> None:
        self._outer = outer
        self.detailed = outer.detailed

    def say(self, text: str) -> None:
        """A message."""
        self._outer.say(text)

    def detail(self, text: str) -> None:
        """A detail."""
        self._outer.detail(text)


@dataclass(frozen=True)
class Event:
    """Something that a run reports. `str` of it is a line for people.

    kind:    message; detail: a decision and its reason; phase: what the run does from now on;
             file, layer: one is done; bytes, step: work on files or in a layer goes on.
    text:    the message, or what the figures are about.
    done, total: bytes of `bytes` and `file`, layers of `layer`, steps of `step`.
    noun:    what a step is.
    loss:    of what learns.
    rate:    bytes a second of `bytes` and `file`, tokens a second of `layer` and `step`.
    elapsed: seconds since the work began.
    eta:     seconds until it ends, estimated.
    """

    kind: Kind
    text: str
    done: int | None = None
    total: int | None = None
    noun: str = ""
    loss: float | None = None
    rate: float | None = None
    elapsed: float | None = None
    eta: float | None = None

    @property
    def figures(self) -> dict[str, str]:
        """The figures that are known, as texts by name, in the order in which a line has them."""
        in_bytes = self.kind in {"bytes", "file"}
        found = {}
        if in_bytes and self.done is not None and self.total is not None:
            found["done"] = of_bytes(self.done, self.total)
        if self.kind == "step" and self.noun:
            found["done"] = f"{self.noun} {self.done}/{self.total}"
        if self.loss is not None:
            found["loss"] = f"loss {self.loss:.3g}"
        if self.rate is not None:
            rate = f"{size(self.rate)}/s" if in_bytes else f"{short_number(self.rate)} tok/s"
            found["rate"] = rate
        if self.elapsed is not None:
            found["elapsed"] = f"elapsed {duration(self.elapsed)}"
        if self.eta is not None:
            found["eta"] = f"ETA {duration(self.eta)}"
        return found

    def __str__(self) -> str:
        return " · ".join(filter(None, [self.text, *self.figures.values()]))


@dataclass
class _Receiver:
    receive: Callable[[Event], None]
    interval: float  # seconds between events about work that goes on
    due: float = 0.0


@dataclass
class _Bytes:
    """Work on files: bytes that are to be read, and those that were."""

    total: int = 0
    files: int = 0
    noun: str = "shard"
    began: float = 0.0
    done: int = 0
    complete: int = 0  # files

    def event(self, kind: Kind, text: str, now: float) -> Event:
        seconds = now - self.began
        rate = self.done / seconds if self.done and seconds > 0 else None
        eta = max(0.0, (self.total - self.done) / rate) if rate else None
        return Event(kind, text, self.done, self.total, rate=rate, eta=eta)


@dataclass
class _Layers:
    """Layers that run: the present one, and the present phase of it."""

    total: int = 0
    first: int = 0  # that this run does
    tokens: int = 0
    began: float = 0.0
    index: int = 0
    layer_began: float = 0.0
    passes: float = 1.0
    passes_done: float = 0.0  # in phases of the layer that are over
    phase: str = ""
    phase_passes: float = 0.0
    phase_began: float = 0.0
    phase_tokens: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None

    def begin_phase(self, name: str, passes: float, now: float) -> None:
        if self.steps:
            self.passes_done += self.phase_passes
        self.phase, self.phase_passes, self.phase_began = name, passes, now
        self.phase_tokens = self.step = self.steps = 0

    def begin_layer(self, index: int, passes: float, now: float) -> None:
        self.index, self.passes, self.loss = index, max(passes, 1.0), None
        self.layer_began = now
        self.begin_phase("", passes, now)
        self.passes_done = 0.0

    def eta(self, now: float) -> float | None:
        """By the layers that this run has done, and before that by the passes of the first one."""
        done = self.index - self.first
        within = now - self.layer_began
        left = self.total - self.index
        if done > 0:
            return max(0.0, (self.layer_began - self.began) / done * left - within)
        passes = self.passes_done + (self.phase_passes * self.step / self.steps if self.steps else 0.0)
        share = min(passes / self.passes, 1.0)
        return within / share * left - within if share > 0 else None


@dataclass
class Events(Progress):
    """A Progress that makes events of its calls, and hands each to one receiver at a time.

    receive:  takes every event; one about work that goes on at most every `interval` seconds.
    kept:     what a later run can use if this one ends now; empty if nothing.
    is_over:  whether all work is done.
    """

    receive: Callable[[Event], None]
    interval: float = LINE_EVERY
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        self._receivers = [_Receiver(self.receive, self.interval, time.monotonic() + self.interval)]
        self._bytes, self._layers = _Bytes(), _Layers()
        self._in_layers = False
        self.kept = ""
        self.is_over = False
        self._lasting: list[str] = []
        self.detailed = True

    def also(self, receive: Callable[[Event], None], interval: float = LINE_EVERY) -> None:
        """Hand events to one more receiver."""
        self._receivers.append(_Receiver(receive, interval, time.monotonic() + interval))

    def say(self, text: str) -> None:
        """A message."""
        self._send(Event("message", text))

    def detail(self, text: str) -> None:
        """A detail."""
        self._send(Event("detail", text))

    def phase(self, name: str, passes: float = 1.0) -> None:
        """A phase, at once; within layers it goes with the steps."""
        with self._lock:
            now = time.monotonic()
            self._layers.begin_phase(name, passes, now)
            if not self._in_layers:
                self._send(Event("phase", name))
                return
            self._send_due(now, self._step)

    def keeps(self, what: str, *, lasting: bool = False) -> None:
        """No event: it matters if the run is interrupted, and is in `kept` then."""
        if lasting:
            self._lasting.append(what)
        self.kept = "; ".join([*self._lasting, *([] if lasting else [what])])

    def over(self) -> None:
        """No event: it matters if the run is interrupted."""
        self.is_over = True

    @property
    def doing(self) -> str:
        """What the run does now, for an error: `layer 3/32, rounding`, or a phase; empty if unknown."""
        layers = self._layers
        of_layers = f"layer {layers.index + 1}/{layers.total}" if self._in_layers else ""
        return ", ".join(filter(None, [of_layers, layers.phase]))

    def begin(self, nbytes: int, files: int, noun: str = "shard") -> None:
        """A terminal shows it at once, in place of what was before; lines only what follows."""
        with self._lock:
            self._in_layers = False
            kept = self._bytes.complete if noun == self._bytes.noun else 0  # were there before
            self._bytes = _Bytes(nbytes, kept + files, noun, time.monotonic(), complete=kept)
            for receiver in self._receivers:
                if receiver.interval < _AT_ONCE:
                    receiver.receive(self._bytes.event("bytes", "", time.monotonic()))

    def advance(self, nbytes: int) -> None:
        """Bytes, at most every so often."""
        with self._lock:
            self._bytes.done += nbytes
            self._send_due(time.monotonic(), lambda now: self._bytes.event("bytes", "", now))

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        """A file: `shard 2/7: FILE 5.0 GB`; `kept` in place of the numbers before `begin`."""
        with self._lock:
            work, now = self._bytes, time.monotonic()
            work.complete += 1
            of = f"{work.complete}/{work.files}" if work.files else "kept"
            origin = " (from an earlier run)" if reused else ""
            text = f"{work.noun} {of}: {file} {size(nbytes)}{origin}"
            self._send(work.event("file", text, now) if work.done else Event("file", text))
            self._put_off(now)

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        """A message with the number of layers and of tokens, and where an earlier run is continued."""
        with self._lock:
            now = time.monotonic()
            self._layers = _Layers(layers, done, tokens, now, done, now)
            self._in_layers = True
            text = f"running: {count(layers, 'layer')}, {tokens:,} tokens"
            if done:
                text += f"; resuming at layer {done + 1}, {count(done, 'layer')} done by an earlier run"
            self._send(Event("phase", text, done, layers))

    def begin_layer(self, name: str, index: int, passes: float = 1.0) -> None:
        """A step event, if one is due."""
        with self._lock:
            now = time.monotonic()
            self._layers.begin_layer(index, passes, now)
            self._send_due(now, self._step)

    def step(
        self, done: int, total: int, *, noun: str = "batch", tokens: int = 0, loss: float | None = None
    ) -> None:
        """Steps, at most every so often."""
        with self._lock:
            layers = self._layers
            layers.step, layers.steps = done, total
            layers.phase_tokens += tokens
            layers.loss = layers.loss if loss is None else loss
            self._send_due(time.monotonic(), lambda now: self._step(now, noun))

    def layer(self, name: str, index: int, note: str = "", seconds: float | None = None) -> None:
        """A layer: `layer 2/32: NAME 1.5 s, NOTE`. Of those that come in any order, the number is how
        many are done."""
        with self._lock:
            layers, now = self._layers, time.monotonic()
            if seconds is None:
                seconds = now - layers.layer_began
            else:
                index = layers.index
            more = f", {note}" if note else ""
            text = f"layer {index + 1}/{layers.total}: {name} {seconds:.1f} s{more}"
            layers.begin_layer(index + 1, 1.0, now)
            rate = layers.tokens / seconds if layers.tokens and seconds > 0 else None
            elapsed, eta = now - layers.began, layers.eta(now)
            self._send(
                Event("layer", text, index + 1, layers.total, rate=rate, elapsed=elapsed, eta=eta)
            )
            self._put_off(now)
            self._in_layers = index + 1 < layers.total

    def _step(self, now: float, noun: str = "") -> Event:
        layers = self._layers
        rate = None
        if layers.phase_tokens and now > layers.phase_began:
            rate = layers.phase_tokens / (now - layers.phase_began)
        steps = layers.step, layers.steps, noun
        if not self._in_layers:
            return Event("step", layers.phase, *steps, rate=rate)
        text = f"layer {layers.index + 1}/{layers.total}"
        text = " · ".join(filter(None, [text, layers.phase]))
        times = now - layers.began, layers.eta(now)
        return Event("step", text, *steps, layers.loss, rate, *times)

    def _send(self, event: Event) -> None:
        with self._lock:
            for receiver in self._receivers:
                receiver.receive(event)

    def _send_due(self, now: float, event_at: Callable[[float], Event]) -> None:
        """Send an event about work that goes on to receivers that have not had one for a while."""
        event = None
        for receiver in self._receivers:
            if now >= receiver.due:
                event = event or event_at(now)
                receiver.due = now + receiver.interval
                receiver.receive(event)

    def _put_off(self, now: float) -> None:
        for receiver in self._receivers:
            receiver.due = now + receiver.interval
