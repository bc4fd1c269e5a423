"""Markdown of untrusted text: names, reasons and cards cannot leave the place where they are shown."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence

from quantcli.core.untrusted.names import printable

_SPECIAL = re.compile(r"([\\`*_\[\]<>|&#~!$])")
# Characters that move a terminal's cursor, that reorder text on a screen, and letters that none shows.
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f"
    "\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
_LINE_END = re.compile(r"\r\n|\r|\n")


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", printable(text))


def code(text: str) -> str:
    """A code span, which may stand in a table."""
    text = printable(text)
    fence = "`" * (_longest_run(text) + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def fenced(text: str, language: str = "") -> str:
    """Lines of text as a block of code."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> str:
    """A table; cells are Markdown already. right: columns of numbers."""
    edges = ["---:" if column in right else "---" for column in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, edges, *rows])


def lines_of(text: str) -> list[str]:
    """The lines of a text as Markdown has them: other separators of Unicode end none."""
    return _LINE_END.split(text)


def quote(text: str) -> str:
    """Any Markdown as a block quote: what it opens ends with it."""
    lines = lines_of(_CONTROL.sub("\ufffd", text).strip("\r\n"))
    return "\n".join(f"> {line}" if line else ">" for line in lines)


def unquote(text: str) -> str:
    """The Markdown in the block quote that a text begins with."""
    quoted = itertools.takewhile(lambda line: line.startswith(">"), lines_of(text.lstrip("\n")))
    return "\n".join(line[1:].removeprefix(" ") for line in quoted)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
