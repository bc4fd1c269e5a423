"""What an interrupted run leaves behind so that the same command can go on.

A text file in OUT.partial, one JSON object a line: first the plan, then every shard that is whole and
durable. A line that was cut off by a crash does not count.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import InputError, MachineError
from quantcli.writer import disk_errors

JOURNAL = ".quantcli_journal"
MANIFEST = "quantcli_manifest.json"
_FRESH = "run with --fresh to start over, or remove the directory"


@dataclass(frozen=True)
class DoneShard:
    """A shard that an earlier run finished. `sha256` is None where hashing was off."""

    nbytes: int
    sha256: str | None


class Journal:
    """The open journal of one run; holds a lock, so that two runs cannot share OUT.partial."""

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        """Open or begin the journal of a run that is described by `head`.

        Raises InputError where the folder holds another plan's work, MachineError where another
        process is at work in it.
        """
        self._lock = threading.Lock()
        self.path = folder / JOURNAL
        check_folder(folder, head)
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise MachineError(
                "another run is writing here", where=str(folder), fix="wait for it, or stop it"
            ) from None
        lines, nbytes = _lines(self.path)
        self.done = {
            line["shard"]: DoneShard(line["nbytes"], line["sha256"]) for line in lines[1:]
        }
        self._file.truncate(nbytes)  # what is appended must not join a line that was cut off
        if not lines:
            self._append(head)

    def record(self, shard: str, nbytes: int, sha256: str | None) -> None:
        """Note that a shard is whole. Call it after the shard has been renamed."""
        self._append({"shard": shard, "nbytes": nbytes, "sha256": sha256})

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock, disk_errors(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The run is complete: take the journal out of the directory to publish."""
        with disk_errors(self.path):
            self.path.unlink()
            self._file.close()

    def close(self) -> None:
        """Let go of the lock; the journal stays."""
        self._file.close()


def check_folder(folder: Path, head: dict[str, Any]) -> None:
    """InputError unless `folder` is absent, empty, ours to finish, or ours and finished."""
    if not folder.exists():
        return
    _check_ours(folder)
    if not (folder / JOURNAL).exists():
        return
    lines, _ = _lines(folder / JOURNAL)
    if lines and lines[0] != head:
        changed = "model" if lines[0].get("source") != head["source"] else "recipe or version"
        raise InputError(
            f"holds the unfinished work of another run: the {changed} has changed since",
            where=str(folder),
            fix=_FRESH,
        )


def remove_folder(folder: Path) -> None:
    """Delete OUT.partial with all that is in it. InputError where no run of ours made it."""
    if folder.exists():
        _check_ours(folder)
        with disk_errors(folder):
            shutil.rmtree(folder)


def _check_ours(folder: Path) -> None:
    if not folder.is_dir() or folder.is_symlink():
        raise InputError("exists and is not a directory", where=str(folder), fix="move it away")
    names = {entry.name for entry in folder.iterdir()}
    if names and not names & {JOURNAL, MANIFEST}:
        raise InputError(
            "is not the work of an interrupted run: it has no journal",
            where=str(folder),
            fix="move it away",
        )


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and how many bytes they take."""
    lines: list[dict[str, Any]] = []
    nbytes = 0
    with disk_errors(path):
        raw = path.read_bytes()
    for line in raw.splitlines(keepends=True):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        keys = {"plan", "checksum", "source"} if not lines else {"shard", "nbytes", "sha256"}
        if not isinstance(value, dict) or value.keys() != keys:
            break
        lines.append(value)
        nbytes += len(line)
    return lines, nbytes
