"""The section of docs/cluster.md that benchmarks/cluster.py writes, and its curve as SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common import ROOT

if TYPE_CHECKING:
    from cluster import Outcome

PAGE = ROOT / "docs" / "cluster.md"
CURVE = ROOT / "docs" / "images" / "cluster.svg"
BEGIN, END = (
    "<!-- benchmarks/cluster.py --write: begin -->",
    "<!-- benchmarks/cluster.py --write: end -->",
)
CELLS = "Cells: time, ratio to the theoretical minimum (what limits it)."
COLOURS = ("#0a5ab4", "#14803c", "#be2328")
WIDTH, HEIGHT, LEFT, TOP, GAP = 290, 210, 52, 34, 70  # of a panel, in pixels


def write(facts: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Put the facts, a table for each workload and the curve into the page."""
    lines = [*(f"* {fact}" for fact in facts), ""]
    lines += [f"![time over nodes](images/{CURVE.name})", "", CELLS, ""]
    for workload in dict.fromkeys(one.workload for one in outcomes):
        lines += [*_table([one for one in outcomes if one.workload == workload]), ""]
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    text = "\n".join([BEGIN, "", *lines, END])
    page, count = pattern.subn(lambda _: text, PAGE.read_text())
    if count != 1:
        raise SystemExit(f"{PAGE} has no lines `{BEGIN}` and `{END}`")
    PAGE.write_text(page)
    CURVE.write_text(curve(outcomes))


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    """Rows by nodes, columns by storage: time, over the bound, and what sets the bound."""
    storages = list(dict.fromkeys(one.storage for one in outcomes))
    lines = [
        " | ".join([f"| {outcomes[0].workload}: nodes", *storages]) + " |",
        "|---:" + "|---" * len(storages) + "|",
    ]
    for nodes in dict.fromkeys(one.nodes for one in outcomes):
        row = [one for one in outcomes if one.nodes == nodes]
        lines.append(" | ".join([f"| {nodes}", *map(_cell, row)]) + " |")
    return lines


def _cell(one: Outcome) -> str:
    slowest = max(one.bounds, key=lambda stage: one.bounds[stage].seconds)
    stage = f"{slowest}: " if len(one.bounds) > 1 else ""
    return f"{duration(one.total)}, {one.over:.2f} x ({stage}{one.bounds[slowest].by})"


def duration(seconds: float) -> str:
    """Such as 42 s, 7.1 min or 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def curve(outcomes: Sequence[Outcome]) -> str:
    """A panel for each workload: time over nodes, both by factors; bounds are dashed."""
    workloads = list(dict.fromkeys(one.workload for one in outcomes))
    storages = list(dict.fromkeys(one.storage for one in outcomes))
    wide = LEFT + (WIDTH + GAP) * len(workloads)
    high = TOP + HEIGHT + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" '
        f'height="{high}" font-family="sans-serif" font-size="11" fill="#24292f">',
        f'<rect width="{wide}" height="{high}" fill="#fafafa"/>',
    ]
    for place, workload in enumerate(workloads):
        own = [one for one in outcomes if one.workload == workload]
        parts += _panel(own, storages, LEFT + place * (WIDTH + GAP))
    for place, storage in enumerate(storages):
        x, y = LEFT + 170 * place, high - 14
        parts.append(f'<path d="M{x} {y - 4}h22" stroke="{COLOURS[place]}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 28}" y="{y}">{storage}</text>')
    x = LEFT + 170 * len(storages)
    parts.append(f'<path d="M{x} {high - 18}h22" stroke="#777" stroke-dasharray="3 3"/>')
    parts.append(f'<text x="{x + 28}" y="{high - 14}">bound</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(outcomes: Sequence[Outcome], storages: Sequence[str], left: float) -> list[str]:
    """Axes and lines of one workload."""
    nodes = sorted({one.nodes for one in outcomes})
    bounds = {id(one): sum(b.seconds for b in one.bounds.values()) for one in outcomes}
    low = min(bounds.values())
    high = max(one.total for one in outcomes)
    marks = [mark for mark in _MARKS if low / 2 < mark < high * 2]
    low, high = min(low, marks[0]), max(high, marks[-1])

    def x(count: int) -> float:
        return left + WIDTH * math.log(count / nodes[0]) / math.log(nodes[-1] / nodes[0])

    def y(seconds: float) -> float:
        return TOP + HEIGHT * math.log(high / seconds) / math.log(high / low)

    parts = [f'<text x="{left}" y="{TOP - 16}" font-weight="bold">{outcomes[0].workload}</text>']
    for mark in marks:
        parts.append(f'<path d="M{left} {y(mark):.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{_mark(mark)}</text>'
        )
    for count in nodes:
        parts.append(
            f'<text x="{x(count):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{count}</text>'
        )
    middle = left + WIDTH / 2
    parts.append(f'<text x="{middle}" y="{TOP + HEIGHT + 31}" text-anchor="middle">nodes</text>')
    for colour, storage in zip(COLOURS, storages, strict=False):
        own = [one for one in outcomes if one.storage == storage]
        for style, values in (
            ('stroke-dasharray="3 3"', [(one.nodes, bounds[id(one)]) for one in own]),
            ('stroke-width="2"', [(one.nodes, one.total) for one in own]),
        ):
            points = " ".join(f"{x(count):.1f},{y(seconds):.1f}" for count, seconds in values)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>')
    return parts


_MARKS = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 18000, 36000, 86400, 172800, 432000, 864000)


def _mark(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
