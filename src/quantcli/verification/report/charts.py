"""The other charts of a page: layer outputs, perplexity, histograms of errors.

Charts are plain data for plotly, which checks them; page.js draws them. Colours are names of page.css,
so that a chart follows the page into dark mode and onto paper.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from quantcli.core.errors import MachineError
from quantcli.verification.report.words import decibels, is_ok, literal, number


def layer_line(layers: Sequence[dict[str, Any]]) -> Figure:
    """SQNR of each layer's output, by itself and after all before it; limits and failures."""
    values = [finite(layer.get("sqnr_db")) for layer in layers]
    hover = [
        f"<b>{plain(layer['layer'])}</b><br>SQNR {decibels(layer.get('sqnr_db'))}"
        f"<br>limit {decibels(layer.get('limit_db'))}"
        f"<br>after all before it {decibels(layer.get('cumulative_db'))}"
        f"{'' if is_ok(layer) else '<br><b>failed</b>'}"
        for layer in layers
    ]
    places = list(range(len(layers)))
    traces = [line("the layer by itself", places, values, ONE, hover)]
    summed = [finite(layer.get("cumulative_db")) for layer in layers]
    if any(value is not None for value in summed):
        traces.append(line("after all layers before it", places, summed, TWO, hover))
    limits = [layer.get("limit_db") for layer in layers]
    if any(limit is not None for limit in limits):
        traces.append({**line("limit", places, limits, MUTED), "mode": "lines", "line": dashed("hv")})
    bad = [index for index, layer in enumerate(layers) if not is_ok(layer)]
    if bad:
        lowest = min((value for value in values if value is not None), default=0.0)
        y = [lowest if values[index] is None else values[index] for index in bad]
        marks = line("failed", bad, y, BAD, [hover[index] for index in bad])
        marker = {"symbol": "x", "size": 13, "color": BAD}
        traces.append({**marks, "mode": "markers", "marker": marker})
    labels = [plain(layer["layer"].rpartition(".")[2]) for layer in layers]
    axis = ticks(labels, bad, step=step(len(labels)))
    layout = {
        "height": 300,
        "xaxis": {"title": {"text": "layer"}, **axis, "range": [-0.5, len(layers) - 0.5]},
        "yaxis": {"title": {"text": "dB"}},
    }
    return figure(traces, layout)


def perplexity_line(windows: Sequence[dict[str, float]]) -> Figure:
    """Perplexity of each window of text, and below by how much it has changed."""
    places = list(range(len(windows)))
    reference = [finite(window.get("reference")) for window in windows]
    checkpoint = [finite(window.get("checkpoint")) for window in windows]
    change = [
        100 * (b / a - 1) if a and b is not None else None
        for a, b in zip(reference, checkpoint, strict=True)
    ]
    hover = [
        f"window {place}<br>reference {number(a)}<br>checkpoint {number(b)}"
        f"<br>change {'-' if c is None else f'{c:+.2f} %'}"
        for place, a, b, c in zip(places, reference, checkpoint, change, strict=True)
    ]
    second = line("checkpoint", places, checkpoint, TWO, hover)
    bars = {
        "type": "bar", "name": "change in %", "x": places, "y": change, "yaxis": "y2",
        "hovertext": hover, "hoverinfo": "text", "marker": {"color": MUTED}, "showlegend": False,
    }  # fmt: skip
    layout = {
        "height": 360,
        "xaxis": {"title": {"text": "window of text"}, "anchor": "y2",
                  "range": [-0.5, len(windows) - 0.5]},
        "yaxis": {"title": {"text": "perplexity"}, "domain": [0.42, 1]},
        "yaxis2": {"title": {"text": "change, %"}, "domain": [0, 0.32], "zeroline": True,
                   "zerolinecolor": MUTED, "gridcolor": LINE},
    }  # fmt: skip
    second["line"] = {**second["line"], "dash": "dot"}
    return figure([line("reference", places, reference, ONE, hover), second, bars], layout)


def histogram(
    title: str, counts: Sequence[float], edges: Sequence[float], *, ok: bool = True
) -> Figure:
    """How often each error occurs; the share on a logarithmic axis."""
    whole = sum(counts) or 1
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    widths = [b - a for a, b in pairwise(edges)]
    hover = [
        f"{number(a)} to {number(b)}<br>{number(round(count))} of {number(round(whole))} values"
        for (a, b), count in zip(pairwise(edges), counts, strict=True)
    ]
    bars = {
        "type": "bar", "x": centres, "width": widths, "y": [count / whole or None for count in counts],
        "hovertext": hover, "hoverinfo": "text",
        "marker": {"color": ONE if ok else BAD, "line": {"width": 0}},
    }  # fmt: skip
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
    return figure([bars], layout)


def overall(histograms: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]] | None:
    """Counts and edges of all together; where edges differ, shared out over the widest range."""
    usable = [h for h in histograms if len(h["edges"]) == len(h["counts"]) + 1 and any(h["counts"])]
    if not usable:
        return None
    edges = list(usable[0]["edges"])
    if any(h["edges"] != edges for h in usable):
        low, high = min(h["edges"][0] for h in usable), max(h["edges"][-1] for h in usable)
        edges = [low + (high - low) * i / 32 for i in range(33)]
    counts = [0.0] * (len(edges) - 1)
    for h in usable:
        if h["edges"] == edges:
            counts = [a + b for a, b in zip(counts, h["counts"], strict=True)]
            continue
        for (left, right), count in zip(pairwise(h["edges"]), h["counts"], strict=True):
            for place, (a, b) in enumerate(pairwise(edges)):
                shared = min(right, b) - max(left, a)
                counts[place] += count * max(shared, 0.0) / (right - left)
    return counts, edges


Figure = dict[str, Any]

BAD, TEXT, MUTED, LINE = "var(--bad)", "var(--text)", "var(--muted)", "var(--line)"

ONE, TWO = "var(--one)", "var(--two)"

_LONGEST = 60  # characters of a label


def require_plotly() -> None:
    """Raise MachineError where the plotting library is not installed."""
    try:
        import plotly.graph_objects  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "a page needs the package plotly", where=str(error), fix="pip install 'quantcli[report]'"
        ) from None


def figure(traces: list[dict[str, Any]], layout: dict[str, Any]) -> Figure:
    """Checked by the library: a misspelt attribute is an error here and not a blank chart there."""
    import plotly.graph_objects as go

    axes = {"gridcolor": LINE, "linecolor": LINE, "zerolinecolor": LINE}
    layout = {
        "margin": {"l": 60, "r": 12, "t": 24, "b": 44},
        **layout,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": TEXT, "family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {"align": "left", "bgcolor": "var(--panel)", "bordercolor": LINE,
                       "font": {"color": TEXT}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "dragmode": False,
        "template": "none",
    }  # fmt: skip
    for name in ("xaxis", "yaxis", "yaxis2"):
        if name in layout:
            layout[name] = {**axes, **layout[name]}
    drawn: Figure = go.Figure(data=traces, layout=layout).to_plotly_json()
    drawn["layout"].pop("template", None)
    return drawn


def line(
    name: str, x: Sequence[int], y: Sequence[float | None], color: str, hover: list[str] | None = None
) -> dict[str, Any]:
    """A line with a mark at each value; `hover` is what the pointer shows there."""
    return {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": list(x), "y": list(y),
        "line": {"color": color, "width": 2}, "marker": {"color": color, "size": 5},
        **({"hoverinfo": "skip"} if hover is None else {"hovertext": hover, "hoverinfo": "text"}),
    }  # fmt: skip


def dashed(form: str) -> dict[str, Any]:
    """The look of a limit."""
    return {"color": MUTED, "width": 1, "dash": "dash", "shape": form}


def ticks(labels: list[str], marked: Sequence[int], step: int = 1) -> dict[str, Any]:
    """Labels at 0, 1, 2 ...: those that are marked always, and so that none runs into the next."""
    places = [
        place
        for place in range(len(labels))
        if place in marked
        or (place % step == 0 and not any(abs(place - other) < step / 2 for other in marked))
    ]
    text = [f"<b>{labels[place]}</b>" if place in marked else labels[place] for place in places]
    return {"tickvals": places, "ticktext": text, "tickmode": "array", "tickangle": 0}


def step(columns: int) -> int:
    """Every how many columns there is room for a label."""
    return 1 if columns <= 40 else 5 if columns <= 200 else 20


def finite(value: float | None) -> float | None:
    """`value` if a chart can place it."""
    return value if value is not None and math.isfinite(value) else None


def plain_all(labels: Iterable[str]) -> list[str]:
    """`plain` for each."""
    return [plain(label) for label in labels]


def plain(text: str, limit: int = _LONGEST) -> str:
    """Untrusted text for plotly, which reads some HTML (also links) and TeX in texts."""
    return html.escape(literal(text, limit), quote=False).replace("$", "&#36;")
