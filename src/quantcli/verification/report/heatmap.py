"""The heat map: layers x projections, coloured by one number of each module."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from quantcli.verification.report.charts import Chart, Mark, finite, text
from quantcli.verification.report.words import is_ok, middle, rank

Module = dict[str, Any]

_PLACE = re.compile(r"(?P<stack>.*?)\.?\b(?P<layer>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL)
_MEMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
OUTSIDE = "other"  # the column of modules that are in no layer
_MOST_ROWS = 40  # a decoder has fewer kinds than that; of more, the worst are kept
_ORDER = ("q_a", "q_b", "kv_a", "kv_b", "q_proj", "k_proj", "v_proj", "qkv", "o_proj", "gate", "up",
          "down")  # fmt: skip
_SPAN = 20.0  # dB that the colours cover at least: small differences must not look like large ones
_HARD = 2.0  # logarithm of the ratio that is coloured as bad, if none is larger
# pixels: of the whole map, of a cell, of a label below it
_WIDE, _NARROW, _BROAD, _TEXT, _TICK = 1150, 12, 60, 34, 26
_ROW, _ABOVE, _NAMES = 22, 24, 170  # of a row, above the first, of the names of rows
_STEPS = 24  # colours of the legend
_LETTERS = 24  # of a name that fit there
# bad to good; told apart by every kind of colour vision, and readable on white and on black
_COLORS = ((165, 0, 38), (244, 109, 67), (254, 224, 144), (207, 229, 240), (116, 176, 217))
_DARK = 110  # brightness, of 255, below which text is pale


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


@dataclass(frozen=True)
class Heat:
    """A heat map: its cells, the names of its rows, which stay when the cells scroll, its colours."""

    cells: Chart
    names: Chart
    legend: Chart


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
        [OUTSIDE if layer is None else str(layer) for layer in columns],
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
) -> Heat:
    """Layers x projections; cells that failed are framed, crossed, and pointed at from above.

    facts: names and values that the pointer shows of a module.
    floor: a value that is bad even if no module has it: the lowest limit.
    """
    low, high = _range(grid, quantity, floor)
    columns = len(grid.columns)
    side = min(max(_WIDE // max(columns, 1), _NARROW), _BROAD)
    bad = sorted(place for place, cell in grid.cells.items() if cell.failed)
    bad_rows, bad_columns = ({place[i] for place in bad} for i in (0, 1))
    height = _ABOVE + _ROW * len(grid.rows)
    marks = []
    for (row, column), cell in sorted(grid.cells.items()):
        x, y = side * column, _ABOVE + _ROW * row
        shade = _shade(quantity, cell, low, high)
        fill, dark = ("none", False) if shade is None else _color(shade, reverse=quantity.ratio)
        path = f"M{x} {y}h{side - 1}v{_ROW - 1}h-{side - 1}z"
        marks.append(Mark("path", {"d": path, "fill": fill}, tip=_tip(cell, facts)))
        if label := _in_cell(quantity, cell, side):
            classes = f"in{' pale' if dark else ''}{' marked' if cell.failed else ''}"
            marks.append(text(label, x + side / 2, y + _ROW / 2 + 4, classes))
    for row, column in bad:
        box = {"x": side * column, "y": _ABOVE + _ROW * row, "width": side - 1, "height": _ROW - 1}
        marks.append(Mark("rect", {"class": "frame", **box}))
    marks += [text("▼", side * (c + 0.5), _ABOVE - 6, "middle cross") for c in sorted(bad_columns)]
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * side >= _TICK or step == 100)
    for column, label in enumerate(grid.columns):
        near = any(abs(column - other) < every for other in bad_columns)
        if column in bad_columns or (column % every == 0 and not near) or label == OUTSIDE:
            kind = "middle marked" if column in bad_columns else "middle"
            marks.append(text(label, side * (column + 0.5), height + 16, kind))
    marks.append(text("layer", side * columns / 2, height + 34, "middle"))
    names = [
        text(middle(name, _LETTERS), _NAMES - 8, _ABOVE + _ROW * row + _ROW / 2 + 4,
             "end marked" if row in bad_rows else "end", (name,))
        for row, name in enumerate(grid.rows)
    ]  # fmt: skip
    title = (
        f"Heat map of {quantity.name}: {len(grid.rows)} projections by {columns} layers, "
        f"{sum(cell.failed for cell in grid.cells.values())} modules beyond their limits"
    )
    whole = height + 42
    # the last label may be wider than its cell
    room = side * columns + (14 if grid.columns[-1:] == [OUTSIDE] else 4)
    return Heat(
        Chart(title, whole, marks, "heat", max(room, 60)),
        Chart("projections", whole, names, "heat names", _NAMES),
        _legend(quantity, low, high),
    )


def _legend(quantity: Quantity, low: float, high: float) -> Chart:
    """The colours from the lowest to the highest value."""
    marks = []
    for step in range(_STEPS):
        fill, _ = _color(step / (_STEPS - 1), reverse=quantity.ratio)
        marks.append(Mark("path", {"d": f"M{10 * step} 0h10v12h-10z", "fill": fill}))
    right = 10 * _STEPS
    for x, kind, value in (
        (0, "", low),
        (right // 2, "middle", (low + high) / 2),
        (right, "end", high),
    ):
        end = 10**value if quantity.ratio else value
        marks.append(text(f"{end:.3g}", x, 26, kind))
    return Chart(f"Colours of {quantity.name}", 30, marks, "legend", right)


def _color(share: float, *, reverse: bool) -> tuple[str, bool]:
    """The colour of a place from 0, bad, to 1, good, and whether it is dark; `reverse`: 1 is bad."""
    place = (1 - share if reverse else share) * (len(_COLORS) - 1)
    index = min(int(place), len(_COLORS) - 2)
    ends = zip(_COLORS[index], _COLORS[index + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in ends)
    brightness = 0.3 * red + 0.59 * green + 0.11 * blue
    return f"#{red:02x}{green:02x}{blue:02x}", brightness < _DARK


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
    """The place between `low` and `high`, 0 to 1: what is infinite or NaN has the colour of an end."""
    value = quantity.value(cell.worst)
    if value is None:
        return None
    if not math.isfinite(value):
        return 1.0 if rank(value) > 0 else 0.0
    return min(max((_scaled(quantity, value) - low) / ((high - low) or 1.0), 0.0), 1.0)


def _in_cell(quantity: Quantity, cell: Cell, side: int) -> str:
    """What a cell of so many pixels has room for."""
    cross = "✕" if cell.failed else ""
    value = quantity.value(cell.worst)
    if value is None or side < _TEXT:
        return cross
    digits = f"{value:.3g}" if quantity.ratio else quantity.show(value).removesuffix(" dB")
    if cross and math.isfinite(value):
        digits = f"{value:.0f}"
    return f"{cross} {digits}".strip()


def _tip(cell: Cell, facts: Callable[[Module], list[tuple[str, str]]]) -> tuple[str, ...]:
    lines = [cell.worst["module"]]
    if cell.count > 1:
        failed = f", {cell.failed} failed" if cell.failed else ""
        lines.append(f"the worst of {cell.count}{failed}")
    if cell.failed:
        lines.append("✕ FAILED")
    return (*lines, *(f"{what}: {value}" for what, value in facts(cell.worst)))
