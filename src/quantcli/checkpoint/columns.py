"""Matrices that are stored [k, n]: the rows of a weight stand in them as columns."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import read_into, tensor_bytes
from quantcli.core.disk import disk_errors

STRIP_BYTES = 4 * 2**20  # of one tensor's columns held: its parts of rows are not too short to read
_CHUNK_BYTES = 2**20  # of whole rows that are read at once
_FEW = 4  # whole rows cost less than a call for each part if they are not more than this many times it


class _Memory(threading.local):
    """Memory of closed readers, for the thread's next ones: what is freed and allocated again in other
    sizes adds up."""

    def __init__(self) -> None:
        self.free: list[bytearray] = []

    def take(self) -> bytearray:
        return self.free.pop() if self.free else bytearray()


_MEMORY = _Memory()


def _placed(memory: bytearray, shape: Sequence[int], dtype: torch.dtype) -> tuple[bytearray, Tensor]:
    """A tensor in some memory, and that memory: another one if it was too small."""
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes > len(memory):
        memory = bytearray(nbytes)
    return memory, torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


class Columns:
    """Columns of a stored matrix [h, w], read a strip of them at a time."""

    def __init__(self, stored: StoredTensor, width: int | None = None) -> None:
        """width: the columns from the first that are of use; by default all."""
        self._stored = stored
        self._width = stored.spec.shape[1] if width is None else width
        self._dtype = torch_dtype(stored.spec.dtype)
        self._rows = torch.empty(0)
        self._first = self._last = 0  # columns in the strip

    def __enter__(self) -> Self:
        with disk_errors(self._stored.file):
            self._fd = os.open(self._stored.file, os.O_RDONLY | os.O_CLOEXEC)
        self._memory, self._result = _MEMORY.take(), _MEMORY.take()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._rows = torch.empty(0)
        _MEMORY.free += [self._memory, self._result]

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop) as rows [stop - start, h], contiguous, until the next call."""
        if not self._first <= start < stop <= self._last:
            self._load(start, stop)
        columns = self._rows[:, start - self._first : stop - self._first].t()
        self._result, rows = _placed(self._result, columns.shape, self._dtype)
        return rows.copy_(columns)

    def _load(self, start: int, stop: int) -> None:
        spec = self._stored.spec
        height, _ = spec.shape
        fit = STRIP_BYTES // int(height * spec.itemsize)
        self._first, self._last = start, min(self._width, max(stop, start + fit))
        sides = height, self._last - start
        self._memory, self._rows = _placed(self._memory, sides, self._dtype)
        block = tensor_bytes(self._rows)
        size = len(block) // height
        if size == spec.row_nbytes:
            read_into(self._fd, self._stored, 0, block)
            return
        if size * _FEW >= spec.row_nbytes:
            self._load_from_whole_rows()
            return
        offset = int(start * spec.itemsize)
        for row in range(height):
            part = block[row * size : (row + 1) * size]
            read_into(self._fd, self._stored, row * spec.row_nbytes + offset, part)

    def _load_from_whole_rows(self) -> None:
        spec = self._stored.spec
        height, width = spec.shape
        step = max(1, _CHUNK_BYTES // spec.row_nbytes)
        memory = _MEMORY.take()
        for row in range(0, height, step):
            count = min(step, height - row)
            memory, rows = _placed(memory, (count, width), self._dtype)
            read_into(self._fd, self._stored, row * spec.row_nbytes, tensor_bytes(rows))
            self._rows[row : row + count].copy_(rows[:, self._first : self._last])
        _MEMORY.free.append(memory)
