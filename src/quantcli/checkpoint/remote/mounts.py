"""A model that is elsewhere as a folder here: small files whole, weights as their headers and a hole.

The folder is temporary and small. Its files are `RemoteFile`s: all other bytes are read where they are.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich.filesize import decimal

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.files import INDEX, STALE, why_left_out
from quantcli.checkpoint.header import MAX_HEADER
from quantcli.checkpoint.hub.repository import FIRST, choose
from quantcli.checkpoint.remote.file import MOUNTED, Place, RemoteFolder, as_remote
from quantcli.checkpoint.remote.origin import Listing, Origin, Version, check_names
from quantcli.checkpoint.remote.reading import listed, read_range, report_to
from quantcli.core.disk import disk_errors
from quantcli.core.errors import InputError, forget_name, name_folder
from quantcli.core.events import SILENT, Progress
from quantcli.core.text import count

_WORKERS = 8
_SMALL = 2**20  # bytes of a file that is fetched whole
_MOST_SMALL = 64 * 2**20  # bytes of all of them, and of one that must be fetched
_GUESS = 2**16  # bytes that are asked for first: most headers are shorter
_LONGEST_NAME = 100


class Mount:
    """A model that is elsewhere, as long as it is open: until `close`, or the end of the process."""

    def __init__(self, origin: Origin, listing: Listing, progress: Progress) -> None:
        """Fetch headers and small files. Raises InputError and MachineError."""
        check_names(origin, listing.files)
        report_to(origin, progress)
        self._origin, self._files = origin, listing.files
        self._mutex, self._closed = threading.Lock(), False
        with disk_errors(Path(tempfile.gettempdir())):
            parent = Path(tempfile.mkdtemp(prefix="quantcli-")).resolve()
        self._remove = weakref.finalize(self, shutil.rmtree, parent, ignore_errors=True)
        try:
            root = parent / _folder_name(origin)
            name_folder(str(root), origin.address)
            self.folder = RemoteFolder.of(str(root), origin, {}, listing.notes)
            _open.add(self)
            self._fill(root, progress)
        except BaseException:
            self.close()
            raise
        MOUNTED[str(root)] = self.folder

    def close(self) -> None:
        """Remove the folder."""
        MOUNTED.pop(str(self.folder), None)
        forget_name(str(self.folder))
        with self._mutex:
            self._closed = True
        self._remove()
        _open.discard(self)

    def _fill(self, root: Path, progress: Progress) -> None:
        sizes = {name: version.nbytes for name, version in self._files.items()}
        with disk_errors(root):
            root.mkdir()
        self._all(self._whole, [name for name in FIRST if name in sizes])
        choice = choose(sizes, root)
        progress.say(f"reading the headers of {self._origin.address}: {count(choice.weights, 'shard')}")
        small, total = [], 0
        for name in sorted(choice.others, key=sizes.__getitem__):
            needed = name in {CONFIG, INDEX} or why_left_out(name) == STALE
            total += sizes[name]
            if (needed or (sizes[name] <= _SMALL and total <= _MOST_SMALL)) and name not in FIRST:
                small.append(name)
        self._all(self._whole, small)
        self._all(self._header, choice.weights)
        for name in sizes:
            if name not in self.folder.places:
                self._write(name, b"")

    def _all(self, fetch: Callable[[str], None], names: Iterable[str]) -> None:
        """Fetch several files at a time."""
        pool = ThreadPoolExecutor(_WORKERS, "quantcli-headers")
        try:
            for _ in pool.map(fetch, names):
                pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _whole(self, name: str) -> None:
        version = self._files[name]
        if version.nbytes > _MOST_SMALL:
            what = f"`{name}` has {decimal(version.nbytes)}; it may have {decimal(_MOST_SMALL)}"
            raise InputError(what, where=self._origin.address, fix="take a model that you trust")
        self._write(name, _bytes(self._origin, name, version, 0, version.nbytes))

    def _header(self, name: str) -> None:
        content = read_header_bytes(self._origin, name, self._files[name])
        self._write(name, content)

    def _write(self, name: str, content: bytes) -> None:
        version = self._files[name]
        try:
            with self._mutex:
                if self._closed:  # after an error, while this file was under way
                    return
                write_stub(Path(self.folder, name), content, version.nbytes)
        except OverflowError:
            what = f"the server says that the file has {version.nbytes} bytes"
            fix = "take a model that you trust"
            raise InputError(what, where=self._origin.where(name), fix=fix) from None
        self.folder.places[name] = Place(self._origin, name, version, len(content))


_open: set[Mount] = set()  # they live until they are closed, or until the process ends


def remove_all() -> None:
    """Remove the folders of all models that are open, and wait for nobody: the process ends."""
    for mount in [*_open]:
        mount._closed = True
        mount._remove()


def read_header_bytes(origin: Origin, name: str, version: Version) -> bytes:
    """The length and the JSON of a header. One that is too long, or longer than the file, is cut: the
    reader of headers refuses it."""
    content = _bytes(origin, name, version, 0, min(_GUESS, version.nbytes))
    end = 8 + int.from_bytes(content[:8], "little")
    if len(content) < 8 or end > 8 + MAX_HEADER:
        return content
    end = min(end, version.nbytes)
    if end > len(content):
        content += _bytes(origin, name, version, len(content), end - len(content))
    return content[:end]


def write_stub(path: Path, content: bytes, nbytes: int) -> None:
    """A file of `nbytes` bytes that begins with `content`; the rest is a hole."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.truncate(nbytes)


def _bytes(origin: Origin, name: str, version: Version, first: int, nbytes: int) -> bytes:
    block = bytearray(nbytes)
    read_range(origin, name, version, first, memoryview(block))
    return bytes(block)


def _folder_name(origin: Origin) -> str:
    name = origin.name
    plain = name.isprintable() and "/" not in name and name not in {"", ".", ".."}
    return name if plain and len(name.encode()) <= _LONGEST_NAME else "model"


def complete(folder: Path, suits: Callable[[str], bool]) -> None:
    """Fetch files of a remote model, if `folder` is one, that other libraries read by themselves.

    suits: says by its name whether a file is needed. InputError for a very large one.
    """
    remote = as_remote(folder)
    if not isinstance(remote, RemoteFolder):
        return
    for name, place in [*remote.places.items()]:
        nbytes = place.version.nbytes
        if place.here >= nbytes or "/" in name or not suits(name):
            continue
        if nbytes > _MOST_SMALL:
            what = f"`{name}` has {decimal(nbytes)}; it may have {decimal(_MOST_SMALL)}"
            raise InputError(what, where=place.origin.address, fix="give a folder with the whole model")
        path = Path(remote, name)
        fresh = path.with_name(f".{name}.arriving")
        content = _bytes(place.origin, name, place.version, 0, nbytes)
        with disk_errors(path):
            fresh.write_bytes(content)
            fresh.rename(path)
        remote.places[name] = replace(place, here=nbytes)


def changed_files(folder: RemoteFolder, names: Iterable[str]) -> Sequence[str]:
    """Those of some files that are not what they were when the model was opened."""
    origin = folder.origin
    if origin is None or origin.immutable:
        return []
    files = listed(origin, SILENT).files
    return [name for name in names if files.get(name) != folder.places[name].version]
