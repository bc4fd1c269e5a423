"""A command line to its exit code: whatever goes wrong becomes one message."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import typer

from quantcli.checkpoint.remote.address import without_secrets
from quantcli.cli.app import app
from quantcli.cli.output import Output
from quantcli.cli.terminal.environment import COMPLETE, defaults
from quantcli.cli.terminal.streams import check_stdout, drop, stdout_error
from quantcli.core.errors import Exit, InputError, Interrupted, MachineError, QuantError, closest
from quantcli.core.untrusted.names import printable
from quantcli.core.untrusted.panics import is_panic

_LONG = 5.0  # seconds
_HELP = frozenset({"-h", "--help", "-V", "--version"})
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's, or typer's own copy of it


class Signals(Protocol):
    """How an interrupt arrives."""

    command_runs: bool  # whether it is a KeyboardInterrupt
    code: int | None  # of the command, when it is over
    kept: Callable[[], str]  # what later runs can use
    is_over: Callable[[], bool]  # whether all work is done
    log: Callable[[str], object]

    @property
    def what(self) -> str:
        """The message."""

    @property
    def fix(self) -> str:
        """What to do after it."""

    def may_report(self) -> bool:
        """Whether nobody else reports the interrupt."""

    def tidy(self) -> None:
        """Remove temporary files: functions for the end of the process do not run."""


def run(argv: list[str], signals: Signals) -> int:
    """Run the command line `argv`, report its error if it has one, and return the exit code."""
    out = Output(as_json="--json" in argv, command=shlex.join(map(without_secrets, argv)))
    signals.kept, signals.log = lambda: out.kept(), out.log_at_once
    signals.is_over = lambda: out.is_over()
    try:
        return _guarded(argv, signals, out)
    except QuantError as error:
        return _reported(out, error)
    except BrokenPipeError:  # quantcli inspect MODEL | head
        drop(sys.stdout)
        return Exit.DONE
    except Exception as error:  # one that nothing on the way turned into a better message
        return _unforeseen(out, error)
    except BaseException as error:
        if not is_panic(error):
            raise
        what = f"a library of compiled code gave up: {printable(str(error))[:200]}"
        fix = "free memory, and fetch the model again; if it stays, report it"
        return _reported(out, MachineError(what, fix=fix))
    finally:
        out.close()


def _unforeseen(out: Output, error: Exception) -> int:
    """Report an error of the machine as such, and any other one as a bug."""
    from quantcli.core.memory.shortage import is_out_of_memory, shortage

    if is_out_of_memory(error):
        return _reported(out, shortage(error, out.doing() or f"`quantcli {out.command.split()[0]}`"))
    if isinstance(error, OSError):
        from quantcli.core.disk import machine_error

        named = error.filename
        path = None if named is None or isinstance(named, int) else Path(os.fsdecode(named))
        return _reported(out, machine_error(error, path))
    out.bug(error)
    return Exit.OUR_BUG


def _reported(out: Output, error: QuantError) -> int:
    """Report an error, on stderr alone if standard output cannot be written."""
    try:
        out.error(error)
    except (OSError, MachineError):
        out.error(error, document=False)
    try:
        sys.stdout.flush()
    except OSError:
        drop(sys.stdout)
    return error.exit_code


def _guarded(argv: list[str], signals: Signals, out: Output) -> int:
    """The exit code of a command, which interrupts as a KeyboardInterrupt reach."""
    try:
        signals.command_runs = True
        signals.code = _run(argv, out)
        return signals.code
    except (KeyboardInterrupt, Interrupted) as error:
        signals.command_runs = False
        if not signals.may_report():
            time.sleep(_LONG)  # another thread does, and ends the process
        signals.tidy()
        if isinstance(error, Interrupted):  # it says more
            raise
        raise Interrupted(signals.what, fix=signals.fix) from None
    finally:
        signals.command_runs = False


def _run(argv: list[str], out: Output) -> int:
    """The exit code of a command. Replaces typer's `main`, which prints errors in its own way."""
    group = _group()
    if COMPLETE in os.environ:
        from quantcli.cli.terminal.completion import complete

        sys.stdout.write(complete(group, argv))
        _flush()
        return Exit.DONE
    command = group.commands.get(argv[0])  # none of `quantcli --help`
    options = {option.name for option in command.params} if command else set()
    shared = {"obj": out, "default_map": {argv[0]: defaults(options)}}
    try:
        if "--json" in argv:  # not after hours of work
            check_stdout()
        with group.make_context("quantcli", [*argv], **shared) as context:  # click empties its list
            group.invoke(context)
        _flush()
    except typer.Exit as error:
        _flush()
        return error.exit_code
    except _UsageError as error:
        raise _usage_error(error, argv[0], group) from None
    except OSError as error:
        # typer itself prints these; all else that is printed says by itself what cannot be written
        if not _HELP.isdisjoint(argv) and error.filename is None and error.errno != errno.EPIPE:
            raise stdout_error(error) from None
        raise
    return Exit.DONE


@cache
def _group() -> Any:
    """What typer makes of the functions of commands: it takes a while, and some processes run many."""
    return typer.main.get_command(app)


def _flush() -> None:
    """Flush standard output. BrokenPipeError if nobody reads it, MachineError for another failure."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise stdout_error(error) from None


def _usage_error(error: Any, name: str, group: Any) -> InputError:
    """An error of click as ours, with the closest option or command to a misspelt one."""
    path = f"quantcli {name}" if name in group.commands else "quantcli"
    message, hint = getattr(error, "format_message", error.__str__)().rstrip("."), ""
    if hasattr(error, "possibilities"):  # an unknown option
        message = error.message
        options = [o for param in group.commands.get(name, group).params for o in param.opts]
        hint = closest(error.option_name, [o for o in (*options, "--help") if o.startswith("--")], 1)
    elif message.startswith("No such command"):
        message = f"there is no command `{name}`"
        hint = closest(name, group.commands, 1)
    fix = f"did you mean {hint}? " if hint else ""
    if name in {"calibrate", "quantize"} and "extra argument" in message:
        fix = "the model is given as --model MODEL; "
    message = message.removeprefix("Got ")
    return InputError(message[:1].lower() + message[1:], fix=f"{fix}see `{path} --help`")
