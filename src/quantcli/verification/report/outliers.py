"""The page of a float model's outlier channels: what will be hard to quantize, and where."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from quantcli.verification.report import words
from quantcli.verification.report.charts import require_plotly
from quantcli.verification.report.heatmap import (
    Module,
    Quantity,
    heat_map,
    lay_out,
    left_out,
    numbers,
    size,
)
from quantcli.verification.report.markup import Chart, Html, Page, section, table, tag

_ROWS = 500


def outliers_page(model: str, outliers: Sequence[Module]) -> str:
    """The page of a float model's outlier channels, before anything is quantized."""
    require_plotly()
    page = Page(f"outlier channels: {model}")
    head = tag("header", tag("h1", "Outlier channels"), tag("p", tag("code", model)))
    return page.document(head, outlier_section(page, outliers))


def outlier_section(page: Page, modules: Sequence[Module]) -> Html:
    """Maps of what makes a model hard to quantize, then the modules, hardest first."""
    if not modules:
        return Html("")
    content = []
    for quantity in _hardness(modules):
        grid = lay_out(modules, functools.partial(_hardest, quantity))
        worst = min(
            (cell.worst for cell in grid.cells.values()), key=functools.partial(_hardest, quantity)
        )
        what = f"{quantity.about}: the worst is {quantity.show(quantity.value(worst))} in "
        chart = Chart(
            heat_map(grid, quantity, _facts, None), f"Heat map of {size(grid)}.", left_out(grid)
        )
        content += [
            tag("h3", what, tag("code", worst["module"])),
            page.chart(chart),
            numbers(grid, quantity),
        ]
    ratio = _hardness(modules)[0]
    hardest = sorted(modules, key=functools.partial(_hardest, ratio))
    columns = ["module", *dict(_facts(hardest[0]))]
    rows = [[m["module"], *dict(_facts(m)).values()] for m in hardest[:_ROWS]]
    more = f" The first {_ROWS} of {len(modules):,}." if len(modules) > _ROWS else ""
    content.append(table(f"Largest channel ratio first.{more}", columns, rows, columns[2:]))
    return section("Outliers in the weights", *content)


def _hardness(modules: Sequence[Module]) -> list[Quantity]:
    schemes = dict.fromkeys(scheme for m in modules for scheme in m.get("sqnr_db") or {})
    ratios = (
        ("channel_ratio", "channel ratio", "rms of the largest channel over the median channel's"),
        ("amax_over_rms", "max / rms", "largest weight over the rms of all"),
        ("kurtosis", "kurtosis", "kurtosis, 3 for a normal distribution"),
    )
    return [
        *(Quantity(name, about, _get(key), words.number, ratio=True) for key, name, about in ratios),
        *(Quantity("SQNR, dB", f"SQNR as {s}", _sqnr(s), words.decibels) for s in schemes),
    ]


def _get(key: str) -> Callable[[Module], float | None]:
    return lambda module: module.get(key)


def _sqnr(scheme: str) -> Callable[[Module], float | None]:
    return lambda module: (module.get("sqnr_db") or {}).get(scheme)


def _hardest(quantity: Quantity, module: Module) -> tuple[float, str]:
    value = quantity.value(module)
    if value is None:
        return math.inf, module["module"]
    return (-value if quantity.ratio else words.rank(value)), module["module"]


def _facts(module: Module) -> list[tuple[str, str]]:
    return [
        ("shape", words.shape(module.get("shape"))),
        ("channel ratio", words.number(module.get("channel_ratio"))),
        ("channel", words.number(module.get("channel"))),
        ("max / rms", words.number(module.get("amax_over_rms"))),
        ("kurtosis", words.number(module.get("kurtosis"))),
        *((f"SQNR {name}", words.decibels(v)) for name, v in (module.get("sqnr_db") or {}).items()),
    ]
