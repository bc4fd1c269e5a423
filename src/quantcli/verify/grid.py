"""Modules laid out as layers x projections."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Module = dict[str, Any]

_PLACE = re.compile(r"(?P<stack>.*?)\.?\b(?P<layer>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL)
_MEMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
_OUTSIDE = "other"  # the column of modules that are in no layer
_MOST_ROWS = 60  # more kinds than that are no decoder's: the worst are kept
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
