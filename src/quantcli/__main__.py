"""The command line as a process: signals, exit codes, and one message for each error."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import typer

from quantcli.cli.app import app
from quantcli.core.errors import Exit, InputError, Interrupted, QuantError, closest

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's, or typer's own copy of it
_RESUMING = {"quantize", "calibrate", "pack"}


def _stop_on_signals() -> None:
    """Make SIGINT and SIGTERM interrupt the run; a second one ends the process at once."""
    # a script that starts a command with `&` makes it ignore SIGINT
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signals = [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGINT]

    def stop(*_: object) -> None:
        for number in signals:
            signal.signal(number, lambda *_: os._exit(Exit.INTERRUPTED))
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, stop)


def entry() -> NoReturn:
    """Run `main`. After an interrupt, skip Python's shutdown: native threads would abort in it."""
    try:
        main()
    except SystemExit as end:
        if end.code != Exit.INTERRUPTED:
            raise
        sys.stderr.flush()
        os._exit(Exit.INTERRUPTED)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with a documented code."""
    from quantcli.cli.output import Output

    argv = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # A plan has up to a million small objects that stay. With the default threshold, the search for
    # cycles among them takes a third of the time.
    gc.set_threshold(200_000, 50, 100)
    out = Output(as_json="--json" in argv)
    _stop_on_signals()
    try:
        sys.exit(_run(argv))
    except QuantError as error:
        out.error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # quantcli inspect MODEL | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.DONE)
    except OSError as error:  # one that nothing on the way turned into a better message
        from quantcli.core.disk import machine_error

        problem = machine_error(error, Path(error.filename or "stdout"))
        try:
            out.error(problem)
            sys.stdout.flush()
        except OSError:  # standard output cannot be written: report the error on stderr
            Output(as_json=False).error(problem)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.FIX_MACHINE)
    except Exception as error:
        out.bug(error)
        sys.exit(Exit.OUR_BUG)


def _run(argv: list[str]) -> int:
    """The exit code of a command. Replaces typer's `main`, which prints errors in its own way."""
    group: Any = typer.main.get_command(app)
    try:
        with group.make_context("quantcli", [*argv]) as context:  # click empties its list
            group.invoke(context)
        sys.stdout.flush()
    except typer.Exit as error:
        return error.exit_code
    except KeyboardInterrupt:
        resumes = " continues where it stopped" if argv[0] in _RESUMING else ""
        raise Interrupted("interrupted", fix=f"the same command again{resumes}") from None
    except _UsageError as error:
        raise _usage_error(error, argv[0], group) from None
    return Exit.DONE


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


if __name__ == "__main__":
    entry()
