"""Output of the commands: data on stdout, messages and progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from quantcli import __version__
from quantcli.cli.streams import Log, drop
from quantcli.core.errors import AnswerNo, Exit, InputError, QuantError
from quantcli.core.events import GOES_ON, Event

SCHEMA_VERSION = 1  # of the documents that --json prints
R = TypeVar("R", bound=Mapping[str, Any])
_WIDE = 200  # columns if the output is not a terminal, so that a log has whole lines


class Output:
    """The place for a command's results and messages; all of them go to the log, if there is one."""

    def __init__(self, *, as_json: bool, command: str = "") -> None:
        """command: the command line, for the log."""
        self.as_json = as_json
        self.command = command
        self.quiet = self.verbose = False
        self.log: Log | None = None
        self.messages = _console(sys.stderr)
        self._data = _console(sys.stdout)
        self._on_screen = True

    def set_up(self, *, quiet: bool, verbose: bool, log_file: Path | None) -> None:
        """Follow a command's options. InputError for some that contradict each other, and for a log in
        a checkpoint; MachineError for one that cannot be opened."""
        if quiet and verbose:
            raise InputError("--quiet and --verbose contradict each other", fix="leave one out")
        if log_file is not None:
            self.log = Log(log_file, self._warn)
            self._to_log(literal(f"quantcli {__version__}: {self.command}").plain)
        self.quiet, self.verbose = quiet, verbose

    def close(self) -> None:
        """End the log."""
        if self.log is not None:
            self.log.close()

    def _warn(self, text: str) -> None:
        self.messages.print(literal(f"warning: {text}"), soft_wrap=True)

    def document(self, payload: Mapping[str, Any], error: QuantError | None = None) -> None:
        """Print the one JSON document of a `--json` run."""
        text = json.dumps(envelope(payload, error), indent=2, ensure_ascii=False) + "\n"
        self._put(lambda: sys.stdout.write(text))

    def result(self, data: R, show: Callable[[Output, R], None], no: AnswerNo | None = None) -> None:
        """Print the result of a command: as JSON, or with `show`.

        no: what is wrong if the answer is no; `show` prints that, too. The command then ends.
        """
        self.show(lambda: show(self, data))
        if self.as_json:
            self.document(data, no)
        if no is not None:
            raise typer.Exit(no.exit_code)

    def show(self, show: Callable[[], None], *, on_screen: bool = True) -> None:
        """Print data with `show`. With --json, or not `on_screen`, it goes to the log only."""
        before, self._on_screen = self._on_screen, on_screen and not self.as_json
        try:
            if self._on_screen or self.log is not None:
                show()
        finally:
            self._on_screen = before

    def line(self, text: str = "") -> None:
        """Print a line of data."""
        self._show(literal(text))

    def _show(self, text: Text) -> None:
        self._to_log(text.plain)
        if self._on_screen:
            self._put(lambda: self._data.print(text, soft_wrap=True))

    def _to_log(self, text: str) -> None:
        if self.log is not None:
            self.log.write(text or " ")

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
        self._to_log(literal(text).plain)
        if not self.quiet:
            self.messages.print(literal(text), soft_wrap=True)

    def event(self, event: Event) -> None:
        """Print what a run reports, as a line; details only with --verbose."""
        if event.kind != "detail":
            self.message(str(event))
            return
        text = literal(str(event))
        self._to_log(text.plain)
        if self.verbose:
            text.stylize("dim")
            self.messages.print(text, soft_wrap=True)

    def log_progress(self, event: Event) -> None:
        """Only log an event about work that goes on, which a terminal shows in another way."""
        if event.kind in GOES_ON:
            self._to_log(literal(str(event)).plain)

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

    def error(self, error: QuantError, *, document: bool = True) -> None:
        """Print one problem: what is wrong, where, how to fix it.

        document: with --json, print the document on stdout, too.
        """
        if self.as_json and document:
            self.document(error.payload, error)
        lines = [Text("error: ", style="bold red").append_text(literal(error.what))]
        details = ("  --> ", error.where), ("  fix: ", error.fix)
        lines += [literal(prefix + detail) for prefix, detail in details if detail]
        for line in lines:
            self._to_log(line.plain)
            self.messages.print(line, soft_wrap=True)

    def bug(self, error: BaseException) -> None:
        """Print an unforeseen error: the whole traceback, and a request to report it, to the authors of
        another package if it is in their code."""
        from quantcli.core.registry import blamed  # its imports would delay each command

        if self.as_json:
            self.document({}, _Bug(repr(error), fix="report the traceback on stderr"))
        text = "".join(traceback.format_exception(error))
        package = blamed(error) or f"quantcli {__version__}"
        text += f"\nthis is a bug in {package}: please report the lines above\n"
        self._to_log(text)
        sys.stderr.write(text)


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
