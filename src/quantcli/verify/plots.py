"""What all charts of a page share: they are plain data for plotly, checked by it, drawn by page.js.

Colours are the names of page.css, so that a chart follows the page into the dark and onto paper.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from quantcli.core.errors import MachineError
from quantcli.verify.words import literal

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
    """A stranger's text for plotly, which takes some HTML in texts, links among it, and TeX."""
    return html.escape(literal(text, limit), quote=False).replace("$", "&#36;")
