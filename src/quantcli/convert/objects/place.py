"""A folder in object storage as the destination: s3://, gs:// and az://."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.files import JOURNAL, MANIFEST, SIGNATURE
from quantcli.checkpoint.manifest import encode_manifest, whole_manifest
from quantcli.checkpoint.remote.file import RemoteFolder
from quantcli.checkpoint.remote.objects import ObjectFolder
from quantcli.checkpoint.remote.origin import Version
from quantcli.checkpoint.remote.stores import Place, parse_place
from quantcli.convert.destination import Destination, Start
from quantcli.convert.objects.bucket import Bucket
from quantcli.convert.objects.draft import LATE, ObjectDraft
from quantcli.convert.objects.journal import Notes, ObjectJournal, read_notes
from quantcli.convert.objects.stream import ObjectSink
from quantcli.core.errors import InputError
from quantcli.core.place import OTHER_OUT
from quantcli.core.untrusted.names import printable
from quantcli.core.untrusted.tables import parse_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantcli.planning.parts import Part
    from quantcli.planning.plan import Shard

_WORDS = "move them away, or choose another --out"


def object_place(address: str) -> ObjectPlace:
    """The destination of an address. InputError for one that names no folder in a bucket."""
    place = parse_place(address)
    if not place.folder:
        raise InputError(
            "output needs a folder of its own in the bucket", where=address, fix=f"give {place}/NAME"
        )
    return ObjectPlace(Bucket(place))


@dataclass(frozen=True)
class ObjectPlace(Destination):
    """Objects whose keys begin with a folder."""

    bucket: Bucket

    def __str__(self) -> str:
        return str(self.bucket)

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.bucket.place.folder.rpartition("/")[2]

    @property
    def draft_place(self) -> str:
        """The address: objects cannot be renamed."""
        return str(self)

    @property
    def begun(self) -> bool:
        """Whether there is a journal."""
        return JOURNAL in self.bucket.list()

    @property
    def exists(self) -> bool:
        """Whether there is a checkpoint, which a run with --force replaces."""
        listed = self.bucket.list()
        return MANIFEST in listed and JOURNAL not in listed

    @property
    def fate(self) -> str:
        """Objects are overwritten one by one."""
        return "gone as soon as the run begins"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if there is no journal and all objects have their sizes."""
        listed = self.bucket.list()
        if MANIFEST not in listed or JOURNAL in listed:
            return None
        sizes = {name: version.nbytes for name, version in listed.items()}
        return whole_manifest(self.bucket.get(MANIFEST)[0], sizes)

    def sibling(self, suffix: str) -> Path:
        """A folder in the current directory."""
        return Path(self.name + suffix)

    def part(self, part: Part) -> Destination:
        """InputError: parts are joined on a disk."""
        raise InputError(
            "parts are written to folders, not to object storage",
            where=f"--out {self}",
            fix="give a folder for each --part, and the address to `quantcli pack --merge --out`",
        )

    def check(self, model: Path, *, force: bool, what: str = "the model") -> None:
        """InputError for an address that overlaps with the model's, or that holds other objects."""
        origin = model.origin if isinstance(model, RemoteFolder) else None
        if isinstance(origin, ObjectFolder):
            _check_apart(origin.place, self.bucket.place, what)
        listed = self.bucket.list()
        if JOURNAL in listed:
            if others := sorted(listed.keys() - read_notes(self.bucket).files - {JOURNAL}):
                raise self._foreign(others[0])
            return
        if MANIFEST in listed:
            self._check_replaced(force)
            self._files_of_manifest(listed)
        elif listed:
            raise self._foreign(min(listed))

    def room(self, shards: Sequence[int], others: int) -> None:
        """No disk of this machine is needed."""

    def memory(self, shards: Sequence[Shard]) -> int:
        """The extents that wait for the last column, and the parts of uploads."""
        return self._sink.memory(shards)

    def done(self, head: dict[str, Any] | None) -> int:
        """Number of shards that an interrupted run has left, as it uploaded them."""
        listed = self.bucket.list()
        if JOURNAL not in listed or head is None:
            return 0
        notes = read_notes(self.bucket)
        notes.check(head, self.bucket)
        return len(_whole(notes, listed))

    def links(self, files: Sequence[Path]) -> bool:
        """No: what is on a disk here must be uploaded."""
        return False

    @property
    def _sink(self) -> ObjectSink:
        return ObjectSink(self.bucket)

    def begin(self, start: Start) -> ObjectDraft:
        """Write the journal, and take away what would look like a checkpoint."""
        listed = self.bucket.list()
        files, done, identity = {*start.files}, {}, None
        if JOURNAL in listed:
            notes = read_notes(self.bucket)
            files |= notes.files
            identity = notes.identity
            if not start.fresh:
                notes.check(start.head, self.bucket)
                done = _whole(notes, listed)
        elif MANIFEST in listed:
            self._check_replaced(start.force)
            files |= self._files_of_manifest(listed)
        journal = ObjectJournal(self.bucket, start.head, files, done, identity)
        gone = {*LATE} if not start.fresh else files
        self.bucket.delete(sorted(gone & listed.keys()))
        return ObjectDraft(self.bucket, journal)

    def _check_replaced(self, force: bool) -> None:
        """InputError for a checkpoint that is there, unless it is to be replaced."""
        if not force:
            fix = "choose another --out, or use --force"
            raise InputError("output exists", where=str(self), fix=fix)

    def _files_of_manifest(self, listed: dict[str, Version]) -> set[str]:
        """The names in the manifest that is there, and its own. InputError if there are others."""
        content, _ = self.bucket.get(MANIFEST)
        try:
            table = parse_table(content, MANIFEST)
            sealed = encode_manifest(table.value) == content
            files = {*table.table("files"), SIGNATURE, MANIFEST} if sealed else set()
        except InputError:
            files = set()
        if others := sorted(listed.keys() - files):
            raise self._foreign(others[0])
        return files

    def _foreign(self, name: str) -> InputError:
        return InputError(
            f"objects are there that quantcli did not write, such as `{printable(name)}`",
            where=str(self),
            fix=_WORDS,
        )


def _whole(notes: Notes, listed: dict[str, Version]) -> dict[str, Any]:
    """The files of a journal that the store still has as they were uploaded."""
    return {name: up for name, up in notes.done.items() if listed.get(name) == up.version}


def _check_apart(model: Place, out: Place, what: str) -> None:
    if (model.scheme, model.bucket) != (out.scheme, out.bucket):
        return
    here, there = f"{out.folder}/", f"{model.folder}/" if model.folder else ""
    if here == there:
        how = "is the place of"
    elif here.startswith(there):
        how = "is inside"
    elif there.startswith(here):
        how = "contains"
    else:
        return
    raise InputError(f"output {how} {what}", where=str(out), fix=OTHER_OUT)
