"""HTML of a page: one file that needs no network and runs nothing but its own two scripts."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import NamedTuple

from quantcli.verification.report.charts import Figure
from quantcli.verification.report.words import literal

_PRINTED = 40  # rows of a table that go onto paper, beside those that are out of their limits


class Html(str):
    """Text that is markup already. Any other text is escaped where it meets markup."""

    __slots__ = ()


class Chart(NamedTuple):
    """A chart, its description as text, and the line below it."""

    figure: Figure
    alt: str
    caption: str = ""


def esc(text: object) -> Html:
    """Text as markup that shows it literally: names are untrusted."""
    return text if isinstance(text, Html) else Html(html.escape(literal(text)))


def join(parts: Iterable[str], between: str = "") -> Html:
    """Markup and text in one."""
    return Html(between.join(esc(part) for part in parts))


def tag(name: str, *content: str, **attributes: str) -> Html:
    """An element; `class_` is its class, and what is empty is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{esc(value)}"'
        for key, value in attributes.items()
        if value
    )
    return Html(f"<{name}{given}>{join(content)}</{name}>")


def section(title: str, *content: str) -> Html:
    """A heading and what is under it; nothing where there is nothing."""
    inside = join(content)
    return tag("section", tag("h2", title), inside) if inside else Html("")


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Words and values side by side."""
    cells = [tag("div", tag("dt", what), tag("dd", value)) for what, value in pairs]
    return tag("dl", *cells, class_="facts") if cells else Html("")


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    out: Sequence[bool] = (),
) -> Html:
    """A table; columns in `right` are numbers, rows in `out` are out of their limits."""
    if not rows:
        return Html("")
    kinds = ["name" if not i else "right" if c in right else "" for i, c in enumerate(columns)]
    head = [
        tag("th", column, scope="col", class_=kind) for column, kind in zip(columns, kinds, strict=True)
    ]
    body = []
    for number, row in enumerate(rows):
        cells = [tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)]
        is_out = bool(out) and out[number]
        kind = "out" if is_out else "far" if number >= _PRINTED else ""
        body.append(tag("tr", *cells, class_=kind))
    inside = (tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    return tag("div", tag("table", *inside), class_="scroll")


class Page:
    """A page in the making: its charts are drawn when it is opened."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._figures: dict[str, Figure] = {}

    def chart(self, chart: Chart) -> Html:
        """The place of a chart."""
        name = f"chart-{len(self._figures) + 1}"
        self._figures[name] = chart.figure
        place = tag("div", id=name, class_="plot", role="img", aria_label=chart.alt)
        return tag("figure", place, *([tag("figcaption", chart.caption)] if chart.caption else []))

    def document(self, *body: str) -> str:
        """The whole page, in which nothing may be fetched and no other script runs."""
        from plotly.offline import get_plotlyjs

        scripts = [get_plotlyjs().replace("</script", "<\\/script"), _asset("page.js")]
        hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
        policy = (
            f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
            "base-uri 'none'; form-action 'none'"
        )
        data = json.dumps(self._figures, sort_keys=True, separators=(",", ":"), allow_nan=False)
        for character in "<>&":
            data = data.replace(character, f"\\u{ord(character):04x}")
        return "\n".join(
            [
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                tag("title", self._title),
                f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>",
                *map(esc, body),
                tag("noscript", tag("p", "The charts need JavaScript; the tables have their numbers.")),
                f'<script type="application/json" id="figures">{data}</script>',
                *(f"<script>{script}</script>" for script in scripts),
                "</body>\n</html>\n",
            ]
        )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
