"""Lines that fit the terminal: text is folded at words, and tables are narrowed.

Widths are in cells: a wide character, such as a Chinese one, takes two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence, Set
from typing import IO, NamedTuple

_LEAST = 20  # cells; a terminal that is narrower folds by itself
_GAP = "  "  # between the columns of a table
_LEAST_TEXT, _LEAST_NAME = 12, 28  # cells that a column of texts keeps, and one of names
_INDENT = "    "  # of the lines that continue a command
# Expressions are compiled when the first line is folded: few are.
# what stands before a text: `weights      `, `  fix: `, `  --> `
_LABEL = r"(?: *\S(?:(?! {2}).){0,40} {2,}| *(?:[\w-]+:|-->) +| +)(?=\S)"
_COMMAND = r" *(?:[a-z]+: +)?"  # what stands before a command: `next: `
_PART = r"""'[^']*'|"[^"]*"|[^'"]+"""  # of such a word
_WORD = r"""(?:'[^']*'|"[^"]*"|\S)+"""  # as a shell takes them


class Width(NamedTuple):
    """How wide lines may be, in cells. folds: the terminal itself breaks what is longer."""

    cells: int
    folds: bool = False


def width_of(stream: IO[str]) -> Width | None:
    """The width of a stream: COLUMNS, or that of the terminal. None: lines stay whole, as in a log."""
    real = 0
    if stream.isatty():
        try:
            real = os.get_terminal_size(stream.fileno()).columns
        except (OSError, ValueError):
            real = 80
    try:
        cells = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        cells = 0
    cells = cells if cells > 0 else real
    return Width(max(cells, _LEAST), folds=cells == real) if cells > 0 else None


def fold(text: str, width: Width | None, *, command: bool = False) -> str:
    """A text in lines that fit: broken between words, what follows is indented as its beginning is.

    A command, or one that the text quotes as in `quantcli ...`, is broken with a backslash, so that it
    can be pasted. A word that is longer than a line, such as a path, is broken at the edge of the
    terminal, and what follows begins at the left: if the terminal does that itself, it can be copied.
    """
    if width is None or cells_of(text) <= width.cells:
        return text
    match = re.match(_COMMAND if command else _LABEL, text)
    lead = match[0] if match else ""
    if cells_of(lead) > width.cells // 2:
        lead = ""
    indent = _GAP if cells_of(lead) > width.cells // 3 else " " * cells_of(lead)
    lines = _Lines(width, lead, max(indent, _INDENT) if command else indent)
    quoted = False
    words = re.findall(_WORD, text[len(lead) :]) if command else text[len(lead) :].split()
    for word in words:
        lines.add(word, pasted=command or quoted)
        if word.count("`") % 2:
            quoted = not quoted and "`quantcli" in word
    return lines.text()


class _Lines:
    """Lines that are filled with words."""

    def __init__(self, width: Width, lead: str, indent: str) -> None:
        self._width = width
        self._indent = indent
        self._text = ""
        self._line = lead
        self._empty = True

    def add(self, word: str, *, pasted: bool) -> None:
        """Add a word to the line, or to the next one. pasted: both lines are one command."""
        room = self._width.cells - (2 if pasted else 0)
        space = "" if self._empty else " "
        if cells_of(self._line + space + word) <= room:
            self._line += space + word
        else:
            if not self._empty:
                self._text += self._line + (" \\\n" if pasted else "\n")
                self._line = self._indent
            self._add_pieces(word, room, pasted=pasted)
        self._empty = False

    def _add_pieces(self, word: str, room: int, *, pasted: bool) -> None:
        """Add a word to a line that has none yet, in pieces if it is too long."""
        if pasted and not self._width.folds:
            *pieces, self._line = _shell_pieces(self._line, word, room)
            self._text += "".join(f"{piece}\\\n" for piece in pieces)
            return
        while cells_of(self._line + word) > self._width.cells:
            piece = head(word, self._width.cells - cells_of(self._line))
            self._text += self._line + piece + ("" if self._width.folds else "\n")
            word, self._line = word[len(piece) :], ""
        self._line += word

    def text(self) -> str:
        """All lines."""
        return self._text + self._line


def _shell_pieces(line: str, word: str, cells: int) -> list[str]:
    """A line with one word of a command behind it, in pieces of at most `cells`.

    A shell joins them if a backslash follows each but the last. Quotes end with a piece and begin again
    in the next one.
    """
    pieces = [line]
    for part in re.findall(_PART, word):
        while part:
            space = cells - cells_of(pieces[-1])
            if cells_of(part) <= space:
                pieces[-1] += part
                break
            mark = part[0] if part[0] in "'\"" else ""
            if space >= 2 + 2 * len(mark) and mark != '"':
                inner = part.strip(mark) if mark else part
                piece = head(inner, space - 2 * len(mark))
                pieces[-1] += mark + piece + mark
                part = mark + inner[len(piece) :] + mark
            pieces.append("")
    return pieces


def cells_of(text: str) -> int:
    """The cells that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def head(text: str, cells: int) -> str:
    """As much of the beginning of a text as takes `cells`, one character at least."""
    taken = 0
    for index, character in enumerate(text):
        taken += cells_of(character)
        if taken > cells and index:
            return text[:index]
    return text


def cut(text: str, cells: int) -> str:
    """A name with its middle left out: `model.layers.…down_proj`. Both ends are kept."""
    if cells_of(text) <= cells:
        return text
    left = (cells - 1) // 2
    start = head(text, left)
    return start + "…" + head(text[::-1], cells - 1 - cells_of(start))[::-1]


class Table:
    """Texts in columns. right: columns that are right-aligned; whole: those that are never cut."""

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        right: Set[str] = frozenset(),
        whole: Set[str] = frozenset(),
    ) -> None:
        self.columns, self.rows, self.right, self.whole = columns, rows, right, whole

    def lines(self, width: Width | None) -> list[list[str]]:
        """The lines of the header, then those of each row; the header has none if it does not fit.

        A table that is too wide is narrowed: texts are folded, and names are cut in the middle. If that
        is not enough, each row becomes a paragraph, with the header's words in it.
        """
        widths = self._widths(width)
        if widths is None:
            assert width is not None
            return [[], *(self._paragraph(row, width) for row in self.rows)]
        return [self._row(row, widths) for row in (self.columns, *self.rows)]

    def _widths(self, width: Width | None) -> list[int] | None:
        columns = list(zip(self.columns, *self.rows, strict=True))
        widths = [max(map(cells_of, column)) for column in columns]
        if width is None:
            return widths
        least = [
            natural if column[0] in self.right | self.whole else _least(column, natural)
            for column, natural in zip(columns, widths, strict=True)
        ]
        room = width.cells - len(_GAP) * (len(columns) - 1)
        if sum(least) > room:
            return None
        while sum(widths) > room:
            widest = max(range(len(widths)), key=lambda i: widths[i] if widths[i] > least[i] else -1)
            widths[widest] -= 1
        return widths

    def _row(self, row: Sequence[str], widths: list[int]) -> list[str]:
        cells = [_cell(text, width) for text, width in zip(row, widths, strict=True)]
        lines = []
        for number in range(max(map(len, cells))):
            parts = (
                _pad(cell[number] if number < len(cell) else "", width, right=column in self.right)
                for column, cell, width in zip(self.columns, cells, widths, strict=True)
            )
            lines.append(_GAP.join(parts).rstrip())
        return lines

    def _paragraph(self, row: Sequence[str], width: Width) -> list[str]:
        pairs = list(zip(self.columns, row, strict=True))
        titles = 1 + next((i for i, (column, _) in enumerate(pairs) if column), 0)
        title = _GAP.join(cell for _, cell in pairs[:titles] if cell)
        facts = "; ".join(
            f"{column} {cell}" for column, cell in pairs[titles:] if cell not in {"", "-"}
        )
        lines = fold(title, width).splitlines()
        return lines + (fold(f"  {facts}", width).splitlines() if facts else [])


def _least(column: Sequence[str], natural: int) -> int:
    """The cells that a column keeps: fewer if its texts can be folded, as most have several words."""
    title, *texts = column
    foldable = sum(" " in text for text in texts) > len(texts) // 2
    return max(cells_of(title), min(natural, _LEAST_TEXT if foldable else _LEAST_NAME))


def _cell(text: str, cells: int) -> list[str]:
    """The lines of one cell: a text is folded at words, and a name is cut in the middle."""
    if cells_of(text) <= cells:
        return [text]
    lines = [""]
    for word in text.split():
        if cells_of(lines[-1] + " " + word) <= cells:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
        else:
            lines.append(cut(word, cells))
    return [line for line in lines if line]


def _pad(text: str, cells: int, *, right: bool) -> str:
    space = " " * (cells - cells_of(text))
    return space + text if right else text + space
