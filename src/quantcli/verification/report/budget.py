"""The pages of a budget and of a measurement of sensitivity: error against bytes, and by module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from quantcli.verification.report import words
from quantcli.verification.report.charts import (
    Chart,
    Mark,
    Scale,
    at,
    percent,
    rule,
    text,
    tidy,
)
from quantcli.verification.report.document import render

_ROWS = 500  # of the table of modules
_COLORS = 5  # of schemes, in page.css
_LABELS = 24  # of layers
_AROUND = 66  # pixels above and below the plotted area
_HEIGHT = 260
_KEEP = "keep"


def budget_page(report: Mapping[str, Any], model: str) -> str:
    """The page of a budget that was spent: see `commands.budget.spending`. model: its name."""
    units = [{**unit, "error": unit["errors"][unit["scheme"]]} for unit in report["units"]]
    points = [
        (figures["bits"], figures["predicted"], figures["name"], place)
        for place, figures in enumerate(report["candidates"])
    ]
    return render(
        "budget.html.jinja",
        model=model,
        report=report,
        title=f"Schemes within {words.number(report['bits'])} bits for each weight",
        what=_what(report),
        pareto=_pareto(report["curve"], points, report),
        bars=_bars(units, report["options"]),
        candidates=report["candidates"],
        columns={"group of modules": "name", "scheme": "", "weights": "right", "error": "right"},
        rows=[
            [unit["unit"], unit["scheme"], words.number(unit["weights"]), f"{unit['error']:.3e}"]
            for unit in sorted(units, key=lambda unit: (-unit["error"], unit["unit"]))[:_ROWS]
        ],
    )


def sensitivity_page(report: Mapping[str, Any]) -> str:
    """The page of a measurement: see `commands.budget.sensitivity`."""
    names = [scheme["name"] for scheme in report["schemes"]]
    worst = max(names[:-1], key=lambda name: next(
        scheme["error"] for scheme in report["schemes"] if scheme["name"] == name
    ))  # fmt: skip
    ordered = sorted(report["units"], key=lambda unit: int(unit["place"]))
    units = [{**unit, "scheme": worst, "error": unit["errors"][worst]} for unit in ordered]
    return render(
        "budget.html.jinja",
        model=report["path"],
        report=report,
        title="What each group of modules costs under each scheme",
        what=_what(report),
        pareto=None,
        bars=_bars(units, names),
        candidates=[],
        columns={"group of modules": "name", "weights": "right"} | dict.fromkeys(names[:-1], "right"),
        rows=[
            [unit["unit"], words.number(unit["weights"])]
            + [f"{unit['errors'][name]:.3e}" for name in names[:-1]]
            for unit in report["units"][:_ROWS]
        ],
    )


def _what(report: Mapping[str, Any]) -> str:
    """What the errors are."""
    if report["on_text"]:
        return "Errors are the KL divergence that a group alone makes on text, in nats per token."
    return (
        "No text was given: errors are those of weights alone, the squared error over the sum of "
        "squares. Nothing is known of inputs."
    )


def _pareto(
    curve: Sequence[Mapping[str, float]],
    points: Sequence[tuple[float, float, str, int]],
    report: Mapping[str, Any],
) -> Chart:
    """Predicted error, on a logarithmic axis, against bits for each weight."""
    placed = [(p["bits"], p["predicted"]) for p in curve if p["predicted"] > 0]
    rivals = [(bits, error) for bits, error, _, _ in points if error > 0]
    errors = [math.log10(error) for _, error in [*placed, *rivals]]
    low, high = math.floor(min(errors, default=-1)), math.ceil(max(errors, default=0))
    scale = Scale(low, max(high, low + 1), 1, _HEIGHT)
    ends = [bits for bits, _ in [*placed, *rivals]]
    left, span = min(ends, default=0.0), (max(ends, default=1.0) - min(ends, default=0.0)) or 1.0

    def where(bits: float, error: float) -> tuple[str, float]:
        return percent(2 + 96 * (bits - left) / span), tidy(scale.y(math.log10(error)))

    marks = [text("predicted error", -56, -12)]
    for power in range(int(scale.low), int(scale.high) + 1):
        y = scale.y(power)
        marks += [rule(y), text(f"1e{power}", -6, y + 4, "end")]
    for step in range(5):
        bits = left + span * step / 4
        x = percent(2 + 96 * step / 4)
        marks.append(text(words.number(round(bits, 2)), x, _HEIGHT + 18, "middle"))
    marks.append(text("bits for each weight", "50%", _HEIGHT + 36, "middle"))
    for (x1, y1), (x2, y2) in pairwise(where(*point) for point in placed):
        marks.append(Mark("line", {"class": "one", "x1": x1, "y1": y1, "x2": x2, "y2": y2}))
    chosen = report["bits"], report["predicted"]
    for bits, error, name, _ in points:
        if error <= 0 or (bits, error) == chosen:
            continue
        x, y = where(bits, error)
        tip = (name, f"{words.number(bits)} bits", f"predicted error {error:.3e}")
        marks.append(Mark("circle", {"class": "two", "cx": x, "cy": y, "r": 5}, tip=tip))
    if chosen[1] > 0:
        x, y = where(*chosen)
        tip = ("chosen", f"{words.number(chosen[0])} bits", f"predicted error {chosen[1]:.3e}")
        marks.append(Mark("circle", {"class": "part-2", "cx": x, "cy": y, "r": 7}, tip=tip))
    keys = {"one": "best mixtures", "two": "one scheme for all", "part-2": "chosen"}
    return Chart("Predicted error against bits", _HEIGHT + _AROUND, marks, keys=keys)


def _bars(units: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Chart:
    """The error of each group of modules, in the colour of its scheme."""
    colors = {
        name: "part-float" if name == _KEEP else f"part-{place % _COLORS}"
        for place, name in enumerate(names)
    }
    scale = Scale.of([0.0, *(unit["error"] for unit in units)], height=200)
    marks: list[Mark] = [*scale.grid("error"), *_layers(units, scale.height)]
    width = 100 / max(1, len(units))
    for place, unit in enumerate(units):
        top = scale.y(unit["error"])
        box = {
            "x": percent(width * (place + 0.1)),
            "width": percent(0.8 * width),
            "y": tidy(min(top, scale.height - 1)),
            "height": tidy(max(scale.height - top, 1)),
        }
        tip = (unit["unit"], unit["scheme"], f"error {unit['error']:.3e}")
        marks.append(Mark("rect", {"class": colors[unit["scheme"]], **box}, tip=tip))
    used = dict.fromkeys(unit["scheme"] for unit in units)
    keys = {colors[name]: name for name in names if name in used}
    title = f"Error of {len(units)} groups of modules by scheme"
    return Chart(title, scale.height + _AROUND, marks, keys=keys)


def _layers(units: Sequence[Mapping[str, Any]], height: float) -> Iterator[Mark]:
    """The number of each group's layer, as far as there is room."""
    numbers = [next((p for p in unit["unit"].split(".") if p.isdigit()), "") for unit in units]
    firsts = [p for p, number in enumerate(numbers) if p == 0 or numbers[p - 1] != number]
    for place in firsts[:: -(-len(firsts) // _LABELS) or 1]:
        yield text(numbers[place], at(place, len(units)), height + 18, "middle")
    yield text("layer", "50%", height + 36, "middle")
