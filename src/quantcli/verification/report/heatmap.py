"""The heat map: layers x projections, coloured by one number of each module."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from quantcli.verification.report.charts import (
    BAD,
    TEXT,
    Figure,
    figure,
    finite,
    plain,
    plain_all,
    step,
    ticks,
)
from quantcli.verification.report.markup import Html, table, tag
from quantcli.verification.report.words import number, rank

# bad to good; told apart by every kind of colour vision, and readable on white and on black
_SCALE = ((0.0, "#a50026"), (0.25, "#f46d43"), (0.5, "#fee090"), (0.75, "#cfe5f0"), (1.0, "#74b0d9"))
_SPAN = 20.0  # dB that the colours cover at least: small differences are not to look like large ones
_HARD = 2.0  # logarithm of the ratio that is coloured as bad, if none is larger
_ROOM = 16  # columns in which a number with decimals and a cross fit


@dataclass(frozen=True)
class Quantity:
    """One number of each module: its short name and its long one, how it is read, shown, coloured."""

    name: str
    about: str
    value: Callable[[Module], float | None]
    show: Callable[[float | None], str]
    ratio: bool = False  # coloured by its logarithm, and large is bad


def heat_map(
    grid: Grid,
    quantity: Quantity,
    facts: Callable[[Module], list[tuple[str, str]]],
    floor: float | None,
) -> Figure:
    """Layers x projections; cells that failed are framed, crossed, and pointed at from above.

    facts: what the pointer shows of a module.
    floor: a value that is bad, though no module may have it: the lowest limit.
    """
    low, high = _range(grid, quantity, floor)
    columns, rows = range(len(grid.columns)), range(len(grid.rows))

    def each(of: Callable[[Cell], Any], none: Any) -> list[list[Any]]:
        table = [[grid.cells.get((row, column)) for column in columns] for row in rows]
        return [[none if cell is None else of(cell) for cell in line] for line in table]

    bad = grid.bad
    bad_columns = sorted({column for _, column in bad})
    heat = {
        "type": "heatmap",
        "z": each(lambda cell: _shade(quantity, cell, low, high), None),
        "text": each(lambda cell: _in_cell(quantity, cell, len(grid.columns)), ""),
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "hovertext": each(lambda cell: _hover(cell, facts), ""),
        "hoverinfo": "text",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "zmin": low,
        "zmax": high,
        "colorscale": [list(stop) for stop in _SCALE],
        "reversescale": quantity.ratio,
        "colorbar": {
            "title": {"text": plain(quantity.name), "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
            **(_log_ticks(low, high) if quantity.ratio else {}),
        },
    }
    frames: list[tuple[float | None, float | None]] = []
    for row, column in bad:
        left, right, top, bottom = column - 0.5, column + 0.5, row - 0.5, row + 0.5
        frames += [
            (left, top),
            (right, top),
            (right, bottom),
            (left, bottom),
            (left, top),
            (None, None),
        ]
    frame = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in frames],
        "y": [y for _, y in frames],
        "line": {"color": TEXT, "width": 3},
        "hoverinfo": "skip",
        "showlegend": False,
        "name": "failed",
    }
    arrows = [
        {"x": column, "y": -0.5, "text": "<b>▼</b>", "showarrow": False, "yshift": 12,
         "font": {"color": BAD, "size": 16 if len(columns) <= 2 * _ROOM else 11}}
        for column in bad_columns
    ]  # fmt: skip
    above = 34 if bad else 10
    layout = {
        "height": 22 * max(len(grid.rows), 3) + 56 + above,
        "margin": {"l": 10, "r": 10, "t": above, "b": 44},
        "xaxis": {
            "title": {"text": "layer", "standoff": 8},
            **ticks(plain_all(grid.columns), bad_columns, step=step(len(grid.columns))),
            "range": [-0.5, len(grid.columns) - 0.5],
            "showgrid": False,
            "zeroline": False,
        },
        "yaxis": {
            **ticks(plain_all(grid.rows), sorted({row for row, _ in bad})),
            "range": [len(grid.rows) - 0.5, -0.5],
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
        },
        "annotations": arrows,
    }
    return figure([heat, *([frame] if bad else [])], layout)


def _range(grid: Grid, quantity: Quantity, floor: float | None) -> tuple[float, float]:
    """The values between which colours run."""
    worsts = [finite(quantity.value(cell.worst)) for cell in grid.cells.values()]
    values = [_scaled(quantity, value) for value in worsts if value is not None]
    if quantity.ratio:
        return 0.0, max([_HARD, *values])
    high = max(values, default=_SPAN)
    low = min([high if floor is None else floor, *values, high - _SPAN])
    return low, high


def _scaled(quantity: Quantity, value: float) -> float:
    return math.log10(max(value, 1.0)) if quantity.ratio else value


def _shade(quantity: Quantity, cell: Cell, low: float, high: float) -> float | None:
    """The number that is coloured: what is infinite or NaN has the colour of an end."""
    value = quantity.value(cell.worst)
    if value is None:
        return None
    if not math.isfinite(value):
        return high if (rank(value) > 0) else low
    return _scaled(quantity, value)


def _in_cell(quantity: Quantity, cell: Cell, columns: int) -> str:
    cross = "✕" if cell.failed else ""
    value = quantity.value(cell.worst)
    digits = quantity.show(value).removesuffix(" dB")
    if quantity.ratio and value is not None:
        digits = f"{value:.3g}"
    elif cross and columns > _ROOM and value is not None and math.isfinite(value):
        digits = f"{value:.0f}"
    elif cross and cell.count > 1:
        digits += f" ({cell.failed} of {cell.count} failed)"
    return f"<b>{cross} {digits}</b>" if cross else digits


def _hover(cell: Cell, facts: Callable[[Module], list[tuple[str, str]]]) -> str:
    lines = [f"<b>{plain(cell.worst['module'], 160)}</b>"]
    if cell.count > 1:
        failed = f", {cell.failed} failed" if cell.failed else ""
        lines.append(f"the worst of {cell.count}{failed}")
    if cell.failed:
        lines.append("<b>✕ FAILED</b>")
    return "<br>".join([*lines, *(f"{what}: {plain(value, 160)}" for what, value in facts(cell.worst))])


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    steps = [m * 10**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 3)]
    ticks = [step for step in steps if low - 1e-9 <= math.log10(step) <= high + 1e-9]
    return {"tickvals": [math.log10(s) for s in ticks], "ticktext": [number(float(s)) for s in ticks]}


def size(grid: Grid) -> str:
    """28 layers ..., for those who do not see it."""
    return f"{len(grid.rows)} projections by {len(grid.columns)} layers"


def left_out(grid: Grid) -> str:
    """A sentence on what a grid has no room for."""
    return (
        f" The worst kinds only; {grid.rows_left_out:,} more are not shown."
        if grid.rows_left_out
        else ""
    )


def numbers(grid: Grid, quantity: Quantity) -> Html:
    """The map as a table, folded."""
    columns = range(len(grid.columns))
    rows = []
    for place, row in enumerate(grid.rows):
        cells = [grid.cells.get((place, column)) for column in columns]
        texts = ["" if c is None else quantity.show(quantity.value(c.worst)) for c in cells]
        marks = [c is not None and c.failed > 0 for c in cells]
        rows.append(
            [
                row,
                *(tag("span", t, class_="bad") if m else t for t, m in zip(texts, marks, strict=True)),
            ]
        )
    grid_table = table(f"{quantity.name}, layers in columns", ["projection", *grid.columns], rows)
    return tag("details", tag("summary", "the same in numbers"), grid_table)


Module = dict[str, Any]

_PLACE = re.compile(r"(?P<stack>.*?)\.?\b(?P<layer>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL)

_MEMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")

_OUTSIDE = "other"  # the column of modules that are in no layer

_MOST_ROWS = 60  # a decoder has fewer kinds than that; of more, the worst are kept

_ORDER = ("q_a", "q_b", "kv_a", "kv_b", "q_proj", "k_proj", "v_proj", "qkv", "o_proj", "gate", "up",
          "down")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Modules of one kind in one layer: experts share a cell."""

    worst: Module
    count: int
    failed: int


@dataclass(frozen=True)
class Grid:
    """rows are kinds of projections, columns are layers."""

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], Cell]
    rows_left_out: int

    @property
    def bad(self) -> list[tuple[int, int]]:
        """Places of cells in which something failed."""
        return sorted(place for place, cell in self.cells.items() if cell.failed)


def lay_out(modules: Iterable[Module], badness: Callable[[Module], Any]) -> Grid:
    """Every module in its cell; of several in one cell the first by `badness` stands for all."""
    placed: dict[tuple[str, str, int | None], list[Module]] = defaultdict(list)
    for module in modules:
        name = module["module"]
        if match := _PLACE.fullmatch(name):
            kind = _MEMBER.sub("*", "." + match["rest"])[1:]
            placed[match["stack"], kind, int(match["layer"])].append(module)
        else:
            placed["", name, None].append(module)
    stacks = Counter(stack for stack, _, layer in placed if layer is not None)
    titles = {
        (stack, kind): kind if layer is None or len(stacks) < 2 else f"{stack}: {kind}"
        for stack, kind, layer in placed
    }
    keys = sorted(titles, key=lambda key: (-stacks[key[0]], key[0], *_order(key[1])))
    cells = {
        place: Cell(min(members, key=badness), len(members), sum(m.get("ok") is False for m in members))
        for place, members in placed.items()
    }
    left_out = max(0, len(keys) - _MOST_ROWS)
    if left_out:
        worst: dict[tuple[str, str], Any] = {}
        for (stack, kind, _), cell in cells.items():
            key = badness(cell.worst)
            worst[stack, kind] = min(worst.get((stack, kind), key), key)
        kept = set(sorted(keys, key=worst.__getitem__)[:_MOST_ROWS])
        keys = [key for key in keys if key in kept]
    rows = {key: index for index, key in enumerate(keys)}
    layers = sorted({layer for *key, layer in placed if layer is not None and tuple(key) in rows})
    columns: dict[int | None, int] = {layer: index for index, layer in enumerate(layers)}
    columns[None] = len(layers)
    outside = any(layer is None and (stack, kind) in rows for stack, kind, layer in placed)
    return Grid(
        [titles[key] for key in keys],
        [*map(str, layers), *([_OUTSIDE] if outside else [])],
        {
            (rows[stack, kind], columns[layer]): cell
            for (stack, kind, layer), cell in cells.items()
            if (stack, kind) in rows
        },
        left_out,
    )


def _order(kind: str) -> tuple[bool, int, str]:
    """Attention before the rest, and as data flows through them."""
    last = kind.rpartition(".")[2]
    place = next((i for i, word in enumerate(_ORDER) if last.startswith(word)), len(_ORDER))
    return "attn" not in kind, place, kind
