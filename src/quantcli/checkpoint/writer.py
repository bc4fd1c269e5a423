"""One safetensors shard: header first, data at planned offsets, in its place only when whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from quantcli.checkpoint.header import encode_header
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.disk import disk_errors, sync_folder


class ShardWriter:
    """Writes one shard under a temporary name; `finish` renames it. Threads may share it."""

    def __init__(self, folder: Path, file: str, tensors: Iterable[TensorSpec]) -> None:
        """Create the temporary file and write its header. `tensors` in the order of their data."""
        specs = tuple(tensors)
        header = encode_header(specs)
        self.path = folder / file
        self._temporary = folder / f".{file}.writing"
        self._offsets: dict[str, int] = {}
        position = len(header)
        for spec in specs:
            self._offsets[spec.name] = position
            position += spec.nbytes
        self.nbytes = position
        self._written = 0
        self._lock = threading.Lock()
        with disk_errors(self._temporary):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._fd = os.open(self._temporary, flags, 0o666)
            try:
                self._pwrite(header, 0)
            except BaseException:
                self.abandon()
                raise

    def write(self, tensor: str, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at byte `offset` of a tensor."""
        with disk_errors(self._temporary):
            self._pwrite(data, self._offsets[tensor] + offset)

    def _pwrite(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data).cast("B")
        done = 0
        # The kernel lets one writer at a time into a file: who waits here sleeps, there it spins.
        with self._lock:
            while done < len(view):  # a write may be short
                done += os.pwrite(self._fd, view[done:], position + done)
            self._written += done

    def finish(self) -> None:
        """Make the shard durable and give it its name. Every byte must have been written once."""
        assert self._written == self.nbytes, (self.path, self._written, self.nbytes)
        with disk_errors(self._temporary):
            os.fsync(self._fd)
            self.abandon()
            self._temporary.rename(self.path)
            sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Close the temporary file and leave it behind: the next run begins it anew."""
        fd, self._fd = self._fd, -1
        if fd >= 0:  # closed twice, it could be another thread's file by then
            os.close(fd)
