"""The journal of a run: with it the same command continues after an interruption.

A text file in OUT.partial, one JSON object a line: first the plan, then every shard that is whole
and durable. A line that was cut off by a crash does not count.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.checkpoint.files import JOURNAL, MANIFEST, PART, SIGNATURE
from quantcli.core.disk import disk_errors, lock
from quantcli.core.errors import InputError
from quantcli.core.untrusted.names import file_name_fault
from quantcli.core.untrusted.tables import Table, parse_table, read_table

_FRESH = "run with --fresh to start over, or remove the directory"
HEAD = {"plan", "checksum", "source"}
_DONE = {"shard", "nbytes", "sha256"}


@dataclass(frozen=True)
class DoneShard:
    """A shard that an earlier run finished. A hash is None if it was not computed, or not kept."""

    nbytes: int
    sha256: str | None
    blake3: str | None = None


class Journal:
    """The open journal of one run; holds a lock, so that two runs cannot share OUT.partial."""

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        """Open or begin the journal of a run that is described by `head`.

        Raises InputError if the folder holds another plan's work, MachineError if another
        process is at work in it.
        """
        self._mutex = threading.Lock()
        self.path = folder / JOURNAL
        check_folder(folder, head)
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o666)
        try:
            lock(self._fd, folder)
            lines, nbytes = _lines(self.path)
            check_head(lines, head, str(folder))  # again: what was there before the lock may be gone
            self.done = done_shards(lines)
            with disk_errors(self.path):
                os.ftruncate(self._fd, nbytes)  # a new line must not join one that was cut off
            if not lines:
                self._append(head)
        except BaseException:
            self.close()
            raise

    def record(self, shard: str, nbytes: int, sha256: str | None) -> None:
        """Note that a shard is whole. Call it after the shard has been renamed."""
        self._append({"shard": shard, "nbytes": nbytes, "sha256": sha256})

    def _append(self, line: dict[str, Any]) -> None:
        raw = (json.dumps(line) + "\n").encode()
        with self._mutex, disk_errors(self.path):
            while raw:  # a write may be short
                raw = raw[os.write(self._fd, raw) :]
            os.fsync(self._fd)

    def remove(self) -> None:
        """The run is complete: take the journal out of the directory to publish. Keeps the lock."""
        with disk_errors(self.path):
            self.path.unlink()

    def close(self) -> None:
        """Let go of the lock; the journal stays unless it was removed."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with disk_errors(self.path):
                os.close(fd)


def check_folder(folder: Path, head: dict[str, Any] | None) -> int:
    """Number of shards that are done in `folder`; InputError unless it is absent, empty, or a run's.

    Without a `head` any run's work is accepted: it will be removed. MachineError if another process is
    at work in the folder.
    """
    if not os.path.lexists(folder):
        return 0
    _check_ours(folder)
    journal = folder / JOURNAL
    if not journal.exists():
        return 0
    with disk_errors(journal), journal.open("rb") as file:
        lock(file.fileno(), folder, shared=True)
    if head is None:
        return 0
    lines, _ = _lines(journal)
    check_head(lines, head, str(folder))
    return max(0, len(lines) - 1)


def remove_folder(folder: Path) -> None:
    """Delete OUT.partial with all that is in it.

    InputError if no run of quantcli made it, MachineError if another process is at work in it.
    """
    if os.path.lexists(folder):
        _check_ours(folder)
        discard(folder)


def discard(folder: Path) -> None:
    """Delete a folder under the lock of its journal, which goes last: it marks the folder."""
    with disk_errors(folder), (folder / JOURNAL).open("a") as file:
        lock(file.fileno(), folder)
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != JOURNAL:
                entry.unlink()
        shutil.rmtree(folder)


def only_ours(folder: Path) -> bool:
    """Whether a directory holds nothing but what its manifest lists, so that it may be deleted."""
    with disk_errors(folder):
        listing = folder / (PART if (folder / PART).is_file() else MANIFEST)
        if not listing.is_file():
            return not any(folder.iterdir())
        try:
            names = [*read_table(listing).table("files"), SIGNATURE]
            files = {folder / name for name in names} | {listing}
        except InputError:
            return False
        return all(path in files or path.is_dir() for path in folder.rglob("*"))


def _check_ours(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        raise InputError("path exists and is not a directory", where=str(folder), fix="move it away")
    with disk_errors(folder):
        names = {entry.name for entry in folder.iterdir()}
    if names and JOURNAL not in names and not only_ours(folder):
        raise InputError(
            "folder is not the work of an interrupted run: it has no journal",
            where=str(folder),
            fix="move it away",
        )


def check_head(lines: list[dict[str, Any]], head: dict[str, Any], where: str) -> None:
    """InputError if the lines of a journal are those of a run with another head."""
    if lines and lines[0] != head:
        changed = next(key for key in ("source", "plan", "checksum") if lines[0][key] != head[key])
        source = "set of parts" if "parts" in head["source"] else "model"
        words = {"source": source, "plan": "recipe or version", "checksum": "option --checksum"}
        raise InputError(
            f"place holds the unfinished work of another run: the {words[changed]} has changed since",
            where=where,
            fix=_FRESH,
        )


def done_shards(lines: list[dict[str, Any]]) -> dict[str, DoneShard]:
    """The shards that the lines of a journal list."""
    return {
        line["shard"]: DoneShard(line["nbytes"], line["sha256"], line.get("blake3"))
        for line in lines[1:]
    }


def check_head_types(head: Table) -> None:
    """InputError for the first line of a journal if it has values of other types than a run writes."""
    head.text("plan")
    head.flag("checksum")
    head.table("source")


def _check_line(line: Table, *, first: bool) -> None:
    """InputError for a line that no run writes."""
    if first:
        line.only(HEAD)
        check_head_types(line)
        return
    line.only(_DONE, {"blake3"})
    line.integer("nbytes")
    line.text("sha256", None)
    line.text("blake3", None)
    if (fault := file_name_fault(line.text("shard"), folders=False)) is not None:
        line.refuse("shard", fault)


def parse_journal(raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal before the first that no run writes, and how many bytes they take."""
    lines: list[dict[str, Any]] = []
    nbytes = 0
    for line in raw.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            table = parse_table(line, JOURNAL)
            _check_line(table, first=not lines)
        except InputError:
            break
        lines.append(dict(table.value))
        nbytes += len(line)
    return lines, nbytes


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    with disk_errors(path):
        return parse_journal(path.read_bytes())
