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
    finite,
    layer_axis,
    line,
    plain,
    ticks,
)
from quantcli.verification.report.words import is_ok, number, rank

Module = dict[str, Any]

_PLACE = re.compile(r"(?P<stack>.*?)\.?\b(?P<layer>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL)
_MEMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
_OUTSIDE = "other"  # the column of modules that are in no layer
_MOST_ROWS = 60  # a decoder has fewer kinds than that; of more, the worst are kept
_ORDER = ("q_a", "q_b", "kv_a", "kv_b", "q_proj", "k_proj", "v_proj", "qkv", "o_proj", "gate", "up",
          "down")  # fmt: skip
_SPAN = 20.0  # dB that the colours cover at least: small differences must not look like large ones
_HARD = 2.0  # logarithm of the ratio that is coloured as bad, if none is larger
_ROOM = 16  # columns in which a number with decimals and a cross fit
_FRAME = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (math.nan, math.nan))


@dataclass(frozen=True)
class Quantity:
    """One number of each module: its short and its long name, how it is read, shown, coloured."""

    name: str
    about: str
    value: Callable[[Module], float | None]
    show: Callable[[float | None], str]
    ratio: bool = False  # coloured by its logarithm, and large is bad

    def text(self, module: Module) -> str:
        """A module's number as people read it."""
        return self.show(self.value(module))


@dataclass(frozen=True)
class Cell:
    """Modules of one kind in one layer: experts share a cell."""

    worst: Module
    count: int
    failed: int


@dataclass(frozen=True)
class Grid:
    """Rows are kinds of projections, columns are layers; a cell is at (row, column)."""

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], Cell]
    rows_left_out: int

    def table(self, of: Callable[[Cell], Any], empty: Any) -> list[list[Any]]:
        """`of` each cell by row and column; `empty` if there is none."""
        return [
            [
                empty if (cell := self.cells.get((row, column))) is None else of(cell)
                for column in range(len(self.columns))
            ]
            for row in range(len(self.rows))
        ]


def lay_out(modules: Iterable[Module], badness: Callable[[Module], Any]) -> Grid:
    """Every module in its cell; of several in one cell the first by `badness` stands for all."""
    placed: dict[tuple[tuple[str, str], int | None], list[Module]] = defaultdict(list)
    for module in sorted(modules, key=badness):
        if match := _PLACE.fullmatch(module["module"]):
            kind = _MEMBER.sub("*", "." + match["rest"])[1:]
            placed[(match["stack"], kind), int(match["layer"])].append(module)
        else:
            placed[("", module["module"]), None].append(module)
    stacks = Counter(stack for (stack, _), layer in placed if layer is not None)
    titles = {  # in the order of badness
        row: row[1] if layer is None or len(stacks) < 2 else ": ".join(row) for row, layer in placed
    }
    keys = sorted(list(titles)[:_MOST_ROWS], key=lambda row: (-stacks[row[0]], row[0], *_order(row[1])))
    rows = {row: place for place, row in enumerate(keys)}
    layers = {layer for row, layer in placed if row in rows}
    columns = sorted(layers, key=lambda layer: math.inf if layer is None else layer)
    place = {layer: place for place, layer in enumerate(columns)}
    cells = {
        (rows[row], place[layer]): Cell(members[0], len(members), sum(not is_ok(m) for m in members))
        for (row, layer), members in placed.items()
        if row in rows
    }
    return Grid(
        [titles[row] for row in rows],
        [_OUTSIDE if layer is None else str(layer) for layer in columns],
        cells,
        len(titles) - len(rows),
    )


def _order(kind: str) -> tuple[bool, int, str]:
    """Attention before the rest, and as data flows through them."""
    last = kind.rpartition(".")[2]
    place = next((i for i, word in enumerate(_ORDER) if last.startswith(word)), len(_ORDER))
    return "attn" not in kind, place, kind


def heat_map(
    grid: Grid,
    quantity: Quantity,
    facts: Callable[[Module], list[tuple[str, str]]],
    floor: float | None = None,
) -> Figure:
    """Layers x projections; cells that failed are framed, crossed, and pointed at from above.

    facts: names and values that the pointer shows of a module.
    floor: a value that is bad even if no module has it: the lowest limit.
    """
    low, high = _range(grid, quantity, floor)
    bad = sorted(place for place, cell in grid.cells.items() if cell.failed)
    bad_rows, bad_columns = ({place[i] for place in bad} for i in (0, 1))
    colors = _log_ticks(low, high) if quantity.ratio else {}
    heat = {
        "type": "heatmap",
        "z": grid.table(lambda cell: _shade(quantity, cell, low, high), None),
        "text": grid.table(lambda cell: _in_cell(quantity, cell, len(grid.columns)), ""),
        "hovertext": grid.table(lambda cell: _hover(cell, facts), ""),
        "zmin": low,
        "zmax": high,
        "reversescale": quantity.ratio,
        "colorbar": {"title": {"text": plain(quantity.name), "side": "right"}, **colors},
    }
    # one line around all that failed, with a gap after each cell
    x = [finite(column + dx) for _, column in bad for dx, _ in _FRAME]
    y = [finite(row + dy) for row, _ in bad for _, dy in _FRAME]
    thick = {"color": TEXT, "width": 3}
    frame = line("failed", y, TEXT, x=x, mode="lines", line=thick, showlegend=False)
    font = {"color": BAD, "size": 16 if len(grid.columns) <= 2 * _ROOM else 11}
    arrow = {"y": -0.5, "text": "<b>▼</b>", "showarrow": False, "yshift": 12, "font": font}
    above = 34 if bad else 10
    bare = {"showgrid": False, "zeroline": False}
    xaxis, yaxis = layer_axis(grid.columns, bad_columns), ticks(grid.rows, bad_rows)
    layout = {
        "height": 22 * max(len(grid.rows), 3) + 56 + above,
        "margin": {"l": 10, "r": 10, "t": above, "b": 44},
        "xaxis": {**xaxis, **bare, "title": {"text": "layer", "standoff": 8}},
        "yaxis": {**yaxis, **bare, "range": [len(grid.rows) - 0.5, -0.5], "automargin": True},
        "annotations": [{**arrow, "x": column} for column in sorted(bad_columns)],
    }
    return {"data": [heat, *([frame] if bad else [])], "layout": layout}


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
