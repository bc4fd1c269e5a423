"""A shard that is uploaded while it is made: its extents wait in memory for their turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.writer import TensorWriter
from quantcli.convert.destination import ShardSink
from quantcli.convert.objects.bucket import PARTS_AT_ONCE, Bucket, part_nbytes
from quantcli.core import extents
from quantcli.core.disk import Hashes
from quantcli.core.errors import MachineError
from quantcli.core.extents import Assembly, Buffers

if TYPE_CHECKING:
    from quantcli.planning.plan import Shard

_MOST_SHARDS = 2  # an upload holds parts in memory


class ExtentStream(Assembly):
    """A file that is sent in the order of its bytes; its size is given, and pieces come in any order.

    An extent always gets memory, above the limit if it must: if it waited for some, the extents before
    it might wait for it.
    """

    def __init__(
        self,
        nbytes: int,
        buffers: Buffers,
        send: Callable[[bytes], None],
        hashes: Hashes | None = None,
    ) -> None:
        """send: takes the next bytes of the file; one thread at a time calls it."""
        super().__init__(nbytes, buffers, hashes)
        self._send = send

    def put_runs(self, position: int, data: memoryview, run: int, step: int) -> None:
        """Put runs of `run` bytes at positions `step` apart."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), max(1, run)):
            self.put(position, view[start : start + run])
            position += step

    def finish(self) -> None:
        """Send what is left. Every byte was put once."""
        assert not self._missing, (self._missing, self._nbytes)
        self._pass_all()
        if self._error is not None:
            raise self._error

    def _memory(self, number: int) -> memoryview:
        memory = self._buffers.take(beyond=True)
        if memory is None:
            raise MachineError("out of memory", fix="use fewer --workers")
        return memory

    def _write_piece(self, piece: memoryview, position: int) -> None:
        raise AssertionError("every extent has memory")

    def _write_whole(self, number: int, memory: memoryview | None) -> None:
        if self._error is not None:
            raise self._error
        with self._lock:
            self._whole[number] = extents.Whole(memory, 1)
            # who sends needs no further memory
            while self._passing and not self._buffers.plenty:
                self._lock.wait()
        self._pass_whole()

    def _pass(self, number: int, whole: extents.Whole) -> None:
        memory, size = whole.memory, self._size(number)
        assert memory is not None
        try:
            if self._hashes is not None:
                self._hashes.update(memory[:size])
            self._send(bytes(memory[:size]))
        except BaseException as error:
            self._error = self._error or error
            raise
        self._used(whole, memory)


class ObjectWriter(TensorWriter):
    """Uploads one shard; the object is there when `finish` returns, whole or not at all."""

    _file: ExtentStream

    def __init__(self, bucket: Bucket, shard: Shard, buffers: Buffers, *, checksum: bool) -> None:
        super().__init__(shard.tensors, checksum=checksum)
        self._upload = bucket.upload(shard.file, self.nbytes)
        self._begin(ExtentStream(self.nbytes, buffers, self._upload.write, self._hashes))

    def finish(self) -> dict[str, Any]:
        """Complete the upload. Returns the shard's entry of the manifest."""
        self._file.finish()
        self._upload.close()
        return self._entry()

    def abandon(self) -> None:
        """Give the upload up, so that the store keeps nothing of it."""
        self._upload.abort()


@dataclass(frozen=True)
class ObjectSink(ShardSink):
    """Uploads shards to a folder in object storage."""

    bucket: Bucket
    most_shards = _MOST_SHARDS
    in_memory = True

    def extents(self, shards: Sequence[Shard]) -> int:
        """Those of tensors that are written by columns: they are whole when their last column is.

        Two weights are under way at a time, at most.
        """
        gathered = (
            sum(output.spec.nbytes for output in item.outputs if output.axis)
            for shard in shards
            for item in shard.items
        )
        largest = max(gathered, default=0)
        return 2 * (-(-largest // extents.EXTENT) + 1) if largest else 0

    def memory(self, shards: Sequence[Shard]) -> int:
        """These extents, and the parts of uploads."""
        parts = max((part_nbytes(shard.nbytes) for shard in shards), default=0)
        uploads = (_MOST_SHARDS + 1) * (PARTS_AT_ONCE + 1) * parts
        return self.extents(shards) * extents.EXTENT + uploads

    def writer(self, shard: Shard, buffers: Buffers, *, checksum: bool) -> ObjectWriter:
        """A writer that uploads the shard."""
        return ObjectWriter(self.bucket, shard, buffers, checksum=checksum)
