"""The command line as a process: signals, exit codes, and one message for each error.

Nothing heavy is imported before `main` has installed the handlers of signals: a command spends its
first second or more in imports, and an interrupt there ends it with a message, too.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import sys

from quantcli.core.untrusted.names import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, NoReturn

_INTERRUPTED, _NO_MEMORY = 130, 3
_RESUMING = {"quantize", "calibrate", "pack", "release"}
_PATIENCE = 0.4  # seconds that a command has to tidy up, and then to say so


class _Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGXCPU interrupt the run; a second one ends the process at once.

    While a command runs, an interrupt is a KeyboardInterrupt, after which the command tidies up. At
    any other time, and inside an import, it ends the process: an import that is cut short leaves
    half a module behind, and libraries take some interrupts there for a package that is missing.

    Python calls handlers between two operations of the main thread, and one of torch can take minutes.
    So a thread of its own waits for the same signals, and ends the process if the command does not do
    so in time. Nothing is lost by that: files are complete when they get their names, as they must be
    for a machine that loses its power.

    When the command is over, a signal ends the process with the command's own code.

    is_over: whether all work is done; kept: what later runs can use of this one, for the message;
    log: writes to the log without waiting.
    """

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv
        self.command_runs = False
        self.code: int | None = None  # of the command, when it is over
        self.is_over: Callable[[], bool] = bool
        self.kept: Callable[[], str] = str
        self.log: Callable[[str], object] = str
        self._last_words = _thread.allocate_lock()  # whoever has it writes the message
        # a script that starts a command with `&` makes it ignore SIGINT, and `nohup` SIGHUP
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
        self._signals = [n for n in signals if signal.getsignal(n) is not signal.SIG_IGN]
        for number in self._signals:
            signal.signal(number, self._interrupt)

    def _interrupt(self, _: int, frame: FrameType | None) -> None:
        for number in self._signals:
            signal.signal(number, lambda *_: os._exit(self._last_code))
        if self.code is not None:
            os._exit(self.code)
        if self.command_runs and not _is_importing(frame):
            raise KeyboardInterrupt
        if self.may_report():
            self.report(self.what, self.fix)
        self.tidy()
        os._exit(_INTERRUPTED)

    @property
    def _last_code(self) -> int:
        return _INTERRUPTED if self.code is None else self.code

    def wait(self) -> None:
        """Start the thread that ends the process if the command does not."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:  # noqa: SIM105 - contextlib is an import
            _thread.start_new_thread(self._wait, (reader,))
        except RuntimeError:
            pass  # no memory for a thread: the handlers must do

    def _wait(self, reader: int) -> None:
        while os.read(reader, 1)[0] not in self._signals:
            pass
        for _ in range(2):  # until the command has tidied up, and then until it has said so
            if select.select([reader], [], [], _PATIENCE)[0]:
                break  # a second signal
            if self.code is None and self.may_report():
                self.report(self.what, self.fix)
                self.tidy()
                break
        os._exit(self._last_code)

    def tidy(self) -> None:
        """Remove temporary files: functions for the end of the process do not run."""
        mounts = sys.modules.get("quantcli.checkpoint.remote.mounts")
        if remove := getattr(mounts, "remove_all", None):  # it may be half imported
            remove()

    def may_report(self) -> bool:
        """Whether nobody else reports the interrupt. True once."""
        return self._last_words.acquire(blocking=False)

    @property
    def what(self) -> str:
        """The message."""
        kept = self.kept()
        return f"interrupted; kept: {kept}" if kept else "interrupted"

    @property
    def fix(self) -> str:
        """What to do after it."""
        if self.is_over():
            return "nothing is left to do; `quantcli verify` checks it again"
        return "the same command again" + (
            " continues where it stopped" if self._argv[0] in _RESUMING else ""
        )

    def report(self, what: str, fix: str, code: int = _INTERRUPTED) -> None:
        """Report an error with system calls alone: what prints otherwise may be half imported."""
        literal = printable(what)
        quoted = f'"{what}"'
        if json := sys.modules.get("json"):  # it is there if the message has names in it
            quoted = json.dumps(what)
        document = f"""{{
  "ok": false,
  "schema_version": 1,
  "error": {{
    "what": {quoted},
    "where": null,
    "fix": "{fix}"
  }},
  "exit_code": {code}
}}
"""
        if "--json" in self._argv:
            _write(1, document)
        lines = [f"error: {literal}", f"  fix: {fix}"]
        # clear the line of the progress, and show the cursor that it hides
        terminal = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
        _write(2, terminal + "\n".join([*lines, ""]))
        for line in lines:
            self.log(line)


def _is_limited() -> bool:
    """Whether the process has a limit of memory."""
    import resource

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _write(descriptor: int, text: str) -> None:
    try:  # noqa: SIM105 - contextlib is an import
        os.write(descriptor, text.encode())
    except OSError:
        pass  # it is closed, or nobody reads it


def entry() -> NoReturn:
    """Run `main`, and end the process without Python's shutdown.

    To take torch apart costs a third of a second, and native threads would abort in it after an
    interrupt. Functions that libraries registered for the end of the process do run, except then.
    """
    code: Any
    try:
        main()
    except SystemExit as end:
        code = end.code
    except (MemoryError, ImportError, OSError, RuntimeError, SystemError):
        if not (limited := sys.modules.get("quantcli.cli.terminal.limited")) or not limited.is_child():
            raise
        os._exit(_NO_MEMORY)  # the parent says more
    ends = getattr(sys.modules.get("quantcli.cli.terminal.limited"), "ends", None)
    if ends:
        ends()
    if code != _INTERRUPTED:
        import atexit

        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 - contextlib is an import
            stream.flush()
        except OSError:
            pass  # `main` has reported it
    os._exit(code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with a documented code.

    arguments: those of the command line, for a caller that is not a process of its own: its streams
    stay as they are.
    """
    argv = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    signals = _Signals(argv)

    # numpy's linear algebra is not used here, and its threads take a tenth of a second to wait for work
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import gc

    # A plan has up to a million small objects that stay. With the default threshold, the search for
    # cycles among them takes a third of the time.
    gc.set_threshold(200_000, 50, 100)
    if arguments is None:
        from quantcli.cli.terminal.streams import keep_streams

        keep_streams()
        if _is_limited():
            from quantcli.cli.terminal.limited import run_limited

            if error := run_limited():
                signals.report(error.what, error.fix or "", error.exit_code)
                os._exit(error.exit_code)
        signals.wait()

    from quantcli.cli.process import run

    try:
        sys.exit(run(argv, signals))
    except KeyboardInterrupt:
        if signals.may_report():
            signals.report(signals.what, signals.fix)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    entry()
