"""A folder as the destination: OUT.partial with a journal becomes OUT by one rename."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quantcli.checkpoint.files import JOURNAL, MANIFEST
from quantcli.checkpoint.manifest import whole_manifest
from quantcli.checkpoint.writer import ShardWriter
from quantcli.convert.destination import Destination, Draft, Entry, Room, ShardSink, Start
from quantcli.convert.journal import Journal, check_folder, discard, only_ours, remove_folder
from quantcli.convert.publish import (
    check_destination,
    is_exchanged,
    keep_exchanged,
    publish,
    replaced_folder,
)
from quantcli.core.disk import disk_errors, file_entry, sync_folder, write_file
from quantcli.core.place import check_space, partial_folder

if TYPE_CHECKING:
    from quantcli.core.extents import Buffers
    from quantcli.core.findings import Finding
    from quantcli.planning.parts import Part
    from quantcli.planning.plan import Shard

_CHUNK = 2**20  # bytes


@dataclass(frozen=True)
class LocalFolder(Destination):
    """A folder on a disk of this machine, or on one that machines share."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    @property
    def folder(self) -> Path:
        """The path."""
        return self.path

    @property
    def partial(self) -> Path:
        """Where a draft is."""
        return partial_folder(self.path)

    @property
    def draft_place(self) -> str:
        """OUT.partial."""
        return str(self.partial)

    @property
    def begun(self) -> bool:
        """Whether OUT.partial is there."""
        return self.partial.exists()

    @property
    def exists(self) -> bool:
        """Whether OUT is there."""
        return self.path.exists()

    @property
    def fate(self) -> str:
        """A folder of ours is deleted; one that holds more is kept under another name."""
        kept = self.path.is_dir() and not only_ours(self.path)
        return f"kept as {replaced_folder(self.path)}" if kept else "deleted then"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if all files have their sizes."""
        try:
            content = (self.path / MANIFEST).read_bytes()
            files = [path for path in self.path.rglob("*") if path.is_file()]
            sizes = {path.relative_to(self.path).as_posix(): path.stat().st_size for path in files}
        except OSError:
            return None
        return whole_manifest(content, sizes)

    def sibling(self, suffix: str) -> Path:
        """A folder next to OUT."""
        return self.path.with_name(self.path.name + suffix)

    def part(self, part: Part) -> LocalFolder:
        """OUT.part-2-of-3."""
        return LocalFolder(part.folder(self.path))

    def check(self, model: Path, *, force: bool, what: str = "the model") -> None:
        """InputError or MachineError for a folder that the run could not or must not write."""
        check_destination(self.path, model, force=force, what=what)

    def room(self, shards: Sequence[int], others: int) -> Room:
        """All files, and the free bytes of the disk. MachineError if they are too few."""
        nbytes = sum(shards) + others
        return Room(nbytes, check_space(self.path, nbytes))

    def done(self, head: dict[str, Any] | None) -> int:
        """Number of whole shards in OUT.partial. Raises what `check_folder` raises."""
        return 0 if is_exchanged(self.partial, self.path) else check_folder(self.partial, head)

    def links(self, files: Sequence[Path]) -> bool:
        """Whether all files are on the disk that OUT goes to."""
        place = self.path.absolute().parent
        while not place.exists():
            place = place.parent
        device = place.stat().st_dev
        return all(file.stat().st_dev == device for file in files)

    @property
    def sink(self) -> FolderSink:
        """Writes into OUT.partial."""
        return FolderSink(self.partial)

    def begin(self, start: Start) -> FolderDraft:
        """Open or begin OUT.partial, under a lock."""
        if start.force:
            keep_exchanged(self.partial, self.path)
        if start.fresh:
            remove_folder(self.partial)
        return FolderDraft(self, Journal(self.partial, start.head), start.force)


@dataclass(frozen=True)
class FolderSink(ShardSink):
    """Writes shards into a folder."""

    folder: Path
    most_shards = 8

    def extents(self, shards: Sequence[Shard]) -> int:
        """None: an extent that gets no memory goes to the disk by pieces."""
        return 0

    def writer(self, shard: Shard, buffers: Buffers, *, checksum: bool) -> ShardWriter:
        """A writer that gives the file its name when it is whole."""
        return ShardWriter(
            self.folder,
            shard.file,
            shard.tensors,
            buffers=buffers,
            by_columns=shard.by_columns,
            checksum=checksum,
        )

    @contextmanager
    def attempt(self, file: str) -> Iterator[FolderSink]:
        """A folder for this attempt alone. Those of others are deleted: nobody needs them."""
        own = attempt_folder(self.folder, file)
        yield FolderSink(own)
        with disk_errors(own):
            (own / file).rename(self.folder / file)
            sync_folder(self.folder)
            own.rmdir()

    def on_all(self) -> FolderSink:
        """The same folder from its root: other processes work elsewhere."""
        return FolderSink(self.folder.resolve())

    @property
    def shared(self) -> Path:
        """The folder."""
        return self.folder


def attempt_folder(folder: Path, file: str) -> Path:
    """Make a folder for an attempt to write a file of `folder`. Those of others are deleted."""
    with disk_errors(folder):
        for other in folder.glob(f".{glob.escape(file)}.*"):
            shutil.rmtree(other, ignore_errors=True)
        own = folder / f".{file}.{secrets.token_hex(4)}"
        own.mkdir()
    return own


class FolderDraft(Draft):
    """OUT.partial, locked by its journal."""

    def __init__(self, out: LocalFolder, journal: Journal, force: bool) -> None:
        self.folder = out.partial
        self.journal = journal
        self.sink = out.sink
        self._out = out.path
        self._force = force

    @property
    def done(self) -> int:
        """Lines of the journal."""
        return len(self.journal.done)

    @property
    def place(self) -> str:
        """OUT.partial."""
        return str(self.folder)

    def reuse(self, name: str, nbytes: int, *, checksum: bool) -> Entry | str | None:
        """The entry of a finished file, read again; why it must be written again; or None."""
        done = self.journal.done.get(name)
        path = self.folder / name
        if done is None or not path.is_file():
            return None
        if not path.stat().st_size == done.nbytes == nbytes:
            return "its size has changed"
        entry = file_entry(path, checksum=checksum)
        return "its hash has changed" if checksum and entry["sha256"] != done.sha256 else entry

    def record(self, name: str, entry: Entry) -> None:
        """Add a line to the journal."""
        self.journal.record(name, entry["bytes"], entry.get("sha256"))

    def put(self, name: str, content: bytes, *, checksum: bool) -> Entry:
        """Write a file durably."""
        write_file(self.folder / name, content)
        return file_entry(self.folder / name, checksum=checksum)

    def copy(self, source: Path, name: str, *, checksum: bool, link: bool = False) -> Entry:
        """Copy a file durably, or give it a second name."""
        place = self.folder / name
        if not (link and _link(source, place)):
            copy_file(source, place)
        return file_entry(place, checksum=checksum)

    def close_with(self, listing: str, content: bytes, files: Mapping[str, Entry]) -> None:
        """Remove strange files and write the listing; all of it is durable on the disk."""
        _remove_strangers(self.folder, {*files, JOURNAL})
        write_file(self.folder / listing, content)
        with disk_errors(self.folder):
            sync_folder(self.folder)

    def verified(self) -> tuple[list[Finding], tuple[str, ...]]:
        """Check OUT.partial as the engine would load it."""
        from quantcli.verification.structure import verified

        errors, notes = verified(self.folder)
        here, there = str(self.folder), str(self._out)  # its name by then
        return errors, tuple(note.replace(here, there) for note in notes)

    def publish(self) -> None:
        """Rename OUT.partial to OUT; an old OUT is exchanged."""
        self.journal.remove()
        publish(self.folder, self._out, force=self._force)

    def discard(self) -> None:
        """Delete OUT.partial."""
        self.close()
        discard(self.folder)

    def close(self) -> None:
        """Let go of the lock."""
        self.journal.close()


def _remove_strangers(folder: Path, expected: set[str]) -> None:
    """Delete files in OUT.partial that an earlier run left and this plan does not name."""
    with disk_errors(folder):
        for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(file.startswith(f"{name}/") for file in expected):
                    path.rmdir()
            elif name not in expected:
                path.unlink()


def _link(source: Path, place: Path) -> bool:
    """Give a file a second name. False if the file system cannot."""
    with disk_errors(place):
        place.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), place)
    except OSError:  # another owner's file, or a file system without links: then it is copied
        return False
    return True


def _read(reader: BinaryIO, source: Path) -> bytes:
    with disk_errors(source):
        return reader.read(_CHUNK)


def copy_file(source: Path, place: Path) -> None:
    """Copy a file's bytes, with the permissions of a new file; durable, whole or not at all."""
    temporary = place.with_name(f".{place.name}.writing")
    with disk_errors(source), source.open("rb") as reader, disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as writer:
            while chunk := _read(reader, source):
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
        temporary.rename(place)
