"""The charts of a page that are not heat maps: layer outputs, perplexity, histograms of errors.

A chart is a dict for plotly: traces in `data`, and `layout`. page.js draws it and holds the look that
all charts share. Colours are names of page.css, so that a chart follows the page into dark mode and
onto paper.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from quantcli.verification.report.words import decibels, is_ok, literal, number

Figure = dict[str, Any]

BAD, TEXT, MUTED = "var(--bad)", "var(--text)", "var(--muted)"
ONE, TWO = "var(--one)", "var(--two)"


def layer_line(layers: Sequence[dict[str, Any]]) -> Figure:
    """SQNR in dB of each layer's output, by itself and after all before it; limits and failures."""
    own = [finite(layer.get("sqnr_db")) for layer in layers]
    after = [finite(layer.get("cumulative_db")) for layer in layers]
    limits = [layer.get("limit_db") for layer in layers]
    hover = [
        f"<b>{plain(layer['layer'])}</b><br>SQNR {decibels(layer.get('sqnr_db'))}"
        f"<br>limit {decibels(layer.get('limit_db'))}"
        f"<br>after all before it {decibels(layer.get('cumulative_db'))}"
        f"{'' if is_ok(layer) else '<br><b>failed</b>'}"
        for layer in layers
    ]
    dashed = {"color": MUTED, "width": 1, "dash": "dash", "shape": "hv"}
    traces = [
        line("the layer by itself", own, ONE, hover),
        line("after all layers before it", after, TWO, hover),
        line("limit", limits, MUTED, mode="lines", line=dashed),
    ]
    bad = [place for place, layer in enumerate(layers) if not is_ok(layer)]
    if bad:
        # a layer without a finite SQNR is marked as low as the lowest
        lowest = min((value for value in own if value is not None), default=0.0)
        marks = [
            None if is_ok(layer) else lowest if value is None else value
            for layer, value in zip(layers, own, strict=True)
        ]
        cross = {"symbol": "x", "size": 13, "color": BAD}
        traces.append(line("failed", marks, BAD, hover, mode="markers", marker=cross))
    labels = [layer["layer"].rpartition(".")[2] for layer in layers]
    layout = {"height": 300, "xaxis": layer_axis(labels, bad), "yaxis": {"title": {"text": "dB"}}}
    return {"data": traces, "layout": layout}


def perplexity_line(windows: Sequence[dict[str, float]]) -> Figure:
    """Perplexity of each window of text, and below it the change from the reference in percent."""
    pairs = [(finite(w.get("reference")), finite(w.get("checkpoint"))) for w in windows]
    change = [100 * (b / a - 1) if a and b is not None else None for a, b in pairs]
    hover = [
        f"window {place}<br>reference {number(a)}<br>checkpoint {number(b)}"
        f"<br>change {'-' if c is None else f'{c:+.2f} %'}"
        for place, ((a, b), c) in enumerate(zip(pairs, change, strict=True))
    ]
    traces = [
        line("reference", [a for a, _ in pairs], ONE, hover),
        line("checkpoint", [b for _, b in pairs], TWO, hover, line={"color": TWO, "dash": "dot"}),
        {"type": "bar", "name": "change in %", "y": change, "yaxis": "y2", "hovertext": hover,
         "marker": {"color": MUTED}, "showlegend": False},
    ]  # fmt: skip
    layout = {
        "height": 360,
        "xaxis": {"title": {"text": "window of text"}, "anchor": "y2",
                  "range": [-0.5, len(windows) - 0.5]},
        "yaxis": {"title": {"text": "perplexity"}, "domain": [0.42, 1]},
        "yaxis2": {"title": {"text": "change, %"}, "domain": [0, 0.32], "zerolinecolor": MUTED},
    }  # fmt: skip
    return {"data": traces, "layout": layout}


def histogram(
    title: str, counts: Sequence[float], edges: Sequence[float], *, ok: bool = True
) -> Figure:
    """How often each error occurs: the share of `counts` between `edges`, on a logarithmic axis."""
    whole = sum(counts) or 1
    bars = {
        "type": "bar",
        "x": [(a + b) / 2 for a, b in pairwise(edges)],
        "width": [b - a for a, b in pairwise(edges)],
        "y": [count / whole or None for count in counts],
        "hovertext": [
            f"{number(a)} to {number(b)}<br>{number(round(count))} of {number(round(whole))} values"
            for (a, b), count in zip(pairwise(edges), counts, strict=True)
        ],
        "marker": {"color": ONE if ok else BAD, "line": {"width": 0}},
    }
    least = min((count / whole for count in counts if count), default=1.0)
    lowest = min(-3, math.floor(math.log10(least)))
    layout = {
        "height": 210,
        "title": {"text": plain(title), "font": {"size": 12, "color": TEXT if ok else BAD}, "x": 0.02},
        "margin": {"l": 56, "r": 8, "t": 30, "b": 26},
        "bargap": 0,
        "yaxis": {"type": "log", "dtick": 1, "tickformat": "~%", "range": [lowest, 0]},
        "xaxis": {"zeroline": False},
    }
    return {"data": [bars], "layout": layout}


def line(
    name: str, y: Sequence[float | None], color: str, hover: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    """A line with a mark at each value; `hover` is what the pointer shows there, `more` comes last."""
    texts = {"hoverinfo": "skip"} if hover is None else {"hovertext": hover}
    colored = {"line": {"color": color}, "marker": {"color": color}}
    return {"type": "scatter", "name": name, "y": y, **colored, **texts, **more}


def ticks(labels: Sequence[str], marked: Collection[int], step: int = 1) -> dict[str, Any]:
    """Ticks of an axis with untrusted labels at 0, 1, 2 ...: the marked ones, bold, and every step-th.

    One that would run into a marked one is left out.
    """
    places = [
        place
        for place in range(len(labels))
        if place in marked
        or (place % step == 0 and not any(abs(place - other) < step / 2 for other in marked))
    ]
    text = [
        f"<b>{plain(labels[place])}</b>" if place in marked else plain(labels[place])
        for place in places
    ]
    return {"tickvals": places, "ticktext": text, "tickmode": "array", "tickangle": 0}


def layer_axis(labels: Sequence[str], marked: Collection[int]) -> dict[str, Any]:
    """The horizontal axis of a chart of layers: as many labels as there is room for."""
    columns = len(labels)
    step = 1 if columns <= 40 else 5 if columns <= 200 else 20
    return {"title": {"text": "layer"}, "range": [-0.5, columns - 0.5], **ticks(labels, marked, step)}


def finite(value: float | None) -> float | None:
    """`value` if a chart can place it."""
    return value if value is not None and math.isfinite(value) else None


def plain(text: str, limit: int = 60) -> str:
    """Untrusted text, cut after `limit` characters, for plotly, which reads some HTML and TeX."""
    return html.escape(literal(text, limit), quote=False).replace("$", "&#36;")
