"""Rows of a stored tensor, block by block."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from quantcli.checkpoint.encoded import Encoded, Rows
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import read_into
from quantcli.core.disk import disk_errors


class RowReader:
    """Rows of one stored tensor; each call gives a view of the same memory."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored
        self._dtype = torch_dtype(stored.spec.dtype)
        self._buffer = bytearray()
        self._stack = ExitStack()
        self._decoder: Rows

    def __enter__(self) -> Self:
        stored = self.stored
        if isinstance(stored, Encoded):
            self._decoder = self._stack.enter_context(stored.open())
            return self
        with disk_errors(stored.file):
            self._fd = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
        self._stack.callback(os.close, self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rows(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), as many as there are: [rows, ...] in the stored dtype."""
        spec = self.stored.spec
        if isinstance(self.stored, Encoded):
            return self._decoder.weight(start, count)
        rows = min(count, (spec.shape[0] if spec.shape else 1) - start)
        nbytes = rows * spec.row_nbytes
        if nbytes > len(self._buffer):
            self._buffer = bytearray(nbytes)
        view = memoryview(self._buffer)[:nbytes]
        read_into(self._fd, self.stored, start * spec.row_nbytes, view)
        flat = torch.frombuffer(view, dtype=self._dtype)
        return flat.view(rows, *spec.shape[1:]) if spec.shape else flat
