"""Where a checkpoint goes: a folder, or a place that is not on this machine.

A destination is a name, and may be checked at any time. A draft is a checkpoint that is under way in
it, with the journal of what is done; a shard sink takes its shards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.remote.address import address_of, public_form, scheme_of
from quantcli.checkpoint.remote.stores import SCHEMES
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress
from quantcli.core.place import expanded

if TYPE_CHECKING:
    from typing import Self

    from quantcli.checkpoint.writer import TensorWriter
    from quantcli.core.extents import Buffers
    from quantcli.core.findings import Finding
    from quantcli.planning.parts import Part
    from quantcli.planning.plan import Shard

Entry = dict[str, Any]  # a file as the manifest lists it: {"bytes": n}, and if it was hashed its hashes


def destination_of(out: str | Path, progress: Progress = SILENT) -> Destination:
    """The destination that the user names. InputError for a URL of an unknown kind.

    progress: hears of a server that is asked about the place.
    """
    address, scheme = address_of(str(out)), scheme_of(str(out))
    if address is None:
        from quantcli.convert.folder import LocalFolder

        return LocalFolder(expanded(out))
    if scheme in SCHEMES:
        from quantcli.convert.objects.place import object_place

        return object_place(address)
    if scheme == "hf":
        from quantcli.convert.hub import HubRepository

        return HubRepository(address, progress)
    raise InputError(
        f"nothing can be written to {scheme}://",
        where=f"--out {public_form(address)}",
        fix="give a folder, hf://ORG/NAME, or an address of object storage: s3://BUCKET/FOLDER",
    )


@dataclass(frozen=True)
class Start:
    """How a draft begins.

    head:  the head of the journal: a later run continues only if it has the same.
    files: the names of all files that will be written, without the journal.
    fresh: delete first what an interrupted run left.
    force: replace a checkpoint that is there.
    progress: hears of the place, such as of a server that is busy.
    """

    head: dict[str, Any]
    files: Collection[str]
    fresh: bool = False
    force: bool = False
    progress: Progress = SILENT


@dataclass(frozen=True)
class Room:
    """What a checkpoint needs of a disk of this machine, in bytes. where: the end of a sentence."""

    needed: int
    free: int
    where: str = ""


class Destination(ABC):
    """A place for a checkpoint; `str` gives it as the user named it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of the place."""

    @property
    def folder(self) -> Path | None:
        """The local folder; None if the place is not on this machine."""
        return None

    @property
    def value(self) -> Path | str:
        """The place as Python callers get it: a path, or a URL."""
        return self.folder or str(self)

    @property
    def address(self) -> str:
        """One text for each place, however it was named; a place in another one begins with its."""
        return f"{self}".rstrip("/") + "/"

    @property
    def served_as(self) -> str:
        """The place as an engine takes it."""
        return str(self)

    @property
    def serve_flags(self) -> tuple[str, ...]:
        """What an engine must be given next to it."""
        return ()

    @property
    def remark(self) -> str:
        """What to know of the place before the work, behind its name."""
        return ""

    @property
    @abstractmethod
    def draft_place(self) -> str:
        """Where a draft is before it is complete, for messages."""

    @property
    @abstractmethod
    def begun(self) -> bool:
        """Whether a draft is there."""

    @property
    @abstractmethod
    def exists(self) -> bool:
        """Whether something is there that `--force` would replace."""

    @property
    @abstractmethod
    def fate(self) -> str:
        """What `--force` does with what is there, as the end of a sentence: "deleted then"."""

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a checkpoint of quantcli that is there whole: its files have their sizes.
        None for anything else, and if it cannot be known."""
        return None

    @abstractmethod
    def sibling(self, suffix: str) -> Path:
        """The local folder that is named after the place, such as OUT.calibration."""

    @abstractmethod
    def part(self, part: Part) -> Destination:
        """Where a part of the checkpoint goes. InputError if the place takes no parts."""

    @abstractmethod
    def check(self, model: Path, *, force: bool, what: str = "the model") -> None:
        """InputError or MachineError for a place that a run could not or must not write.

        model: the directory that is read; `what` names it in messages.
        """

    @abstractmethod
    def room(self, shards: Sequence[int], others: int) -> Room | None:
        """What a checkpoint needs of a local disk; None if it needs none. MachineError if that is not
        there.

        shards: the bytes of each. others: those of all other files.
        """

    def memory(self, shards: Sequence[Shard]) -> int:
        """Bytes of memory that these shards take above what they would on a disk."""
        return 0

    @abstractmethod
    def done(self, head: dict[str, Any] | None) -> int:
        """Number of shards that an interrupted run with this head has left.

        InputError if a draft of something else is there; without a head any draft is accepted.
        MachineError if another process is known to be at work in it.
        """

    @abstractmethod
    def links(self, files: Sequence[Path]) -> bool:
        """Whether local files can become files of the checkpoint without a copy."""

    @abstractmethod
    def begin(self, start: Start) -> Draft:
        """Open or begin the draft. It must be closed.

        InputError if a draft of something else is there, MachineError if another process is at work
        in it.
        """


class ShardSink(ABC):
    """Takes the shards of a draft. It can be pickled: workers in other processes write with it.

    most_shards: shards at a time: with jobs that nobody has taken, at most; if it is 1, in all.
    in_memory:   whether an extent stays in memory until its turn comes.
    """

    most_shards: int
    in_memory = False

    @abstractmethod
    def extents(self, shards: Sequence[Shard]) -> int:
        """Extents that shards hold at most, next to those that workers fill."""

    @abstractmethod
    def writer(self, shard: Shard, buffers: Buffers, *, checksum: bool) -> TensorWriter:
        """A writer of a whole shard; its `finish` makes the shard durable, and gives its entry."""

    @contextmanager
    def attempt(self, file: str) -> Iterator[ShardSink]:
        """The sink for one attempt to write a shard. Others may be under way: those of processes that
        nobody waits for any more."""
        yield self

    def on_all(self) -> ShardSink:
        """The sink for processes on other machines."""
        return self

    @property
    def shared(self) -> Path | None:
        """The folder that all machines must share, if it is one."""
        return None


class Draft(ABC):
    """A checkpoint that is under way. Threads may share it.

    sink:  takes the shards.
    notes: remarks for the user, when the work is done.
    """

    sink: ShardSink
    notes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def done(self) -> int:
        """Number of files in the journal: those that are whole, and not changed since."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it is, for messages."""

    @abstractmethod
    def reuse(self, name: str, nbytes: int, *, checksum: bool) -> Entry | str | None:
        """The entry of a file that an earlier run finished; why it cannot be used, as the end of a
        sentence; None if there is none."""

    @abstractmethod
    def record(self, name: str, entry: Entry) -> None:
        """Note in the journal that a file is whole. Call it when its writer has finished."""

    @abstractmethod
    def put(self, name: str, content: bytes, *, checksum: bool) -> Entry:
        """Write a small file."""

    @abstractmethod
    def copy(self, source: Path, name: str, *, checksum: bool, link: bool = False) -> Entry:
        """Write a file with the bytes of another one. link: without a copy, if that works."""

    @abstractmethod
    def close_with(self, listing: str, content: bytes, files: Mapping[str, Entry]) -> None:
        """All `files` are there: remove others, and write the file that lists them."""

    @abstractmethod
    def verified(self) -> tuple[list[Finding], tuple[str, ...]]:
        """Errors of the checkpoint, from its headers, and as text faults that its source has too.

        Call it after `close_with`.
        """

    @abstractmethod
    def publish(self) -> None:
        """Make it the checkpoint, whole or not at all, and remove the journal."""

    @abstractmethod
    def discard(self) -> None:
        """Delete all of it: no later run could continue."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it; without `publish` or `discard` a later run can continue."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
