"""One safetensors shard: header first, data at planned offsets, in its place only when whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from quantcli.checkpoint.header import encode_header
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.disk import Hashes, disk_errors, sync_folder
from quantcli.core.extents import Buffers, ExtentFile


class ShardWriter:
    """Writes one shard under a temporary name; `finish` renames it. Threads may share it."""

    def __init__(
        self,
        folder: Path,
        file: str,
        tensors: Iterable[TensorSpec],
        *,
        buffers: Buffers | None = None,
        by_columns: Collection[str] = (),
        checksum: bool = False,
        read_soon: bool = False,
    ) -> None:
        """Create the temporary file and write its header. `tensors` in the order of their data.

        buffers:    those of the run; by default a few of its own.
        by_columns: names of tensors that `write_columns` writes.
        checksum:   hash the file for its entry of the manifest.
        read_soon:  keep the file in the page cache.
        """
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
        self._hashes = Hashes() if checksum else None
        places = [self._places[name] for name in by_columns]
        self._file = ExtentFile(
            self._temporary,
            self.nbytes,
            buffers or Buffers(8, 2),
            hashes=self._hashes,
            scattered=[(begin, begin + spec.nbytes) for begin, spec in places],
            direct=not read_soon,
        )
        try:
            self._file.put(0, header)
        except BaseException:
            self.abandon()
            raise

    @property
    def backlog(self) -> int:
        """Extents of the file that are written and wait to be hashed."""
        return self._file.backlog

    def write(self, tensor: str, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at byte `offset` of a tensor."""
        self._file.put(self._places[tensor][0] + offset, data)

    def write_columns(self, tensor: str, first: int, block: memoryview) -> None:
        """Write columns of a matrix [h, w], from column `first` on: the bytes of some [h, columns].

        It takes a system call for each row of the matrix, unless `block` has all columns.
        """
        position, spec = self._places[tensor]
        position += int(first * spec.itemsize)
        run, step = block.nbytes // spec.shape[0], spec.row_nbytes
        if run == step:
            run = step = block.nbytes
        self._file.put_runs(position, block, run, step)

    def finish(self) -> dict[str, Any]:
        """Make the shard durable and give it its name. Every byte must have been written once.

        Returns its entry of the manifest, with hashes if the writer was asked for them.
        """
        self._file.finish()
        with disk_errors(self._temporary):
            self._temporary.rename(self.path)
            sync_folder(self.path.parent)
        return {"bytes": self.nbytes, **(self._hashes.hex() if self._hashes else {})}

    def abandon(self) -> None:
        """Close the temporary file and leave it behind: the next run begins it anew."""
        self._file.close()
