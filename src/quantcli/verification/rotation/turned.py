"""Tensors of the source in the basis that was found, computed while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.core.threads import one_thread

_BAND = 2**21  # elements of rows of R^T W that are computed together
_ROWS = 256
ROTATED = "rotated"  # the kind of these tensors


@dataclass(frozen=True, slots=True)
class Heads:
    """A matrix [d, d] for each kv head: on rows of values, or on columns of what reads the output.

    first: the first row of each kv head; of columns, of each head.
    """

    first: tuple[int, ...]
    matrices: tuple[Tensor, ...]  # of each entry of `first`

    @property
    def width(self) -> int:
        """Rows, or columns, of a head."""
        return len(self.matrices[0])


@dataclass(frozen=True, slots=True)
class Turned(StoredTensor):
    """A float weight W [n, k] or a bias [.., h] of the source in the new basis: L^T W diag(gamma) R.

    spec: F32. gamma [k]: of the norm that is folded in. left, right: the stream's matrix [h, h] if
    rows, or columns, are channels of the stream. rows, columns: of heads.
    """

    source: StoredTensor = field(kw_only=True)
    gamma: Tensor | None = field(default=None, kw_only=True)
    left: Tensor | None = field(default=None, kw_only=True)
    right: Tensor | None = field(default=None, kw_only=True)
    rows: Heads | None = field(default=None, kw_only=True)
    columns: Heads | None = field(default=None, kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.source.nbytes

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that it is made of."""
        return self.source.parts

    @property
    def kind(self) -> str:
        """That it is not stored as it is read."""
        return ROTATED

    @contextmanager
    def open(self) -> Iterator[Rows]:
        """A reader of its rows, float32. Memory: a band of rows of 8 MB next to the matrices."""
        with self.source.open() as rows:
            yield _Reader(self, rows)


class _Reader:
    def __init__(self, tensor: Turned, rows: Rows) -> None:
        self._tensor, self._rows = tensor, rows
        self._band, self._first = torch.zeros(0), 0

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), float32; or, of a vector, its elements."""
        tensor = self._tensor
        n = tensor.spec.shape[0]
        stop = min(start + count, n)
        with one_thread():
            if len(tensor.spec.shape) == 1:
                return self._vector()[start:stop]
            if not self._first <= start < stop <= self._first + len(self._band):
                self._load(start, stop)
            return self._band[start - self._first : stop - self._first].clone()

    def _load(self, start: int, stop: int) -> None:
        """Compute a band of rows from `start` on."""
        n, k = self._tensor.spec.shape[0], self._tensor.spec.shape[-1]
        last = min(n, max(stop, start + max(1, _BAND // max(1, k))))
        self._first, self._band = start, self._right(self._left(start, last))

    def _left(self, start: int, stop: int) -> Tensor:
        left, n = self._tensor.left, self._tensor.spec.shape[0]
        if left is None:
            return self._by_heads(start, stop)
        total = torch.zeros(stop - start, *self._tensor.spec.shape[1:])
        for row in range(0, n, _ROWS):
            part = self._rows.weight(row, _ROWS).float()
            total += left[row : row + len(part), start:stop].T @ part
        return total

    def _by_heads(self, start: int, stop: int) -> Tensor:
        """Rows of the source; those of heads' values are turned, from whole heads."""
        heads = self._tensor.rows
        result = self._rows.weight(start, stop - start).float().clone()
        for first, matrix in zip(heads.first, heads.matrices, strict=True) if heads else ():
            low, high = max(start, first), min(stop, first + heads.width if heads else 0)
            if low < high:
                whole = self._rows.weight(first, len(matrix)).float()
                result[low - start : high - start] = (matrix.T @ whole)[low - first : high - first]
        return result

    def _right(self, rows: Tensor) -> Tensor:
        tensor = self._tensor
        if tensor.gamma is not None:
            rows = rows * tensor.gamma
        if tensor.right is not None:
            rows = rows @ tensor.right
        if tensor.columns is not None:
            width = tensor.columns.width
            for first, matrix in zip(tensor.columns.first, tensor.columns.matrices, strict=True):
                rows[:, first : first + width] = rows[:, first : first + width] @ matrix
        return rows

    def _vector(self) -> Tensor:
        tensor = self._tensor
        (n,) = tensor.spec.shape
        value = self._rows.weight(0, n).float().clone()
        if tensor.right is not None:
            return value @ tensor.right
        heads = tensor.rows
        for first, matrix in zip(heads.first, heads.matrices, strict=True) if heads else ():
            value[first : first + len(matrix)] = matrix.T @ value[first : first + len(matrix)]
        return value


@dataclass(frozen=True, slots=True)
class Constant(StoredTensor):
    """A norm's weight once it is folded into its readers: the same number everywhere."""

    value: float = field(kw_only=True)

    @property
    def kind(self) -> str:
        """That it is not stored as it is read."""
        return ROTATED

    @contextmanager
    def open(self) -> Iterator[Rows]:
        """A reader of its elements, float32."""
        yield self

    def weight(self, start: int, count: int) -> Tensor:
        """Elements [start, start + count)."""
        return torch.full((min(count, self.spec.shape[0] - start),), self.value)
