"""The page of a model's outlier channels: what will be hard to quantize, and where."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

from quantcli.verification.report import words
from quantcli.verification.report.document import render
from quantcli.verification.report.heatmap import Grid, Heat, Module, Quantity, heat_map, lay_out

_ROWS = 500  # of the table of modules
_RATIOS = (  # key, name, long name
    ("channel_ratio", "channel ratio", "rms of the largest channel over the median channel's"),
    ("amax_over_rms", "max / rms", "largest weight over the rms of all"),
    ("kurtosis", "kurtosis", "excess kurtosis, 0 for a normal distribution"),
)


def outliers_page(model: str, ranking: dict[str, Any]) -> str:
    """The page of a `planning.outliers` ranking: advice, a map of each quantity, modules hardest first.

    model: the checkpoint's name as the page shows it.
    """
    modules = ranking["modules"]
    quantities = _quantities(modules)
    listed = sorted(modules, key=functools.partial(_hardness, quantities[0]))[:_ROWS]
    names = [what for module in listed[:1] for what, _ in _facts(module)]
    maps: list[tuple[Quantity, Grid, Module, Heat]] = []
    for quantity in quantities if modules else ():
        hardest = functools.partial(_hardness, quantity)
        grid = lay_out(modules, hardest)
        heat = heat_map(grid, quantity, functools.partial(_tip, quantity))
        maps.append((quantity, grid, min(modules, key=hardest), heat))
    return render(
        "outliers.html.jinja",
        model=model,
        ranking=ranking,
        maps=maps,
        columns={"module": "name"} | {what: "" if what == "shape" else "right" for what in names},
        rows=[[module["module"], *dict(_facts(module)).values()] for module in listed],
    )


def _tip(quantity: Quantity, module: Module) -> list[tuple[str, str]]:
    """What the pointer shows of a module; its other facts are in the table."""
    return [("shape", words.shape(module.get("shape"))), (quantity.name, quantity.text(module))]


def _quantities(modules: Sequence[Module]) -> list[Quantity]:
    """The numbers that are mapped: the ratios, and the SQNR of weights in each operand."""
    operands = dict.fromkeys(name for module in modules for name in module.get("sqnr_db") or {})
    return [
        *(Quantity(name, about, methodcaller("get", key), words.number, ratio=True)
          for key, name, about in _RATIOS),
        *(Quantity("SQNR, dB", f"SQNR as {name}", _sqnr(name), words.decibels) for name in operands),
    ]  # fmt: skip


def _sqnr(operand: str) -> Callable[[Module], float | None]:
    return lambda module: (module.get("sqnr_db") or {}).get(operand)


def _hardness(quantity: Quantity, module: Module) -> tuple[float, str]:
    """Sorts modules: the hardest to quantize first."""
    value = quantity.value(module)
    if value is None:
        return math.inf, module["module"]
    return (-value if quantity.ratio else words.rank(value)), module["module"]


def _facts(module: Module) -> list[tuple[str, str]]:
    """All facts of a module but its name: (what, value)."""
    return [
        ("shape", words.shape(module.get("shape"))),
        ("channel ratio", words.number(module.get("channel_ratio"))),
        ("channel", words.number(module.get("channel"))),
        ("max / rms", words.number(module.get("amax_over_rms"))),
        ("kurtosis", words.number(module.get("kurtosis"))),
        *((f"SQNR {name}", words.decibels(v)) for name, v in (module.get("sqnr_db") or {}).items()),
    ]
