"""One safetensors shard: header first, data at planned offsets, in its place only when whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from quantcli.checkpoint.header import encode_header
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.disk import Hashes, disk_errors, sync_folder
from quantcli.core.extents import Buffers, ExtentFile


class Pieces(Protocol):
    """A file of a known size that is put together from pieces: see `ExtentFile`."""

    @property
    def backlog(self) -> int:
        """Extents that are whole and wait for their turn."""

    def put(self, position: int, data: bytes | memoryview) -> None:
        """Put bytes at a position."""

    def put_runs(self, position: int, data: memoryview, run: int, step: int) -> None:
        """Put runs of `run` bytes at positions `step` apart."""


class TensorWriter(ABC):
    """Writes the tensors of one shard, each byte once. Threads may share it."""

    _file: Pieces

    def __init__(self, tensors: Iterable[TensorSpec], *, checksum: bool) -> None:
        """tensors: in the order of their data. checksum: hash the file for the manifest."""
        specs = tuple(tensors)
        self._header = encode_header(specs)
        self._places: dict[str, tuple[int, TensorSpec]] = {}
        position = len(self._header)
        for spec in specs:
            self._places[spec.name] = position, spec
            position += spec.nbytes
        self.nbytes = position
        self._hashes = Hashes() if checksum else None

    def _spans(self, tensors: Collection[str]) -> Sequence[tuple[int, int]]:
        """The first byte of each tensor, and the one behind it."""
        places = [self._places[name] for name in tensors]
        return [(begin, begin + spec.nbytes) for begin, spec in places]

    def _begin(self, file: Pieces) -> None:
        """Write the header; the file is open. It is abandoned if that fails."""
        self._file = file
        try:
            file.put(0, self._header)
        except BaseException:
            self.abandon()
            raise

    def _entry(self) -> dict[str, Any]:
        """The shard's entry of the manifest."""
        return {"bytes": self.nbytes, **(self._hashes.hex() if self._hashes else {})}

    @property
    def backlog(self) -> int:
        """Extents of the file that wait to be hashed or sent."""
        return self._file.backlog

    def write(self, tensor: str, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at byte `offset` of a tensor."""
        self._file.put(self._places[tensor][0] + offset, data)

    def write_columns(self, tensor: str, first: int, block: memoryview) -> None:
        """Write columns of a matrix [h, w], from column `first` on: the bytes of some [h, columns].

        It takes a write for each row of the matrix, unless `block` has all columns.
        """
        position, spec = self._places[tensor]
        position += int(first * spec.itemsize)
        run, step = block.nbytes // spec.shape[0], spec.row_nbytes
        if run == step:
            run = step = block.nbytes
        self._file.put_runs(position, block, run, step)

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Make the shard durable under its name. Every byte must have been written once.

        Returns its entry of the manifest, with hashes if the writer was asked for them.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Give the shard up: the next run begins it anew. No thread may be writing."""


class ShardWriter(TensorWriter):
    """Writes one shard on disk under a temporary name; `finish` renames it."""

    _file: ExtentFile

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
        super().__init__(tensors, checksum=checksum)
        self.path = folder / file
        self._temporary = folder / f".{file}.writing"
        self._begin(
            ExtentFile(
                self._temporary,
                self.nbytes,
                buffers or Buffers(8, 2),
                hashes=self._hashes,
                scattered=self._spans(by_columns),
                direct=not read_soon,
            )
        )

    def finish(self) -> dict[str, Any]:
        """Make the shard durable and give it its name. Returns its entry of the manifest."""
        self._file.finish()
        with disk_errors(self._temporary):
            self._temporary.rename(self.path)
            sync_folder(self.path.parent)
        return self._entry()

    def abandon(self) -> None:
        """Close the temporary file and leave it behind: the next run begins it anew."""
        self._file.close()
