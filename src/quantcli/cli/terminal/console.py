"""Consoles of rich, whose import is a third of the time of `--help`, which needs none."""

from __future__ import annotations

import os
from typing import IO

from rich.console import Console
from rich.text import Text

from quantcli.cli.terminal.fold import width_of

_WIDE = 200  # cells of a bar if the output is not a terminal


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1, which here means that the answer is no


def console_of(stream: IO[str]) -> Console:
    """A console that prints text literally."""
    width = width_of(stream)
    # with None it follows the terminal, also one that is resized
    cells = _WIDE if width is None else None if width.folds else width.cells
    variables = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
    return _Console(
        file=stream, width=cells, highlight=False, markup=False, emoji=False, _environ=variables
    )


def print_to(console: Console, text: str, style: str = "", *, bold: bool = False) -> None:
    """Print lines that were folded before. style: of the first word."""
    styled = Text(text, "bold" if bold else "")
    styled.stylize(style, 0, len(text.split(" ", 1)[0]))
    console.print(styled, soft_wrap=True)
