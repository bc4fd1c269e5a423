"""Rows of a stored tensor, block by block."""

from __future__ import annotations

import threading
from typing import Self

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import close_file, open_file, read_into


class _Buffers(threading.local):
    """Buffers of closed readers, for the next readers of the thread: what is freed and allocated again
    in other sizes adds up."""

    def __init__(self) -> None:
        self.free: list[bytearray] = []

    def take(self) -> bytearray:
        """One of them, or an empty one."""
        return self.free.pop() if self.free else bytearray()


BUFFERS = _Buffers()


class RowReader:
    """Rows of a tensor that is stored as it is; each call gives a view of the same memory.

    The thread's next reader takes that memory over when this one is closed.
    """

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored
        self._dtype = torch_dtype(stored.spec.dtype)

    def __enter__(self) -> Self:
        self._fd = open_file(self._stored)
        self._buffer = BUFFERS.take()
        return self

    def __exit__(self, *_: object) -> None:
        close_file(self._fd)
        BUFFERS.free.append(self._buffer)

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), as many as there are: [rows, ...] in the stored dtype.

        A scalar is one row, [1].
        """
        spec = self._stored.spec
        rows = min(count, (spec.shape[0] if spec.shape else 1) - start)
        nbytes = rows * spec.row_nbytes
        if not nbytes:
            return torch.empty((rows, *spec.shape[1:]), dtype=self._dtype)
        if nbytes > len(self._buffer):
            self._buffer = bytearray(nbytes)
        view = memoryview(self._buffer)[:nbytes]
        read_into(self._fd, self._stored, start * spec.row_nbytes, view)
        return torch.frombuffer(view, dtype=self._dtype).view(rows, *spec.shape[1:])
