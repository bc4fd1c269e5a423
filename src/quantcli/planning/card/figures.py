"""The section of a card for the figures of verification, between two lines, so that it is replaced."""

from __future__ import annotations

BEGIN = "<!-- quantcli: verification -->"
END = "<!-- quantcli: end of verification -->"


def section(text: str) -> str:
    """The section with some text."""
    return f"{BEGIN}\n\n{text.strip()}\n\n{END}"


def replaced(card: str, text: str) -> str | None:
    """The card with another text in its section; None if it has no such section, or two."""
    lines = card.split("\n")
    if lines.count(BEGIN) != 1 or lines.count(END) != 1:
        return None
    begin, end = lines.index(BEGIN), lines.index(END)
    if end < begin:
        return None
    return "\n".join([*lines[:begin], section(text), *lines[end + 1 :]])
