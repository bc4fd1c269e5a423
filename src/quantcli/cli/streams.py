"""Where a command writes: standard streams, also closed or full ones, and the file of --log-file."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

from quantcli.checkpoint.files import INDEX, JOURNAL, MANIFEST, PART
from quantcli.core.disk import check_file, disk_errors
from quantcli.core.errors import InputError, MachineError

_OF_A_RUN = (JOURNAL, MANIFEST, PART, INDEX, "calibration.json")


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


class Log:
    """A file to which every line of a run is appended, with its time in UTC."""

    def __init__(self, path: Path, on_failure: Callable[[str], None]) -> None:
        """on_failure: told once if a line cannot be written; the log then ends.

        InputError if the file lies in a checkpoint or a calibration or is not a regular one,
        MachineError if it cannot be opened.
        """
        check_file("--log-file", path)
        _check_place(path)
        self._path, self._on_failure = path, on_failure
        self._lock = threading.Lock()
        self._file: TextIO | None
        with disk_errors(path):
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, text: str) -> None:
        """Append text; each of its lines gets the time."""
        lines = _stamped(text)
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(lines)
                self._file.flush()
            except OSError as error:
                self._end()
                reason = error.strerror or str(error)
                self._on_failure(f"the log ends here, as it cannot be written: {self._path}: {reason}")

    def write_at_once(self, text: str) -> None:
        """Append text, also if another thread waits for the disk."""
        if self._file is not None:
            with suppress(OSError, ValueError):
                os.write(self._file.fileno(), _stamped(text).encode(errors="backslashreplace"))

    def close(self) -> None:
        """End the log."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # of lines that could not be written
                file.close()


def _stamped(text: str) -> str:
    """Lines of text behind the time."""
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}Z"
    return "".join(f"{stamp}  {line}\n" for line in text.splitlines())


def _check_place(path: Path) -> None:
    """InputError for a file in a folder that a run reads or replaces."""
    for folder in path.absolute().parents:
        found = next((n for n in _OF_A_RUN if (folder / n).exists()), None) or next(
            (f.name for f in folder.glob("*.safetensors")), None
        )
        if found is not None:
            raise InputError(
                f"the log would lie in a checkpoint or a calibration: {folder} has {found}",
                where=f"--log-file {path}",
                fix="give a file in another folder",
            )
