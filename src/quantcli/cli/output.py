"""Output of the commands: data on stdout, messages and progress on stderr."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Set
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import typer

from quantcli import __version__
from quantcli.cli.terminal.fold import Table, fold, width_of
from quantcli.cli.terminal.streams import drop, stdout_error
from quantcli.core.errors import SCHEMA_VERSION, Exit, InputError, QuantError
from quantcli.core.events import GOES_ON, Event
from quantcli.core.untrusted.names import printable, visible_json

if TYPE_CHECKING:
    from rich.console import Console

    from quantcli.cli.terminal.log import Log

R = TypeVar("R", bound=Mapping[str, Any])
OK, WARNING, FAILED = "green", "yellow", "bold red"  # styles of words that say so


class Output:
    """The place for a command's results and messages; all of them go to the log, if there is one."""

    def __init__(self, *, as_json: bool, command: str = "") -> None:
        """command: the command line, for the log."""
        self.as_json = as_json
        self.command = command
        self.quiet = self.verbose = False
        self.log: Log | None = None
        self.kept: Callable[[], str] = str  # what later runs can use if this one ends now
        self.is_over: Callable[[], bool] = bool  # whether all work is done
        self.doing: Callable[[], str] = str  # what the run does, for errors that do not say it
        self._on_screen = True

    @cached_property
    def messages(self) -> Console:
        """The console of messages."""
        return self._console(sys.stderr)

    @cached_property
    def _data(self) -> Console:
        return self._console(sys.stdout)

    @staticmethod
    def _console(stream: IO[str]) -> Console:
        from quantcli.cli.terminal.console import console_of

        return console_of(stream)

    def set_up(self, *, quiet: bool, verbose: bool, log_file: Path | None) -> None:
        """Follow a command's options. InputError for some that contradict each other, and for a log in
        a checkpoint; MachineError for one that cannot be opened."""
        if quiet and verbose:
            raise InputError("--quiet and --verbose contradict each other", fix="leave one out")
        if log_file is not None:
            from quantcli.cli.terminal.log import Log

            self.log = Log(log_file, lambda text: self._say(f"warning: {text}", WARNING))
            self._to_log(printable(f"quantcli {__version__}: {self.command}"))
        self.quiet, self.verbose = quiet, verbose

    @property
    def wants_details(self) -> bool:
        """Whether details are printed or logged."""
        return self.verbose or self.log is not None

    def close(self) -> None:
        """End the log."""
        if self.log is not None:
            self.log.close()

    def document(self, payload: Mapping[str, Any], error: QuantError | None = None) -> None:
        """Print the one JSON document of a `--json` run."""
        escaped = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
        text = visible_json(json.dumps(envelope(payload, error), indent=2, ensure_ascii=escaped)) + "\n"
        self._put(lambda: sys.stdout.write(text))

    def result(self, data: R, show: Callable[[Output, R], None], no: QuantError | None = None) -> None:
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

    def line(self, text: str = "", style: str = "", *, command: bool = False) -> None:
        """Print a line of data, folded if it is wider than the terminal. style: of its first word.

        command: it is one to be pasted into a shell.
        """
        text = printable(text)
        self._to_log(text)
        self._show(fold(text, width_of(self._data.file), command=command), style)

    def verbatim(self, text: str) -> None:
        """Print the text of a file, whose lines stay as they are."""
        for line in map(printable, text.splitlines()):
            self._to_log(line)
            self._show(line)

    def _show(self, text: str, style: str = "", *, bold: bool = False) -> None:
        if self._on_screen:
            from quantcli.cli.terminal.console import print_to

            self._put(lambda: print_to(self._data, text, style, bold=bold))

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
        except OSError as error:
            raise stdout_error(error) from None

    def message(self, text: str, style: str = "", *, command: bool = False) -> None:
        """Print a message for people, unless --quiet. style: of its first word.

        command: it is one to be pasted into a shell.
        """
        self._say(text, style, on_screen=not self.quiet, command=command)

    def warn(self, text: str) -> None:
        """Print a warning, unless --quiet."""
        self.message(f"warning: {text}", WARNING)

    def _say(
        self, text: str, style: str = "", *, on_screen: bool = True, command: bool = False
    ) -> None:
        text = printable(text)
        self._to_log(text)
        if on_screen:
            from quantcli.cli.terminal.console import print_to

            folded = fold(text, width_of(self.messages.file), command=command)
            print_to(self.messages, folded, style)

    def event(self, event: Event) -> None:
        """Print what a run reports, as a line; details only with --verbose."""
        detail = event.kind == "detail"
        self._say(str(event), on_screen=self.verbose if detail else not self.quiet)

    def log_progress(self, event: Event) -> None:
        """Only log an event about work that goes on, which a terminal shows in another way."""
        if event.kind in GOES_ON:
            self._to_log(printable(str(event)))

    def log_at_once(self, text: str) -> None:
        """Log a line while another thread may be at the log."""
        if self.log is not None:
            self.log.write_at_once(text)

    def table(
        self,
        columns: list[str],
        rows: list[list[str]],
        right: Set[str] = frozenset(),
        whole: Set[str] = frozenset(),
        styles: Mapping[str, str] | None = None,
    ) -> None:
        """Print a table of data, two spaces between columns, narrowed to the terminal.

        right, whole: columns that are right-aligned; that are never cut. styles: of a row's first word.
        """
        if not rows:
            return
        table = Table(columns, [[printable(cell) for cell in row] for row in rows], right, whole)
        if self.log is not None:
            for (line,) in table.lines(None):
                self._to_log(line)
        header, *blocks = table.lines(width_of(self._data.file))
        for line in header:
            self._show(line, bold=True)
        for row, (first, *others) in zip(rows, blocks, strict=True):
            self._show(first, (styles or {}).get(row[0], ""), bold=not header)
            for line in others:
                self._show(line)

    def error(self, error: QuantError, *, document: bool = True) -> None:
        """Print one problem: what is wrong, where, how to fix it.

        document: with --json, print the document on stdout, too.
        """
        if self.as_json and document:
            self.document(error.payload, error)
        self._say(f"error: {error.what}", FAILED)
        for prefix, detail in (("  --> ", error.where), ("  fix: ", error.fix)):
            if detail:
                self._say(prefix + detail)

    def bug(self, error: BaseException) -> None:
        """Print an unforeseen error: the whole traceback, and a request to report it, to the authors of
        another package if it is in their code."""
        from quantcli.core.registry import blamed  # its imports would delay each command

        if self.as_json:
            self.document({}, _Bug(repr(error), fix="report the traceback on stderr"))
        lines = "".join(traceback.format_exception(error)).splitlines()
        text = "".join(f"{printable(line)}\n" for line in lines)
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
