"""A checkpoint that is under way in object storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.files import INDEX, JOURNAL, MANIFEST, SIGNATURE
from quantcli.checkpoint.remote.objects import ObjectFolder
from quantcli.checkpoint.remote.origin import Listing, Origin, Version
from quantcli.convert.destination import Draft, Entry
from quantcli.convert.objects.bucket import Bucket
from quantcli.convert.objects.journal import ObjectJournal, Uploaded
from quantcli.convert.objects.stream import ObjectSink
from quantcli.core.disk import Hashes, disk_errors
from quantcli.core.errors import MachineError
from quantcli.core.events import SILENT, Progress

if TYPE_CHECKING:
    from quantcli.core.findings import Finding

# What makes a folder a checkpoint for engines and people: written when all else is there.
LATE = (INDEX, CONFIG, SIGNATURE, MANIFEST)
_CHUNK = 2**20  # bytes


class ObjectDraft(Draft):
    """Uploads to the place itself, and a journal there; what makes it a checkpoint is kept back."""

    def __init__(self, bucket: Bucket, journal: ObjectJournal) -> None:
        self.bucket = bucket
        self.journal = journal
        self.sink = ObjectSink(bucket)
        self.notes = journal.notes
        self._late: dict[str, bytes] = {}
        self._there: dict[str, Version] = {}  # files next to the shards
        self._files: Mapping[str, Entry] = {}

    @property
    def done(self) -> int:
        """Lines of the journal."""
        return len(self.journal.done)

    @property
    def place(self) -> str:
        """The address."""
        return str(self.bucket)

    def reuse(self, name: str, nbytes: int, *, checksum: bool) -> Entry | str | None:
        """The entry of a finished object whose size and ETag are still those of the journal."""
        done = self.journal.done.get(name)
        if done is None:
            return None
        return done.entry if done.entry["bytes"] == nbytes else "its size has changed"

    def record(self, name: str, entry: Entry) -> None:
        """Note an object in the journal, after a look at what the store has. What is kept back is not
        there yet, and a later run makes it again."""
        if name in self._late:
            return
        self.journal.record(name, Uploaded(entry, self._sent(name, entry).tag))

    def put(self, name: str, content: bytes, *, checksum: bool) -> Entry:
        """Write a small object, or keep it back."""
        entry: Entry = {"bytes": len(content)}
        if checksum:
            hashes = Hashes()
            hashes.update(memoryview(content))
            entry |= hashes.hex()
        if name in LATE:
            self._late[name] = content
        else:
            self.bucket.put(name, content)
            self._there[name] = self._sent(name, entry)
        return entry

    def copy(self, source: Path, name: str, *, checksum: bool, link: bool = False) -> Entry:
        """Upload a file, or keep it back."""
        with disk_errors(source):
            if name in LATE:
                return self.put(name, source.read_bytes(), checksum=checksum)
            nbytes, hashes, size = source.stat().st_size, Hashes(), 0
            with source.open("rb") as reader, self.bucket.sending(name, nbytes) as upload:
                while chunk := reader.read(_CHUNK):
                    size += len(chunk)
                    upload.write(chunk)
                    if checksum:
                        hashes.update(memoryview(chunk))
        entry: Entry = {"bytes": size, **(hashes.hex() if checksum else {})}
        self._there[name] = self._sent(name, entry)
        return entry

    def close_with(self, listing: str, content: bytes, files: Mapping[str, Entry]) -> None:
        """Keep the listing for the end."""
        self._late[listing] = content
        self._files = files

    def verified(self) -> tuple[list[Finding], tuple[str, ...]]:
        """Check the objects as the engine would load them: headers are read from the store, and files
        that are kept back are added to them."""
        from quantcli.checkpoint.remote.mounts import Mount
        from quantcli.verification.structure import verified

        origin = _Origin(self.bucket, self._versions(), self._late)
        mount = Mount(origin, origin.list(SILENT), SILENT)
        try:
            errors, notes = verified(mount.folder)
            here = str(mount.folder)
        finally:
            mount.close()
        return errors, tuple(note.replace(here, self.place) for note in notes)

    def publish(self) -> None:
        """Write what was kept back, the manifest last, and remove what belongs to an older checkpoint.

        MachineError if an object is not what was uploaded, or if another run has begun since.
        """
        self.journal.confirm()
        listed = self.bucket.list()
        for name, version in self._versions().items():
            if listed.get(name) != version:
                raise MachineError(
                    "object is not what was uploaded: someone else has changed it",
                    where=f"{self.place}/{name}",
                    fix="let nobody write there, and run the same command again",
                )
        old = self.journal.files & listed.keys() - self._files.keys() - {JOURNAL}
        self.bucket.delete(sorted(old))
        for name in sorted(self._late, key=lambda name: LATE.index(name)):
            self.bucket.put(name, self._late[name])
        self.journal.remove()

    def discard(self) -> None:
        """Delete all objects of the run. MachineError if another run has taken them over."""
        self.journal.confirm()
        self.bucket.delete([*sorted(self.journal.files), JOURNAL])

    def close(self) -> None:
        """Nothing is held."""

    def _versions(self) -> dict[str, Version]:
        """Everything but what is kept back, as the store must list it."""
        return {**{name: up.version for name, up in self.journal.done.items()}, **self._there}

    def _sent(self, name: str, entry: Entry) -> Version:
        """What the store says of an object that was sent."""
        version = self.bucket.head(name)
        if version.nbytes != entry["bytes"]:
            raise MachineError(
                f"object has {version.nbytes} bytes; {entry['bytes']} were uploaded",
                where=f"{self.place}/{name}",
                fix="let nobody write there, and run the same command again",
            )
        return version


@dataclass(frozen=True, eq=False)
class _Origin(Origin):
    """The draft as a model to read: objects, and files that are kept back."""

    bucket: Bucket
    versions: Mapping[str, Version]
    late: Mapping[str, bytes]

    @property
    def address(self) -> str:
        return str(self.bucket)

    def list(self, progress: Progress) -> Listing:
        late = {name: Version(len(content), name) for name, content in self.late.items()}
        return Listing({**self.versions, **late})

    def ask(self, name: str, version: Version, first: int, block: memoryview) -> None:
        content = self.late.get(name)
        if content is None:
            ObjectFolder(self.bucket.place).ask(name, version, first, block)
        else:
            block[:] = content[first : first + len(block)]
