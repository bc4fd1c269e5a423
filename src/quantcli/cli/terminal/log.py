"""The file of --log-file."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from quantcli.checkpoint.files import INDEX, JOURNAL, MANIFEST, PART
from quantcli.core.disk import check_file, disk_errors
from quantcli.core.errors import InputError

_OF_A_RUN = (JOURNAL, MANIFEST, PART, INDEX, "calibration.json")


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
