"""What prints, with progress.py beside it: data to stdout, words and progress to stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Set
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from quantcli import __version__
from quantcli.core.errors import Exit, QuantError

if TYPE_CHECKING:
    pass

_WIDE = 200  # columns where the output is no terminal: nothing is to be cut in a log


class Output:
    """Where a command's results and words go."""

    def __init__(self, *, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._data = make_console(sys.stdout)
        self._words = make_console(sys.stderr)

    def document(self, value: Any) -> None:
        """The one JSON document of a `--json` run."""
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def line(self, text: str = "") -> None:
        """A line of data."""
        self._show(_literal(text))

    def _show(self, text: Text) -> None:
        """Print data; a reader that has gone (`| head`) stops the printing, never the work."""
        try:
            self._data.print(text, soft_wrap=True)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def word(self, text: str) -> None:
        """A line of words, for people."""
        if not self.quiet:
            self._words.print(_literal(text), soft_wrap=True)

    def table(self, columns: list[str], rows: list[list[str]], right: Set[str] = frozenset()) -> None:
        """A table of data, two spaces between columns; those in `right` are aligned to the right."""
        if not rows:
            return
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for number, row in enumerate([columns, *rows]):
            cells = [
                cell.rjust(width) if name in right else cell.ljust(width)
                for name, cell, width in zip(columns, row, widths, strict=True)
            ]
            line = _literal("  ".join(cells).rstrip())
            line.stylize("bold" if number == 0 else "")
            self._show(line)

    def error(self, error: QuantError) -> None:
        """One problem: what, where, how to fix it."""
        if self.as_json:
            self.document(
                {
                    "ok": False,
                    "error": {"what": error.what, "where": error.where, "fix": error.fix},
                    "exit_code": int(error.exit_code),
                }
            )
        text = Text("error: ", style="bold red")
        text.append_text(_literal(error.what))
        self._words.print(text, soft_wrap=True)
        if error.where:
            self._words.print(_literal(f"  --> {error.where}"), soft_wrap=True)
        if error.fix:
            self._words.print(_literal(f"  fix: {error.fix}"), soft_wrap=True)

    def bug(self, error: BaseException) -> None:
        """Something that we did not foresee: the whole traceback, and where to send it."""
        if self.as_json:
            self.document({"ok": False, "error": {"what": repr(error)}, "exit_code": int(Exit.OUR_BUG)})
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.write(f"\nthis is a bug in quantcli {__version__}: please report the lines above\n")


def make_console(stream: Any) -> Console:
    """A rich console that takes text literally; wide where the stream is no terminal."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1, which says that the answer is no


def _literal(text: str) -> Text:
    """Names come from strangers: no escape code of theirs reaches the terminal."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
