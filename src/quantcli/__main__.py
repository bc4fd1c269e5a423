"""The tool as a process: signals, exit codes, and one message for whatever goes wrong."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import typer

from quantcli.cli.app import app
from quantcli.core.errors import Exit, InputError, Interrupted, QuantError

_COMMANDS = {"inspect", "calibrate", "quantize", "pack", "verify"}
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's, or typer's own copy of it


def _stop_on_signals() -> None:
    """SIGINT and SIGTERM interrupt, and what is done is kept; a second one ends the process at once."""
    # SIGINT is ignored in what a script starts with `&`
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signals = [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGINT]

    def stop(*_: object) -> None:
        for number in signals:
            signal.signal(number, lambda *_: os._exit(Exit.INTERRUPTED))
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, stop)


def entry() -> NoReturn:
    """`main` as a process. Interrupted, it ends at once: native threads abort while Python ends."""
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
    # a plan is up to a million small lasting objects: looking through them again and again for
    # cycles takes a third of the time
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
    except OSError as error:  # where nothing on the way knew a better word
        from quantcli.core.disk import machine_error

        problem = machine_error(error, Path(error.filename or "stdout"))
        try:
            out.error(problem)
            sys.stdout.flush()
        except OSError:  # it is standard output that takes no more: words still reach stderr
            Output(as_json=False).error(problem)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.FIX_MACHINE)
    except Exception as error:
        out.bug(error)
        sys.exit(Exit.OUR_BUG)


def _run(argv: list[str]) -> int:
    """The command's exit code. Not through typer's own `main`, which prints errors its own way."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("quantcli", argv) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as error:
        return error.exit_code
    except KeyboardInterrupt:
        goes_on = argv[0] in {"quantize", "calibrate", "pack"}
        fix = "the same command again" + (" continues where it stopped" if goes_on else "")
        raise Interrupted("interrupted", fix=fix) from None
    except _UsageError as error:
        message = getattr(error, "format_message", error.__str__)().rstrip(".")
        command_name = argv[0] if argv[0] in _COMMANDS else ""
        fix = "see `" + " ".join(f"quantcli {command_name} --help".split()) + "`"
        if command_name in {"calibrate", "quantize"} and "extra argument" in message:
            fix = "the model is given as --model MODEL; " + fix
        raise InputError(message[:1].lower() + message[1:], fix=fix) from None
    return Exit.DONE


if __name__ == "__main__":
    entry()
