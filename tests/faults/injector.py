"""The shim that injects faults: built with `cc`, preloaded into a process, and called from Python."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SHIM = Path(__file__).with_name("shim.c")
SHORT, KILL = -1, -2
# what the calls of each kind can fail with; in the order of the enum in shim.c
KINDS: dict[str, tuple[int, ...]] = {
    "open to read": (errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM),
    "open to write": (errno.ENOSPC, errno.EROFS, errno.ENFILE, errno.EDQUOT, errno.EACCES),
    "read": (errno.EIO, SHORT, errno.EINTR, errno.ESTALE),
    "write": (errno.ENOSPC, SHORT, errno.EIO, errno.EINTR, errno.EDQUOT, errno.EFBIG),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "close": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.ENOSPC, errno.EACCES),
    "truncate": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "mkdir": (errno.ENOSPC, errno.EACCES, errno.EROFS),
    "remove": (errno.EIO, errno.EACCES, errno.EROFS),
    "link": (errno.EPERM, errno.EMLINK, errno.ENOSPC),
    "list": (errno.EIO, errno.EMFILE, errno.EACCES),
    "stat": (errno.EIO, errno.EACCES, errno.ESTALE),
    "lock": (errno.EIO, errno.ENOLCK, errno.EINTR),
    "map": (errno.ENOMEM, errno.ENODEV),
    "space": (errno.EIO, errno.EACCES),
}
# a disk that is full stays so
_STAYS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
HARMLESS = {SHORT, errno.EINTR}  # a command goes on


@dataclass(frozen=True)
class Fault:
    """A fault at call `number` of a kind, counted from 1. error: an errno, SHORT or KILL."""

    kind: str
    number: int
    error: int

    def __str__(self) -> str:
        names = {SHORT: "short", KILL: "SIGKILL"}
        return f"{names.get(self.error) or errno.errorcode[self.error]} at {self.kind} {self.number}"


class Injector:
    """The shim in this process, for calls below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = bytes(folder)
        self._library = ctypes.CDLL(None)
        self._library.fault_shared.restype = ctypes.POINTER(ctypes.c_long * (len(KINDS) + 1))

    def arm(self, fault: Fault | None) -> None:
        """From now on count calls, and let one fail. Call it in the process that will make them."""
        if fault is None:
            self._library.fault_set(-1, 0, 0, 0, self._folder)
            return
        kind = [*KINDS].index(fault.kind)
        stays = fault.error in _STAYS
        self._library.fault_set(kind, ctypes.c_long(fault.number), fault.error, stays, self._folder)

    @property
    def counts(self) -> dict[str, int]:
        """Calls of each kind since a process was armed last."""
        return dict(zip(KINDS, self._library.fault_shared().contents, strict=False))

    @property
    def fired(self) -> bool:
        """Whether the fault has happened."""
        return bool(self._library.fault_shared().contents[len(KINDS)])


def preload() -> None:
    """Start this program again with the shim in its process, unless it is there."""
    if hasattr(ctypes.CDLL(None), "fault_set"):
        if library := os.environ.pop("LD_PRELOAD", None):  # processes that this one starts need it not
            shutil.rmtree(Path(library).parent)
        return
    library = Path(tempfile.mkdtemp(prefix="quantcli-faults-")) / "shim.so"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *options, "-o", library, SHIM, "-ldl"], check=True)
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "LD_PRELOAD": str(library)})
