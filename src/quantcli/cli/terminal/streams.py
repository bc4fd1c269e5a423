"""The standard streams of the process, also closed or full ones, and pipes that nobody reads."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import sys
from typing import Any, TextIO, cast

from quantcli.core.errors import MachineError


def keep_streams() -> None:
    """Open descriptors 0 to 2 if they are closed, and let no message end the run.

    A closed one would become that of the next file that is opened, and messages would land in a
    shard. What is written to a closed standard output still fails; messages are lost.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, _Messages(sys.stderr))


class _Messages:
    """A stream that drops what it cannot write: the work is worth more than a message about it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return self._stream.write(text)
        except OSError:
            drop(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is there."""
        try:
            self._stream.flush()
        except OSError:
            drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drop(stream: TextIO) -> None:
    """Send what is left in a stream, and all that follows, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def check_stdout() -> None:
    """MachineError if standard output cannot be written to, as after `>&-`."""
    try:
        mode = fcntl.fcntl(sys.stdout.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, ValueError):  # not a file: a caller of this process reads it
        return
    if mode == os.O_RDONLY:
        raise _closed()


def stdout_error(error: OSError) -> MachineError:
    """An error of a write to standard output."""
    if error.errno == errno.EBADF:
        return _closed()
    reason = error.strerror or str(error)
    return MachineError(
        reason[:1].lower() + reason[1:], where="stdout", fix="send the output somewhere else: > FILE"
    )


def _closed() -> MachineError:
    return MachineError("standard output is closed", fix="send it somewhere: > FILE, or > /dev/null")
