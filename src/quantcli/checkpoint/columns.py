"""Matrices that are stored [k, n]: the rows of a weight stand in them as columns."""

from __future__ import annotations

import os
from typing import Self

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import read_into, tensor_bytes
from quantcli.core.disk import disk_errors

STRIP_BYTES = 4 * 2**20  # of one tensor's columns held: its parts of rows are not too short to read


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
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop) as rows: [stop - start, h], contiguous."""
        if not self._first <= start < stop <= self._last:
            self._load(start, stop)
        rows = self._rows[:, start - self._first : stop - self._first].t().contiguous()
        if stop == self._last:  # what is left of the strip is not kept while rows are worked on
            self._rows, self._first, self._last = torch.empty(0), 0, 0
        return rows

    def _load(self, start: int, stop: int) -> None:
        spec = self._stored.spec
        height, _ = spec.shape
        fit = STRIP_BYTES // int(height * spec.itemsize)
        self._first, self._last = start, min(self._width, max(stop, start + fit))
        self._rows = torch.empty(0)  # the old one goes first
        self._rows = torch.empty((height, self._last - start), dtype=self._dtype)
        block = tensor_bytes(self._rows)
        size = len(block) // height
        if size == spec.row_nbytes:
            read_into(self._fd, self._stored, 0, block)
            return
        offset = int(start * spec.itemsize)
        for row in range(height):
            part = block[row * size : (row + 1) * size]
            read_into(self._fd, self._stored, row * spec.row_nbytes + offset, part)
