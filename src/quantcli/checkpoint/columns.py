"""Matrices that are stored [k, n]: the rows of a weight stand in them as columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.remote.file import RemoteFile
from quantcli.checkpoint.rows import BUFFERS
from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import close_file, open_file, read_into, tensor_bytes

STRIP_BYTES = 4 * 2**20  # of one tensor's columns held: its parts of rows are not too short to read
_REMOTE_STRIP_BYTES = 32 * 2**20  # of one that is elsewhere: all its rows are fetched for each strip
_CHUNK_BYTES = 2**18  # of whole rows that are read at once
_PIECE = 256  # rows that are transposed at once
_FEW = 4  # whole rows cost less than a call for each part if they are not more than this many times it


def strip_bytes(stored: StoredTensor) -> int:
    """Bytes that a reader of columns of a tensor holds at most, and that a job on them has."""
    return _REMOTE_STRIP_BYTES if isinstance(stored.file, RemoteFile) else STRIP_BYTES


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
        self._fd = open_file(self._stored)
        self._memory, self._result = BUFFERS.take(), BUFFERS.take()
        return self

    def __exit__(self, *_: object) -> None:
        close_file(self._fd)
        self._rows = torch.empty(0)
        BUFFERS.free += [self._memory, self._result]

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop) as rows [stop - start, h], contiguous, until the next call."""
        height, width = self._stored.spec.shape
        self._result, result = _placed(self._result, (stop - start, height), self._dtype)
        loaded = self._first <= start < stop <= self._last
        if not loaded and (stop - start) * _FEW >= width:
            for row, rows in self._whole_rows():
                _turn(rows[:, start:stop], result[:, row : row + len(rows)])
            return result
        if not loaded:
            self._load(start, stop)
        _turn(self._rows[:, start - self._first : stop - self._first], result)
        return result

    def _load(self, start: int, stop: int) -> None:
        spec = self._stored.spec
        height, width = spec.shape
        fit = strip_bytes(self._stored) // int(height * spec.itemsize)
        self._first, self._last = start, min(self._width, max(stop, start + fit))
        columns = self._last - start
        self._memory, self._rows = _placed(self._memory, (height, columns), self._dtype)
        if columns * _FEW >= width or isinstance(self._stored.file, RemoteFile):
            for row, rows in self._whole_rows():
                self._rows[row : row + len(rows)].copy_(rows[:, start : self._last])
            return
        block = tensor_bytes(self._rows)
        size, offset = len(block) // height, int(start * spec.itemsize)
        for row in range(height):
            part = block[row * size : (row + 1) * size]
            read_into(self._fd, self._stored, row * spec.row_nbytes + offset, part)

    def _whole_rows(self) -> Iterator[tuple[int, Tensor]]:
        """All rows of the matrix, some at a time: the number of the first, and [rows, w]."""
        spec = self._stored.spec
        height, width = spec.shape
        step = max(1, _CHUNK_BYTES // spec.row_nbytes)
        memory = BUFFERS.take()
        for row in range(0, height, step):
            memory, rows = _placed(memory, (min(step, height - row), width), self._dtype)
            read_into(self._fd, self._stored, row * spec.row_nbytes, tensor_bytes(rows))
            yield row, rows
        BUFFERS.free.append(memory)


def _turn(columns: Tensor, into: Tensor) -> None:
    """Copy [h, w] into [w, h]. torch transposes by tiles, which is several times as fast, if both sides
    are contiguous: so a piece of rows is made so before, and stays in the cache meanwhile."""
    for row in range(0, len(columns), _PIECE):
        piece = columns[row : row + _PIECE].contiguous().t().contiguous()
        into[:, row : row + _PIECE].copy_(piece)
