"""Charts as SVG: the marks they consist of. Layer outputs, perplexity, histograms, parts of a whole.

A chart has a fixed height. Its width is that of the page: horizontal places are percentages, so that
text keeps its size on a narrow screen. Colours are classes of page.css, so that a chart follows the
page into dark mode and onto paper. The templates escape each text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from quantcli.verification.report import words
from quantcli.verification.report.words import is_ok, number

_AROUND = 66  # pixels above and below the plotted area, for ticks: see `.plot` in page.css
_POINTS = 200  # windows of text that a chart shows one by one
_TICKS = 5
_SMALL = 1e-9  # of a step between ticks


@dataclass(frozen=True)
class Mark:
    """An SVG element: tag, attributes, text, and lines that the pointer shows there."""

    tag: str
    attributes: Mapping[str, object]
    text: str = ""
    tip: tuple[str, ...] = ()

    @property
    def tip_text(self) -> str:
        """The lines of the tip; untrusted names in them are harmless, but not escaped."""
        return "\n".join(words.literal(line, 300) for line in self.tip)


@dataclass(frozen=True)
class Chart:
    """Marks in an area of some height in pixels.

    title: what it shows, for those who cannot see it.
    kind:  its class in page.css: "plot" has room for ticks around it, "bare" has none.
    width: in pixels; None for the width of the page.
    keys:  the legend: class and text of each colour.
    """

    title: str
    height: float
    marks: list[Mark]
    kind: str = "plot"
    width: float | None = None
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def has_tips(self) -> bool:
        """Whether the pointer shows something."""
        return any(mark.tip for mark in self.marks)


def layer_line(layers: Sequence[dict[str, Any]]) -> Chart:
    """SQNR in dB of each layer's output, by itself and after all before it; limits and failures."""
    own = [finite(layer.get("sqnr_db")) for layer in layers]
    after = [finite(layer.get("cumulative_db")) for layer in layers]
    limits = [finite(layer.get("limit_db")) for layer in layers]
    tips = [
        (
            layer["layer"],
            *(f"{what} {value}" for what, value in words.layer_facts(layer)),
            *(() if is_ok(layer) else ("✕ FAILED",)),
        )
        for layer in layers
    ]
    scale = Scale.of([*own, *after, *limits], height=240)
    labels = [layer["layer"].rpartition(".")[2] for layer in layers]
    bad = {place for place, layer in enumerate(layers) if not is_ok(layer)}
    marks = [*scale.grid("dB"), *ticks(labels, bad, scale.height, "layer")]
    marks += [*line(limits, scale, "limit"), *line(after, scale, "two", tips)]
    marks += line(own, scale, "one", tips)
    for place in sorted(bad):
        # a layer without a finite SQNR is marked at the bottom
        value = own[place]
        y = scale.height if value is None else scale.y(value)
        marks.append(text("✕", at(place, len(layers)), y + 5, "cross", tips[place]))
    keys = {"one": "the layer by itself", "two": "after all layers before it", "limit": "limit"}
    title = f"SQNR of the outputs of {len(layers)} layers, {len(bad)} below the limit"
    return Chart(title, scale.height + _AROUND, marks, keys=keys)


def perplexity_lines(windows: Sequence[dict[str, float]]) -> tuple[Chart, Chart]:
    """Perplexity of each window of text, and the change from the reference in percent.

    Of more than 200 windows, neighbours share a point: the geometric mean.
    """
    group = -(-len(windows) // _POINTS)
    pairs = [
        (_mean(part, "reference"), _mean(part, "checkpoint"))
        for part in (windows[i : i + group] for i in range(0, len(windows), group))
    ]
    changes = [100 * (b / a - 1) if a and b is not None else None for a, b in pairs]
    names = [f"{i * group}" if group == 1 else f"{i * group} to {(i + 1) * group - 1}"
             for i in range(len(pairs))]  # fmt: skip
    tips = [
        (
            f"window {name}",
            f"reference {number(a)}",
            f"checkpoint {number(b)}",
            f"change {'-' if c is None else f'{c:+.2f} %'}",
        )
        for name, (a, b), c in zip(names, pairs, changes, strict=True)
    ]
    labels = [str(i * group) for i in range(len(pairs))]
    scale = Scale.of([value for pair in pairs for value in pair], height=200)
    marks = [*scale.grid("perplexity"), *ticks(labels, (), scale.height, "window of text")]
    marks += line([a for a, _ in pairs], scale, "one", tips)
    marks += line([b for _, b in pairs], scale, "two", tips)
    keys = {"one": "reference", "two": "checkpoint"}
    title = f"Perplexity of {len(windows)} windows of text, reference and checkpoint"
    lines = Chart(title, scale.height + _AROUND, marks, keys=keys)
    scale = Scale.of([*changes, 0.0], height=90)
    marks = [*scale.grid("change, %"), *ticks(labels, (), scale.height, "window of text")]
    for place, change in enumerate(changes):
        if change is not None:
            ends = sorted((scale.y(change), scale.y(0.0)))
            marks.append(_bar(place, len(changes), ends, "muted", tips[place]))
    title = f"Change of perplexity in percent, {len(windows)} windows of text"
    return lines, Chart(title, scale.height + _AROUND, marks)


def _mean(windows: Sequence[dict[str, float]], key: str) -> float | None:
    """The geometric mean; None if a value is not finite."""
    values = [finite(window.get(key)) for window in windows]
    if len(values) == 1:
        return values[0]
    if not all(values):
        return None
    return math.exp(sum(math.log(value) for value in values if value) / len(values))


def histogram(title: str, counts: Sequence[float], edges: Sequence[float]) -> Chart:
    """How often each error occurs: the share of `counts` between `edges`, on a logarithmic axis."""
    whole = sum(counts) or 1
    least = min((count / whole for count in counts if count), default=1.0)
    lowest = min(-3, math.floor(math.log10(least)))
    height = 130
    marks = []
    for power in range(lowest, 1):
        y = height * power / lowest
        marks += [rule(y), text(f"{100 * 10.0**power:.4g} %", -6, y + 4, "end")]
    span = edges[-1] - edges[0]
    for (a, b), count in zip(pairwise(edges), counts, strict=True):
        if count:
            y = min(height * math.log10(count / whole) / lowest, height - 1)
            tip = (
                f"{number(a)} to {number(b)}",
                f"{number(round(count))} of {number(round(whole))} values",
            )
            x, width = 100 * (a - edges[0]) / span, 100 * (b - a) / span
            box = {"x": percent(x), "width": percent(width), "y": tidy(y), "height": tidy(height - y)}
            marks.append(Mark("rect", {"class": "one", **box}, tip=tip))
    for edge in edges[:: max(1, (len(edges) - 1) // 4)]:
        marks.append(text(number(edge), percent(100 * (edge - edges[0]) / span), height + 16, "middle"))
    return Chart(title, height + _AROUND, marks)


def shares(title: str, parts: Sequence[tuple[str, float, tuple[str, ...]]]) -> Chart:
    """One bar of parts side by side. parts: class, size, and what the pointer shows of each."""
    whole = sum(size for _, size, _ in parts) or 1
    marks, x = [], 0.0
    for kind, size, tip in parts:
        width = 100 * size / whole
        box = {"x": percent(x), "width": percent(width), "y": 0, "height": 26}
        marks.append(Mark("rect", {"class": f"part {kind}", **box}, tip=tip))
        x += width
    return Chart(title, 26, marks, "bare")


@dataclass(frozen=True)
class Entry:
    """A row of a chart that compares: its value, as text too, the interval around it, whether it is ok.

    about: what the pointer shows.
    """

    name: str
    value: float | None
    text: str
    about: str
    ends: Sequence[float] | None = None
    ok: bool = True


def compared(title: str, entries: Sequence[Entry], *, bars: bool) -> Chart:
    """One row for each entry, below its name: a bar from 0, or a point; and its interval."""
    ends = [end for entry in entries for end in (entry.value, *(entry.ends or ())) if end is not None]
    high = max(ends, default=1.0)
    low = min([0.0, *ends]) if bars else min(ends, default=0.0)
    pad = 0.0 if bars else 0.06 * ((high - low) or 1.0)
    low, span = low - pad, (high - low + 2 * pad) or 1.0
    marks = []
    for row, entry in enumerate(entries):
        y = 44 * row
        tip = (entry.name, entry.about, *(() if entry.ok else ("✕ FAILED",)))
        name = words.middle(entry.name, 26)
        marks.append(
            text(name if entry.ok else f"✕ {name}", 0, y + 13, "name" if entry.ok else "name bad")
        )
        if entry.value is None:
            marks.append(text("not measured", 0, y + 31))
            continue
        marks.append(text(entry.text, "100%", y + 13, "end"))
        x = 100 * (entry.value - low) / span
        kind = "one" if entry.ok else "failed"
        if bars:
            zero = 100 * -low / span
            place = {"x": percent(min(x, zero)), "width": percent(max(abs(x - zero), 0.3))}
            marks.append(Mark("rect", {"class": kind, "y": y + 20, "height": 14, **place}, tip=tip))
        if entry.ends is not None:
            places = [percent(100 * (end - low) / span) for end in entry.ends]
            across = {"x1": places[0], "x2": places[1], "y1": y + 27, "y2": y + 27}
            marks.append(Mark("line", {"class": "span", **across}, tip=tip))
            for end in places:
                mark = {"class": "span", "x1": end, "x2": end, "y1": y + 22, "y2": y + 32}
                marks.append(Mark("line", mark))
        if not bars:
            at_value = {"cx": percent(x), "cy": y + 27, "r": 5}
            marks.append(Mark("circle", {"class": kind, **at_value}, tip=tip))
    return Chart(title, 44 * len(entries), marks, "bare")


@dataclass(frozen=True)
class Scale:
    """A vertical axis: values from `low` at the bottom to `high` at the top, `height` in pixels."""

    low: float
    high: float
    step: float
    height: float

    @classmethod
    def of(cls, values: Iterable[float | None], height: float) -> Scale:
        """An axis that shows all these values, and ends at ticks."""
        numbers = [value for value in values if value is not None]
        low, high = min(numbers, default=0.0), max(numbers, default=1.0)
        spread = high - low or abs(high) or 1.0
        step = 10.0 ** math.floor(math.log10(spread / _TICKS))
        step *= next(m for m in (1, 2, 5, 10) if spread / (m * step) <= _TICKS)
        return cls(
            math.floor(low / step + _SMALL) * step, math.ceil(high / step - _SMALL) * step, step, height
        )

    def y(self, value: float) -> float:
        """The place of a value, in pixels from the top."""
        return self.height * (self.high - value) / ((self.high - self.low) or 1.0)

    def grid(self, unit: str) -> Iterator[Mark]:
        """Lines with their values, and the unit above."""
        yield text(unit, -56, -12)
        for index in range(round((self.high - self.low) / self.step) + 1):
            value = self.low + index * self.step
            yield rule(self.y(value))
            yield text(f"{value:.6g}", -6, self.y(value) + 4, "end")


def line(
    values: Sequence[float | None], scale: Scale, kind: str, tips: Sequence[tuple[str, ...]] = ()
) -> Iterator[Mark]:
    """A line through values side by side, broken where one is None; a point for each if it has tips."""
    places = [
        None if v is None else (at(i, len(values)), tidy(scale.y(v))) for i, v in enumerate(values)
    ]
    for start, end in pairwise(places):
        if start is not None and end is not None:
            ends = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
            yield Mark("line", {"class": kind, **ends})
    for place, tip in zip(places, tips, strict=False):
        if place is not None:
            yield Mark("circle", {"class": kind, "cx": place[0], "cy": place[1], "r": 3}, tip=tip)


def ticks(labels: Sequence[str], marked: Iterable[int], height: float, title: str) -> Iterator[Mark]:
    """Labels below an area and what they are of. Those that have no room on a narrow screen are `fine`.

    Marked ones are always there; others that would run into one are not.
    """
    bold = set(marked)
    count = len(labels)
    coarse = _step(count, 12)
    step = _step(count, 40)
    for place, label in enumerate(labels):
        if place in bold:
            yield text(words.literal(label, 12), at(place, count), height + 18, "middle marked")
        elif place % step == 0 and not any(abs(place - other) < step for other in bold if step > 1):
            near = any(abs(place - other) < coarse for other in bold)
            kind = "middle" if place % coarse == 0 and not near else "middle fine"
            yield text(words.literal(label, 12), at(place, count), height + 18, kind)
    yield text(title, "50%", height + 36, "middle")


def _step(count: int, most: int) -> int:
    """The least of 1, 2, 5, 10 and so on that leaves at most `most` of `count`."""
    step = 1
    while count > most * step:
        step = step * 5 // 2 if str(step).startswith("2") else step * 2
    return step


def at(place: int, count: int) -> str:
    """The middle of one of `count` places side by side."""
    return percent(100 * (place + 0.5) / count)


def percent(value: float) -> str:
    """A horizontal place, or a width."""
    return f"{tidy(value)}%"


def tidy(value: float) -> float:
    """A coordinate with as many digits as can be seen."""
    rounded = round(value, 2)
    return round(rounded) if rounded == round(rounded) else rounded


def rule(y: float) -> Mark:
    """A line across the area."""
    return Mark("line", {"class": "grid", "x1": 0, "x2": "100%", "y1": tidy(y), "y2": tidy(y)})


def text(content: str, x: str | float, y: float, kind: str = "", tip: tuple[str, ...] = ()) -> Mark:
    """Text at a place; `kind` are classes."""
    own: dict[str, object] = {"class": kind} if kind else {}
    return Mark("text", {**own, "x": x, "y": tidy(y)}, content, tip)


def _bar(place: int, count: int, ends: Sequence[float], kind: str, tip: tuple[str, ...]) -> Mark:
    width = 100 / count
    x, height = width * (place + 0.1), max(ends[1] - ends[0], 1)
    box = {"x": percent(x), "width": percent(0.8 * width), "y": tidy(ends[0]), "height": tidy(height)}
    return Mark("rect", {"class": kind, **box}, tip=tip)


def finite(value: float | None) -> float | None:
    """`value` if a chart can place it."""
    return value if value is not None and math.isfinite(value) else None
