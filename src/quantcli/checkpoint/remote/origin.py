"""Where files are that are not on this machine: their list, and ranges of their bytes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantcli.core.errors import InputError
from quantcli.core.events import Progress

MAX_FILES = 20_000
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt
LONGEST_WAIT = 120.0  # seconds that a server may ask for


@dataclass(frozen=True)
class Version:
    """A file as a server describes it.

    nbytes: its size. tag: what changes with its content: an ETag, a hash, or the time of its last
    change; empty if the server gives nothing of the kind.
    """

    nbytes: int
    tag: str


@dataclass(frozen=True)
class Listing:
    """The files of a model, by their paths below its folder, and notes for the user."""

    files: Mapping[str, Version]
    notes: tuple[str, ...] = field(default=())


class PassingError(Exception):
    """A request that failed, and may succeed later.

    reason: in a few words, without addresses. nbytes: of the range that arrived all the same.
    wait: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, nbytes: int = 0, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.nbytes = nbytes
        self.wait = wait


class Origin(ABC):
    """A folder that is elsewhere.

    Subclasses are frozen dataclasses of texts: they are hashed, and sent to other processes. They hold
    no keys; each process finds those itself.
    """

    immutable = False  # whether the files at this address can never change

    @property
    @abstractmethod
    def address(self) -> str:
        """The address for people, without anything secret."""

    @property
    def name(self) -> str:
        """The last part of the address: a name for a folder."""
        return self.address.rstrip("/").rpartition("/")[2]

    @abstractmethod
    def list(self, progress: Progress) -> Listing:
        """The files. Raises InputError or MachineError, or PassingError if it may work later."""

    @abstractmethod
    def ask(self, name: str, version: Version, first: int, block: memoryview) -> None:
        """Fill `block` with the bytes of a file from `first` on, by one request.

        Raises PassingError, with the bytes that arrived before; InputError if the file is not that
        version any more, or if the server refuses.
        """

    def where(self, name: str) -> str:
        """A file for messages."""
        return f"{self.address}/{name}"

    def changed(self, name: str) -> InputError:
        """The error for a file that is not what it was."""
        return InputError(
            "the model changed while it was read",
            where=self.where(name),
            fix="let nobody write to the model, and run again with --fresh",
        )


def unfinished(address: str) -> InputError:
    """The error for a checkpoint that has the journal of a run."""
    what = "checkpoint is not finished: a run writes it, or was interrupted"
    fix = "run the command again that writes it: it continues where it stopped"
    return InputError(what, where=address, fix=fix)


def check_names(origin: Origin, files: Mapping[str, Version]) -> None:
    """InputError for names that are not paths inside a folder, and for too many of them."""
    trust = "take a model that you trust"
    if len(files) > MAX_FILES:
        what = f"the folder has over {MAX_FILES:,} files: this is not a model"
        raise InputError(what, where=origin.address, fix="give the folder that holds config.json")
    for name in files:
        if not is_inside(name):
            what = f"the server lists a file whose name is not one inside a folder: {name!r:.200}"
            raise InputError(what, where=origin.address, fix=trust)
    folders = {name[: place.start()] for name in files for place in re.finditer("/", name)}
    if both := sorted(folders & files.keys()):
        what = f"the server lists `{both[0]:.200}` as a file and as a folder"
        raise InputError(what, where=origin.address, fix="remove one of them, or take another model")


def is_inside(name: str) -> bool:
    """Whether a name is that of a file inside a folder, on any file system."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and not {"", ".", ".."} & {*parts}
        and all(len(part.encode()) <= 255 for part in parts)
    )
