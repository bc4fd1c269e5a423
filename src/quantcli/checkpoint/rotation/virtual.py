"""Stored tensors in another basis: their rows are rotated while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.checkpoint.rotation.orthogonal import Orthogonal
from quantcli.checkpoint.rotation.places import Norm
from quantcli.checkpoint.tensors import read_tensor


@dataclass(frozen=True, slots=True)
class Folded:
    """A norm that is folded into a weight: its columns are multiplied by offset + `weight` [h]."""

    weight: StoredTensor
    offset: int

    def factors(self) -> Tensor:
        """float32 [h]."""
        return read_tensor(self.weight).float() + self.offset


@dataclass(frozen=True, slots=True)
class Rotated(StoredTensor):
    """A stored tensor [n, k] or [n] in another basis: left^T (source * fold) right, in float32.

    source: the tensor; a vector is a row.
    kind:   the rotation as text; all that decides the numbers is in it.
    fold:   the norm before it, if it reads one.
    right:  acts on the columns; on each block of them if it is smaller.
    left:   acts on the rows, or only on those in `heads`: as many from each of these rows on.
    """

    # `field()` keeps the properties of the base class from being taken for defaults
    source: StoredTensor = field()
    kind: str = field()
    fold: Folded | None = None
    right: Orthogonal | None = None
    left: Orthogonal | None = None
    heads: tuple[int, ...] | None = None

    @property
    def in_source(self) -> StoredTensor:
        """The tensor that is rotated."""
        return self.source

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on disk."""
        return self.source.nbytes

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors on disk that it is made of: those of its source, and the norm."""
        return self.source.parts + (() if self.fold is None else self.fold.weight.parts)

    @property
    def buffer_nbytes(self) -> int:
        """Bytes that a reader keeps in addition to rows: a band of them in float32."""
        band = 0
        if self.left is not None:
            width = self.spec.shape[-1]
            rows = self.left.band(width) if self.heads is None else self.left.size
            band = 4 * rows * width
        return self.source.buffer_nbytes + band

    def open(self) -> AbstractContextManager[Rows]:
        """A reader of its rows. One reader is one thread's."""
        return _opened(self)


@dataclass(frozen=True, slots=True)
class Constant(StoredTensor):
    """A vector of one value in place of a stored one: a norm that was folded into other weights."""

    source: StoredTensor = field()
    kind: str = field()
    value: float = 1.0

    @property
    def in_source(self) -> StoredTensor:
        """The vector that it replaces."""
        return self.source

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on disk."""
        return self.source.nbytes

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensor."""
        return self.source.parts

    @contextmanager
    def open(self) -> Iterator[Rows]:
        """A reader of its elements."""
        yield _ConstantRows(self)


@dataclass(frozen=True)
class _ConstantRows:
    stored: Constant

    def weight(self, start: int, count: int) -> Tensor:
        """Elements [start, start + count), as many as there are."""
        return torch.full((min(count, self.stored.spec.shape[0] - start),), self.stored.value)


@contextmanager
def _opened(stored: Rotated) -> Iterator[Rows]:
    """Its rows, as long as the source's files are open."""
    factors = None if stored.fold is None else stored.fold.factors()
    with stored.source.open() as rows:
        yield _RotatedRows(stored, rows, factors)


class _RotatedRows:
    """Rows of a rotated tensor. Those that are computed together are kept until others are read."""

    def __init__(self, stored: Rotated, source: Rows, factors: Tensor | None) -> None:
        self._stored = stored
        self._source = source
        self._factors = factors
        self._band = torch.empty(0)
        self._first = -1  # row of the band

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), as many as there are: float32, also of a vector."""
        shape = self._stored.spec.shape
        stop = min(start + count, shape[0])
        if len(shape) == 1:
            return self._vector()[start:stop]
        if self._stored.left is None:
            return self._right(start, stop - start)
        pieces = []
        while start < stop:
            piece = self._piece(self._stored.left, start, stop)
            pieces.append(piece)
            start += len(piece)
        return torch.cat(pieces) if pieces else torch.empty(0, *shape[1:])

    def _right(self, start: int, count: int) -> Tensor:
        """Rows of the source, folded, and rotated from the right."""
        rows = self._source.weight(start, count).to(torch.float32, copy=True)
        if self._factors is not None:
            rows *= self._factors
        right = self._stored.right
        return rows if right is None else right.right(rows.view(-1, right.size)).view(rows.shape)

    def _piece(self, left: Orthogonal, start: int, stop: int) -> Tensor:
        """Some rows from `start` on, at least one, at most up to `stop`."""
        heads = self._stored.heads
        if heads is None:
            height = left.band(self._stored.spec.shape[1])
            first = start // height * height
        else:
            first = max((row for row in heads if row <= start), default=-1)
            height = left.size
            if first < 0 or start >= first + height:  # of no head
                end = min((row for row in heads if row > start), default=stop)
                return self._right(start, min(stop, end) - start)
        if first != self._first:
            self._first = -1  # in case of an error
            if heads is None:
                self._band = left.left(self._right, first, self._stored.spec.shape[1])
            else:
                self._band = left.right(self._right(first, height).t().contiguous()).t()
            self._first = first
        return self._band[start - first : stop - first].clone()

    def _vector(self) -> Tensor:
        """All of a vector [n]."""
        spec, right = self._stored.spec, self._stored.right
        vector = self._source.weight(0, spec.shape[0]).to(torch.float32, copy=True)
        if right is None:
            return vector
        if self._stored.heads is None:
            return right.right(vector.view(-1, right.size)).view(-1)
        for row in self._stored.heads:
            part = vector[row : row + right.size]
            vector[row : row + right.size] = right.right(part[None].clone())[0]
        return vector


def folded(norm: Norm | None, tensors: dict[str, StoredTensor]) -> Folded | None:
    """A norm with its stored weight."""
    return None if norm is None else Folded(tensors[norm.name], norm.offset)
