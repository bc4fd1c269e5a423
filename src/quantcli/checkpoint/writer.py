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
        self._places: dict[str, tuple[int, TensorSpec]] = {}
        position = len(header)
        for spec in specs:
            self._places[spec.name] = position, spec
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
            self._pwrite(data, self._places[tensor][0] + offset)

    def write_columns(self, tensor: str, first: int, block: memoryview) -> None:
        """Write columns of a matrix [h, w], from column `first` on: the bytes of some [h, columns].

        It takes a system call for each row of the matrix, unless `block` has all columns.
        """
        position, spec = self._places[tensor]
        position += int(first * spec.itemsize)
        run, step = block.nbytes // spec.shape[0], spec.row_nbytes
        if run == step:
            run = step = block.nbytes
        with disk_errors(self._temporary):
            self._pwrite(block, position, run, step)

    def _pwrite(self, data: bytes | memoryview, position: int, run: int = 0, step: int = 0) -> None:
        """Write data from a position on, or runs of `run` bytes of it at positions `step` apart."""
        view = memoryview(data).cast("B")
        run = run or len(view)
        # The kernel lets one writer at a time into a file: who waits here sleeps, there it spins.
        with self._lock:
            for start in range(0, len(view), max(1, run)):
                done = 0
                while done < run:  # a write may be short
                    part = view[start + done : start + run]
                    done += os.pwrite(self._fd, part, position + done)
                position += step
            self._written += len(view)

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
