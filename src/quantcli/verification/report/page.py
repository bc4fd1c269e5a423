"""A report of verification as one HTML page, on which the bad layer is found at a glance."""

from __future__ import annotations

from collections.abc import Iterator
from operator import methodcaller
from typing import Any

from quantcli.core.text import size as size_text
from quantcli.verification.content import FLOAT
from quantcli.verification.report import words
from quantcli.verification.report.charts import (
    Chart,
    histogram,
    layer_line,
    perplexity_lines,
    shares,
)
from quantcli.verification.report.document import render
from quantcli.verification.report.heatmap import Module, Quantity, heat_map, lay_out

_ROWS = 200  # of the table of modules, next to those that failed
_MOST = 1000  # rows of that table at most: a browser must open the page
_COLORS = 5  # of types of weights, in page.css
_HISTOGRAMS = 7  # of single modules
_ERRORS = "Histogram of the errors of {}"
_SQNR = Quantity("SQNR, dB", "SQNR of the weights", methodcaller("get", "sqnr_db"), words.decibels)
# of the table of modules, and the classes of their cells; all other facts share one more column
_COLUMNS = {"type": "", "shape": "right", "SQNR": "right", "limit": "right", "cosine": "right",
            "largest relative error": "right", "worst rows": "", "outlier channels": ""}  # fmt: skip


def page(report: dict[str, Any]) -> str:
    """The page of a report of `verify`, see docs/verify.md. The same report gives the same bytes."""
    modules = sorted(report.get("modules") or [], key=words.badness)
    most = min(_MOST, _ROWS + sum(not words.is_ok(module) for module in modules))
    run = report.get("run") or {}
    layers = run.get("layers") or []
    windows = [each for each in run.get("windows") or [] if each.get("reference") is not None]
    texts = words.text_rows(report)
    grid = lay_out(modules, words.badness)
    sizes = list(_sizes(report))
    limits = [m["limit_db"] for m in modules if m.get("limit_db") is not None]
    return render(
        "page.html.jinja",
        report=report,
        checks=report.get("checks") or [],
        modules=modules,
        module_columns={"module": "name", **_COLUMNS, "other": ""},
        rows=[(_cells(m), words.is_ok(m)) for m in modules[:most]],
        grid=grid,
        heat=heat_map(grid, _SQNR, words.module_facts, min(limits, default=None)) if modules else None,
        sqnr=_SQNR,
        layers=layers,
        layer_chart=layer_line(layers) if layers else None,
        windows=windows,
        texts=[[*text.values()] for text in texts],
        text_columns={
            what: "name" if what == "text" else "right" for text in texts[:1] for what in text
        },
        window_charts=perplexity_lines(windows) if windows else None,
        sizes=sizes,
        size_chart=_size_bar(sizes),
        histograms=list(_histograms(modules)),
    )


def _sizes(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The class of the colour of each type of weights, and its sizes."""
    for place, size in enumerate(report.get("sizes") or []):
        yield "part-float" if size["label"] == FLOAT else f"part-{place % _COLORS}", size


def _size_bar(sizes: list[tuple[str, dict[str, Any]]]) -> Chart:
    parts = [(kind, size["bytes"], (size["label"], size_text(size["bytes"]))) for kind, size in sizes]
    return shares("Size by type of weights", parts)


def _histograms(modules: list[Module]) -> Iterator[tuple[str, Chart, bool]]:
    """Histograms of errors, of all modules and of the worst ones: of what, chart, whether it is ok."""
    measured = [m for m in modules if m.get("histogram") and any(m["histogram"]["counts"])]
    if not measured:
        return
    edges = measured[0]["histogram"]["edges"]  # the same in every module
    counts = [sum(share) for share in zip(*(m["histogram"]["counts"] for m in measured), strict=True)]
    title = f"{'all' if len(measured) == len(modules) else 'the worst'} {len(measured):,} modules"
    yield title, histogram(_ERRORS.format(title), counts, edges), True
    for module in measured[:_HISTOGRAMS]:
        name = module["module"]
        figure = histogram(_ERRORS.format(name), module["histogram"]["counts"], edges)
        yield name, figure, words.is_ok(module)


def _cells(module: Module) -> list[str]:
    """A row of the table of modules."""
    facts = dict(words.module_facts(module))
    cells = [facts.pop(what, "") for what in _COLUMNS]
    return [module["module"], *cells, "; ".join(f"{what} {value}" for what, value in facts.items())]
