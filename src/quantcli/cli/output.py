"""Output of the commands: data on stdout, messages and progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Set
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from quantcli import __version__
from quantcli.cli.streams import drop
from quantcli.core.errors import AnswerNo, Exit, QuantError
from quantcli.core.events import Event

SCHEMA_VERSION = 1  # of the documents that --json prints
R = TypeVar("R", bound=Mapping[str, Any])
_WIDE = 200  # columns if the output is not a terminal, so that a log has whole lines


class Output:
    """The place for a command's results and messages."""

    def __init__(self, *, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.messages = _console(sys.stderr)
        self._data = _console(sys.stdout)

    def document(self, payload: Mapping[str, Any], error: QuantError | None = None) -> None:
        """Print the one JSON document of a `--json` run."""
        text = json.dumps(envelope(payload, error), indent=2, ensure_ascii=False) + "\n"
        self._put(lambda: sys.stdout.write(text))

    def result(self, data: R, show: Callable[[Output, R], None], no: AnswerNo | None = None) -> None:
        """Print the result of a command: as JSON, or with `show`.

        no: what is wrong if the answer is no; `show` prints that, too. The command then ends.
        """
        self.document(data, no) if self.as_json else show(self, data)
        if no is not None:
            raise typer.Exit(no.exit_code)

    def line(self, text: str = "") -> None:
        """Print a line of data."""
        self._show(literal(text))

    def _show(self, text: Text) -> None:
        self._put(lambda: self._data.print(text, soft_wrap=True))

    @staticmethod
    def _put(write: Callable[[], object]) -> None:
        """Print data. If its reader has gone (`| head`), stop printing but continue the work."""
        try:
            write()
            sys.stdout.flush()
        except BrokenPipeError:
            drop(sys.stdout)

    def message(self, text: str) -> None:
        """Print a message for people, unless --quiet."""
        if not self.quiet:
            self.messages.print(literal(text), soft_wrap=True)

    def event(self, event: Event) -> None:
        """Print what a run reports, as a line."""
        if event.kind != "detail":
            self.message(str(event))

    def table(self, columns: list[str], rows: list[list[str]], right: Set[str] = frozenset()) -> None:
        """Print a table of data, two spaces between columns; those in `right` are right-aligned."""
        if not rows:
            return
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for number, row in enumerate([columns, *rows]):
            cells = [
                cell.rjust(width) if name in right else cell.ljust(width)
                for name, cell, width in zip(columns, row, widths, strict=True)
            ]
            line = literal("  ".join(cells).rstrip())
            line.stylize("bold" if number == 0 else "")
            self._show(line)

    def error(self, error: QuantError) -> None:
        """Print one problem: what is wrong, where, how to fix it."""
        if self.as_json:
            self.document(error.payload, error)
        text = Text("error: ", style="bold red").append_text(literal(error.what))
        self.messages.print(text, soft_wrap=True)
        for prefix, detail in (("  --> ", error.where), ("  fix: ", error.fix)):
            if detail:
                self.messages.print(literal(prefix + detail), soft_wrap=True)

    def bug(self, error: BaseException) -> None:
        """Print an unforeseen error: the whole traceback, and a request to report it, to the authors of
        another package if it is in their code."""
        from quantcli.core.registry import blamed  # its imports would delay each command

        if self.as_json:
            self.document({}, _Bug(repr(error), fix="report the traceback on stderr"))
        traceback.print_exception(error, file=sys.stderr)
        package = blamed(error) or f"quantcli {__version__}"
        sys.stderr.write(f"\nthis is a bug in {package}: please report the lines above\n")


class _Bug(QuantError):
    exit_code = Exit.OUR_BUG


def envelope(payload: Mapping[str, Any], error: QuantError | None = None) -> dict[str, Any]:
    """What every JSON document has, before the keys of a command's own.

    `ok`, `schema_version`, `error` (None, or `what`, `where` and `fix`), and `exit_code`.
    """
    problem = error and {"what": error.what, "where": error.where, "fix": error.fix}
    return {
        "ok": error is None,
        "schema_version": SCHEMA_VERSION,
        "error": problem,
        "exit_code": int(error.exit_code if error else Exit.DONE),
        **payload,
    }


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1, which here means that the answer is no


def _console(stream: Any) -> Console:
    """A rich console that prints text literally; wide if the stream is not a terminal."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def literal(text: str) -> Text:
    """Text without control characters: names are untrusted, and could contain escape codes."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
