"""Paths of files that are elsewhere: of what was fetched the file is here, and the rest is a hole."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PosixPath
from typing import IO, Any

from quantcli.checkpoint.remote.origin import Origin, Version


@dataclass(frozen=True)
class Place:
    """A file of an origin. here: bytes from its first that the folder on this machine has."""

    origin: Origin
    name: str
    version: Version
    here: int

    @property
    def stamp(self) -> tuple[int, int]:
        """The size, and a number that changes with the content: what size and time are of a file."""
        digest = sha256(f"{self.version.tag}".encode()).digest()
        return self.version.nbytes, int.from_bytes(digest[:7], "big")


class RemoteFile(PosixPath):
    """The path of a file that is elsewhere, and is read there.

    It can be pickled and read on another machine, where the path does not exist.
    """

    place: Place | None = None

    @classmethod
    def of(cls, path: str, place: Place) -> RemoteFile:
        """The file at `path`, whose bytes are at `place`."""
        file = cls(path)
        file.place = place
        return file

    def __reduce__(self) -> Any:
        return (RemoteFile.of, (str(self), self.place)) if self.place else super().__reduce__()

    def open(self, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> IO[Any]:  # type: ignore[override]
        """The file for reading, as `Path.open` gives it; nobody can write to it."""
        place = self.place
        if place is None or "r" not in mode or (place.here >= place.version.nbytes and self.exists()):
            return super().open(mode, buffering, *rest, **named)
        raw = _Stream(self, place)
        if "b" in mode:
            return raw if buffering == 0 else io.BufferedReader(raw, 2**20)  # type: ignore[return-value]
        return io.TextIOWrapper(io.BufferedReader(raw, 2**20), *rest, **named)

    def read(self, offset: int, block: memoryview, bound: int) -> int:
        """Fill `block` with the bytes at `offset`, or its beginning if the file ends before. Returns
        their number. bound: the end of what is read in one go."""
        place = self.place
        assert place is not None
        nbytes = min(len(block), place.version.nbytes - offset)
        if nbytes <= 0:
            return 0
        if offset + nbytes <= place.here and self.exists():
            with super().open("rb", 0) as file:
                return os.preadv(file.fileno(), [block[:nbytes]], offset)
        from quantcli.checkpoint.remote.ahead import READER  # `inspect` of a folder does without

        READER.read(place.origin, place.name, place.version, offset, block[:nbytes], bound)
        return nbytes

    def will_read(self, begin: int, end: int) -> None:
        """Begin to fetch bytes [begin, end), if memory for it is free."""
        if self.place is not None:
            from quantcli.checkpoint.remote.ahead import READER

            READER.want(self.place.origin, self.place.name, self.place.version, begin, end)


class _Stream(io.RawIOBase):
    """A remote file as a stream."""

    def __init__(self, file: RemoteFile, place: Place) -> None:
        super().__init__()
        self._file = file
        self._nbytes = place.version.nbytes
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The present position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, block: Any) -> int:
        """Fill `block`, or its beginning."""
        place = self._file.place
        assert place is not None
        view = memoryview(block).cast("B")
        if self._at < place.here:  # what is here is read without what comes after it
            view = view[: place.here - self._at]
        n = self._file.read(self._at, view, self._nbytes)
        self._at += n
        return n


class RemoteFolder(PosixPath):
    """The folder of a model that is elsewhere: `/` gives its files."""

    origin: Origin | None = None
    places: dict[str, Place] = {}  # noqa: RUF012 - of paths that have none
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, path: str, origin: Origin, places: dict[str, Place], notes: tuple[str, ...]
    ) -> RemoteFolder:
        """The folder at `path` with some files of an origin. notes: for people."""
        folder = cls(path)
        folder.origin, folder.places, folder.notes = origin, places, notes
        return folder

    def __reduce__(self) -> Any:
        if self.origin is None:
            return super().__reduce__()
        return RemoteFolder.of, (str(self), self.origin, self.places, self.notes)

    def __truediv__(self, key: Any) -> Path:  # type: ignore[override]
        place = self.places.get(os.fspath(key))
        if place is None:
            return super().__truediv__(key)
        return RemoteFile.of(os.path.join(self, key), place)  # noqa: PTH118 - `/` is this function


MOUNTED: dict[str, RemoteFolder] = {}  # folders of models that are elsewhere, of this process


def as_remote(path: Path) -> Path:
    """A path as the folder of a remote model, if it is one of this process."""
    return MOUNTED.get(str(path), path)
