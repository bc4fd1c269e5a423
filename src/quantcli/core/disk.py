"""Files on disk: written durably and as a whole, hashed; system errors as MachineError."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from quantcli.core.errors import InputError, MachineError

_HASH_BYTES = 2**20
# errors of a path that leads nowhere; all others are the machine's
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})


def write_file(path: Path, content: bytes) -> None:
    """Write a small file durably. After a crash it is complete, or as it was before."""
    temporary = path.with_name(f".{path.name}.writing")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


def check_file(option: str, file: Path) -> None:
    """InputError if `file`, the value of `option`, could not be written. Called before the work."""
    where = f"{option} {file}"
    with disk_errors(file):
        if file.is_dir():
            raise InputError(f"`{file}` is a directory", where=where, fix="give a file")
        if file.exists() and not file.is_file():
            fix = "give the name of a new file, or of one to replace"
            raise InputError(f"`{file}` is not a regular file", where=where, fix=fix)
        if not file.parent.is_dir():
            fix = "create the directory first"
            raise InputError(f"directory `{file.parent}` does not exist", where=where, fix=fix)


class Hashes:
    """The hashes of a file as the manifest lists them, from its bytes in their order.

    Two hashes: hubs and release notes use sha256; blake3 is as safe, and ten times as fast on
    processors without sha256 instructions, which makes `verify --full` fast.
    """

    def __init__(self) -> None:
        self._digests: dict[str, Any] = {"sha256": hashlib.sha256(), "blake3": blake3()}

    def update(self, data: memoryview) -> None:
        """Take the next bytes of the file. Other threads run meanwhile."""
        for digest in self._digests.values():
            digest.update(data)

    def hex(self) -> dict[str, str]:
        """The hashes of all bytes so far, by name."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in small pieces."""
    return digest_of(path, "sha256")


def blake3_of(path: Path) -> str:
    """Hex digest of a file, read in small pieces."""
    return digest_of(path, "blake3")


def digest_of(path: Path, algorithm: str, start: int = 0, stop: int | None = None) -> str:
    """Hex digest of bytes [start, stop) of a file, read in small pieces.

    algorithm: blake3, or a name that hashlib knows. stop: None for the end. A file that ends before
    gives the digest of what there is.
    """
    digest = blake3() if algorithm == "blake3" else hashlib.new(algorithm)
    _read(path, digest, start, stop)
    return str(digest.hexdigest())


def file_entry(path: Path, *, checksum: bool) -> dict[str, Any]:
    """A file as the manifest lists it: {"bytes": n}, and if `checksum` its hashes, from one reading."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size}
    if checksum:
        hashes = Hashes()
        _read(path, hashes)
        entry |= hashes.hex()
    return entry


def _read(path: Path, digest: Any, start: int = 0, stop: int | None = None) -> None:
    left = math.inf if stop is None else stop - start
    with disk_errors(path), path.open("rb", buffering=0) as file:
        file.seek(start)
        buffer = bytearray(_HASH_BYTES)
        while left > 0 and (n := file.readinto(buffer)):
            n = int(min(n, left))
            digest.update(memoryview(buffer)[:n])
            left -= n


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    with disk_errors(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as a MachineError that names the path."""
    try:
        yield
    except OSError as error:
        raise machine_error(error, path) from None


def machine_error(error: OSError, path: Path | None) -> MachineError:
    """An error of the operating system, with the path and a fix."""
    again = "run the same command again: it continues where it stopped"
    fixes = {
        errno.ENOSPC: f"free some space and {again}",
        errno.EDQUOT: f"raise the quota and {again}",
        errno.EACCES: "check the permissions of the folder, or choose another --out",
        errno.EPERM: "check the permissions of the folder, or choose another --out",
        errno.EROFS: "the file system is read-only: choose another --out",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENFILE: f"close other programs: the machine has too many open files; {again}",
        errno.EFBIG: f"raise the limit of file sizes (ulimit -f), or take another file system; {again}",
        errno.ENOMEM: f"free some memory, or give fewer --workers; {again}",
    }
    reason = error.strerror or str(error)
    fix = fixes.get(error.errno or 0, f"remove the cause and {again}")
    return MachineError(
        reason[:1].lower() + reason[1:], where=None if path is None else str(path), fix=fix
    )


def lock(fd: int, folder: Path, *, shared: bool = False) -> None:
    """Lock an open file until it is closed. MachineError if another process has the lock.

    Some network file systems have no locks; the file stays unlocked there.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MachineError(
            "another run is writing here", where=str(folder), fix="wait for it, or stop it"
        ) from None
    except OSError as error:
        if error.errno not in {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}:
            raise machine_error(error, folder) from None
