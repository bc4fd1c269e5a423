"""A shard that is being written, and the files that it is read from."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import read_into
from quantcli.checkpoint.writer import ShardWriter
from quantcli.core.disk import disk_errors
from quantcli.core.errors import MachineError
from quantcli.planning.plan import Copy, Item, Quantize, Repack, Shard


def _read_from(item: Item) -> Iterator[StoredTensor]:
    """The source tensors that are read, block by block, for an item; those that are decoded, and
    modules that are packed anew, open their own files."""
    if not isinstance(item.source, Encoded) and not isinstance(item, Repack):
        yield item.source
    if not isinstance(item, Copy) and item.bias is not None:
        yield item.bias


class OpenShard:
    """A shard being written and the source files that it is read from."""

    def __init__(self, shard: Shard, folder: Path, jobs: int) -> None:
        self.shard = shard
        self._jobs = jobs
        self._lock = threading.Lock()
        self._sources: dict[Path, int] = {}
        self.writer = ShardWriter(folder, shard.file, shard.tensors)
        try:
            for path in {stored.file for item in shard.items for stored in _read_from(item)}:
                with disk_errors(path):
                    self._sources[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except MachineError:
            self.abandon()
            raise

    def job_done(self) -> bool:
        """Count a job; whether it was the last one."""
        with self._lock:
            self._jobs -= 1
            return self._jobs == 0

    def read(self, stored: StoredTensor, offset: int, block: memoryview) -> None:
        """Fill `block` from byte `offset` of a tensor that an item is made from."""
        read_into(self._sources[stored.file], stored, offset, block)

    def bias(self, item: Quantize | Repack, start: int, count: int) -> Tensor | None:
        """The bias of some rows [n] of an item, where it has one that matters."""
        if item.bias is None:
            return None
        width = item.bias.spec.row_nbytes
        raw = bytearray(count * width)
        self.read(item.bias, start * width, memoryview(raw))
        return torch.frombuffer(raw, dtype=torch_dtype(item.bias.spec.dtype))

    def finish(self) -> None:
        """The shard is whole: give it its name."""
        self._close_sources()
        self.writer.finish()

    def abandon(self) -> None:
        """Close everything; what was written stays under its temporary name."""
        self._close_sources()
        self.writer.abandon()

    def _close_sources(self) -> None:
        while self._sources:
            os.close(self._sources.popitem()[1])
