"""A folder in object storage as an origin of files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from quantcli.checkpoint.files import JOURNAL
from quantcli.checkpoint.remote.origin import Listing, Origin, PassingError, Version, unfinished
from quantcli.checkpoint.remote.stores import (
    Place,
    is_store_error,
    may_pass,
    open_store,
    our_error,
    reason,
    status_of,
)
from quantcli.core.errors import InputError
from quantcli.core.events import Progress

if TYPE_CHECKING:
    from obstore.store import ObjectStore


_CHUNK = 2**16  # bytes that are taken together; what a cut costs at most


@cache
def _opened(place: Place) -> ObjectStore:
    return open_store(place, retries=False)


@dataclass(frozen=True)
class ObjectFolder(Origin):
    """A folder in object storage."""

    place: Place

    @property
    def address(self) -> str:
        """Its address, such as s3://bucket/folder."""
        return str(self.place)

    def list(self, progress: Progress) -> Listing:
        """The objects below the folder."""
        import obstore

        begin = self.place.key("")
        files: dict[str, Version] = {}
        try:
            for entries in obstore.list(_opened(self.place), self.place.folder or None):
                for entry in entries:
                    name = entry["path"].removeprefix(begin)
                    if name in files and not entry["size"]:
                        continue  # NAME/, an empty object that stands for a folder
                    if entry["path"].startswith(begin) and (name or entry["size"]):
                        tag = entry["e_tag"] or f"{entry['last_modified']:%Y%m%dT%H%M%S%f}"
                        files[name] = Version(entry["size"], tag)
        except Exception as error:
            raise self._ours(error, "") from None
        for name in [*files]:  # consoles make a folder by an empty object, named like it
            for folder in map(str, PurePosixPath(name).parents):
                if folder in files and not files[folder].nbytes:
                    del files[folder]
        if JOURNAL in files:
            raise unfinished(self.address)
        if not files:
            raise InputError(f"no object under {self.address}", fix="check the address")
        return Listing(files)

    def ask(self, name: str, version: Version, first: int, block: memoryview) -> None:
        """Fill `block` by one request; see the base class."""
        import obstore

        store, key, done = _opened(self.place), self.place.key(name), 0
        try:
            answer = obstore.get(
                store,
                key,
                options={
                    "range": (first, first + len(block)),
                    **({"if_match": version.tag} if version.tag.startswith('"') else {}),
                },
            )
            if answer.meta["size"] != version.nbytes:
                raise self.changed(name)
            for piece in answer.stream(min_chunk_size=_CHUNK):
                data = memoryview(piece)[: len(block) - done]
                block[done : done + len(data)] = data
                done += len(data)
        except Exception as error:
            raise self._ours(error, name, done) from None
        if done < len(block):
            raise PassingError("the connection was cut", done)

    def _ours(self, error: Exception, name: str, done: int = 0) -> Exception:
        if not is_store_error(error):
            return error
        if type(error).__name__ == "PreconditionError" or status_of(error) == 416:
            return self.changed(name)
        return (
            PassingError(reason(error), done) if may_pass(error) else our_error(error, self.place, name)
        )
