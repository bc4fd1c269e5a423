"""Orthogonal matrices that are applied to rows and to columns of weights, block by block.

Hadamard matrices are applied by additions in a fixed order: the same bits on every CPU, for any number
of rows at a time.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import content_of, read_tensor
from quantcli.core.threads import one_thread

Read = Callable[[int, int], Tensor]  # rows [start, start + count) of a matrix: float32 [count, k]

_LARGEST = 128  # order of a matrix that is applied as a whole
_TILE = 2**18  # elements that are worked on at once: their float32 stays in the cache of a core
_BAND = 2**23  # elements of a band of rows of R^T W, which are computed together
_DENSE_ROWS = 64  # rows of one product with a dense matrix


class Orthogonal(Protocol):
    """An orthogonal matrix R [size, size]."""

    @property
    def size(self) -> int:
        """Its height and width."""

    @property
    def name(self) -> str:
        """What it is, for people."""

    @property
    def digest(self) -> str:
        """sha256 of all that fixes its numbers."""

    def right(self, rows: Tensor) -> Tensor:
        """rows @ R, for float32 [n, size]; `rows` may be overwritten."""

    def band(self, width: int) -> int:
        """Rows of R^T W that are computed together, for a matrix W [size, width]."""

    def left(self, read: Read, start: int, width: int) -> Tensor:
        """The band of rows of R^T W from row `start` on: float32 [band, width].

        read: rows of W; what it returns may be overwritten.
        """


@dataclass(frozen=True)
class Hadamard:
    """Signs, then a Kronecker product of Hadamard matrices, over the root of their size.

    R = diag(signs) (M1 x M2 x ..), with entries of one absolute value. M1 is a matrix of Hartley if no
    Hadamard matrix has this size: entries [i, j] are (cos + sin)(2 pi i j / n) / sqrt(n), orthogonal
    for every n, and at most sqrt(2 / n). A random factor would have larger ones, which spread less.

    seed: of the signs, as text.
    """

    size: int
    seed: str

    @cached_property
    def orders(self) -> tuple[int, ...]:
        """The sizes of the factors M, the outermost first; the first may be one of Hartley."""
        rest, bases = factors(self.size)
        return ((rest,) if rest > 1 else ()) + bases

    @property
    def name(self) -> str:
        """The sizes: `Hadamard 12 x 48`; powers of two are one factor."""
        rest, bases = factors(self.size)
        power = math.prod(base for base in bases if base == 2)
        sizes = [base for base in bases if base != 2] + ([power] if power > 1 else [])
        text = f"Hadamard {' x '.join(map(str, sizes))}" if sizes else ""
        return " x ".join(filter(None, [f"Hartley {rest}" if rest > 1 else "", text]))

    @property
    def digest(self) -> str:
        """sha256 of sizes and signs."""
        return hashlib.sha256(f"{self.name}\0{self.size}\0{self.seed}".encode()).hexdigest()

    @cached_property
    def _signs(self) -> Tensor:
        """float32 [size], each 1 or -1."""
        bits = random.Random(self.seed).getrandbits(self.size)
        return torch.tensor([1.0 if bits >> place & 1 else -1.0 for place in range(self.size)])

    @cached_property
    def _scale(self) -> float:
        return 1 / math.sqrt(math.prod(factors(self.size)[1]))

    @property
    def _first_is_float(self) -> bool:
        return factors(self.size)[0] > 1

    def right(self, rows: Tensor) -> Tensor:
        """See `Orthogonal`."""
        result = torch.empty_like(rows)
        step = max(1, _TILE // self.size)
        with one_thread():
            for start in range(0, len(rows), step):
                tile = (rows[start : start + step] * self._signs).t().contiguous()
                result[start : start + step] = self._applied(tile, 0).mul_(self._scale).t()
        return result

    def _applied(self, columns: Tensor, first: int) -> Tensor:
        """(M x ..)^T columns, with the factors from `first` on, for float32 [their size, n]."""
        other = torch.empty_like(columns)
        height, width = columns.shape
        outer = 1
        for place in range(first, len(self.orders)):
            order = self.orders[place]
            shape = outer, order, height // (outer * order) * width
            self._step(place, columns.view(shape), other.view(shape))
            columns, other = other, columns
            outer *= order
        return columns

    def _step(self, place: int, given: Tensor, result: Tensor) -> None:
        """result[:, i] = sum over j of M[j, i] given[:, j], for [outer, order, inner]."""
        order = self.orders[place]
        if order == 2:
            torch.add(given[:, 0], given[:, 1], out=result[:, 0])
            torch.sub(given[:, 0], given[:, 1], out=result[:, 1])
            return
        for column in range(order):
            result[:, column] = self._sum(place, column, given.unbind(1))

    def _sum(self, place: int, column: int, given: tuple[Tensor, ...]) -> Tensor:
        """Sum over j of M[j, column] given[j], one after the other."""
        if place == 0 and self._first_is_float:
            weights = hartley(self.orders[0])[column]
            total = given[0].double() * weights[0]
            for weight, each in zip(weights[1:], given[1:], strict=True):
                total += each.double() * weight
            return total.float()
        signs = hadamard(self.orders[place])[column]
        total = given[0] * signs[0]
        for sign, each in zip(signs[1:], given[1:], strict=True):
            if sign > 0:
                total += each
            else:
                total -= each
        return total

    def band(self, width: int) -> int:
        """See `Orthogonal`: the product of the last factors, as many as fit."""
        rows = 1
        for order in reversed(self.orders[1 if self._first_is_float else 0 :]):
            if rows * order * width > _BAND:
                break
            rows *= order
        else:
            return self.size if self.size * width <= _BAND else rows
        return rows

    def left(self, read: Read, start: int, width: int) -> Tensor:
        """See `Orthogonal`. The first factors give one block of rows, as a sum over all of W; the
        others are applied to that block."""
        rows = self.band(width)
        blocks = self.size // rows
        first = 0
        while math.prod(self.orders[:first]) < blocks:
            first += 1
        band = torch.empty(rows, width)
        with one_thread():
            step = max(1, _TILE // (blocks * width))
            for low in range(0, rows, step):
                band[low : low + step] = self._block(
                    read, start // rows, rows, first, (low, min(step, rows - low))
                )
            step = max(1, _TILE // rows)
            for column in range(0, width, step):
                tile = band[:, column : column + step].contiguous()
                band[:, column : column + step] = self._applied(tile, first).mul_(self._scale)
        return band

    def _block(
        self, read: Read, block: int, rows: int, factors_before: int, part: tuple[int, int]
    ) -> Tensor:
        """Rows (first, count) of one block of (M1 x ..)^T diag(signs) W, with the factors before."""
        low, count = part
        given = []
        for other in range(self.size // rows):
            at = other * rows + low
            given.append(read(at, count) * self._signs[at : at + count, None])
        for place in range(factors_before):
            inner = math.prod(self.orders[place + 1 : factors_before])
            digit = block // inner % self.orders[place]
            terms = [given[j * inner : (j + 1) * inner] for j in range(self.orders[place])]
            given = [self._sum(place, digit, each) for each in zip(*terms, strict=True)]
        return given[0]


@dataclass(frozen=True)
class Dense:
    """A matrix R that is stored: float32 [size, size].

    name: what it is, for people.
    """

    stored: StoredTensor
    name: str

    @property
    def size(self) -> int:
        """Its height and width."""
        return self.stored.spec.shape[0]

    @cached_property
    def digest(self) -> str:
        """sha256 of its numbers."""
        return content_of(self.stored)

    def __getstate__(self) -> dict[str, object]:
        """Another process reads the numbers anew."""
        return {"stored": self.stored, "name": self.name}

    @cached_property
    def _matrix(self) -> Tensor:
        return read_tensor(self.stored).double()

    def right(self, rows: Tensor) -> Tensor:
        """See `Orthogonal`. Products are of one size each: the same bits for any number of rows."""
        result = torch.empty_like(rows)
        with one_thread():
            for start in range(0, len(rows), _DENSE_ROWS):
                part = rows[start : start + _DENSE_ROWS]
                padded = torch.zeros(_DENSE_ROWS, self.size, dtype=torch.float64)
                padded[: len(part)] = part
                result[start : start + len(part)] = (padded @ self._matrix)[: len(part)]
        return result

    def band(self, width: int) -> int:
        """See `Orthogonal`."""
        return min(self.size, max(1, _BAND // (2 * width)))

    def left(self, read: Read, start: int, width: int) -> Tensor:
        """See `Orthogonal`."""
        stop = min(start + self.band(width), self.size)
        total = torch.zeros(stop - start, width, dtype=torch.float64)
        with one_thread():
            for row in range(0, self.size, _DENSE_ROWS):
                count = min(_DENSE_ROWS, self.size - row)
                total += self._matrix[row : row + count, start:stop].t() @ read(row, count).double()
        return total.float()


def matrix_of(rotation: Orthogonal) -> Tensor:
    """R as float32 [size, size]."""
    return rotation.right(torch.eye(rotation.size))


@lru_cache
def factors(size: int) -> tuple[int, tuple[int, ...]]:
    """`size` as a product of a number, as small as possible, and of orders of Hadamard matrices.

    Orders above 2 come first, then as many 2 as are left.
    """
    twos = (size & -size).bit_length() - 1
    rest, bases = min(
        _splits(size >> twos, twos), key=lambda split: (split[0], sum(split[1]), split[1])
    )
    return rest, tuple(sorted(bases, reverse=True)) + (2,) * (twos - 2 * len(bases))


def _splits(odd: int, twos: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Ways to take orders 4 c, with c odd, out of `odd` times 2 ** `twos`: what is left, and they."""
    yield odd, ()
    if twos < 2:
        return
    for c in range(3, min(odd, _LARGEST // 4) + 1, 2):
        if odd % c == 0 and _construction(4 * c) is not None:
            for rest, bases in _splits(odd // c, twos - 2):
                yield rest, (4 * c, *bases)


def _construction(order: int) -> int | None:
    """The prime by which Paley's constructions make a Hadamard matrix of this order; None if none."""
    for q in (order - 1, order // 2 - 1):
        prime = q > 2 and all(q % d for d in range(2, math.isqrt(q) + 1))
        if prime and q % 4 == (3 if q == order - 1 else 1):
            return q
    return None


@lru_cache
def hadamard(order: int) -> tuple[tuple[int, ...], ...]:
    """The columns of a Hadamard matrix of order 2, or 4 c with an odd c, by Paley's constructions.

    Source: Paley, On orthogonal matrices, 1933. chi(x) is 1 if x is a square modulo q, else -1, and
    chi(0) is 0; Q[i, j] = chi(i - j). With q = 3 mod 4 the matrix is I + S of order q + 1, S having Q
    with a border of 1 and -1; with q = 1 mod 4 each entry of S becomes a block of 2 x 2.
    """
    if order == 2:
        return (1, 1), (1, -1)
    q = _construction(order)
    assert q is not None
    squares = {x * x % q for x in range(1, q)}
    chi = [0 if x == 0 else 1 if x in squares else -1 for x in range(q)]
    border = -1 if q % 4 == 3 else 1
    s = [[0] + [1] * q] + [[border] + [chi[(i - j) % q] for j in range(q)] for i in range(q)]
    if q % 4 == 3:
        table = [[value + (i == j) for j, value in enumerate(row)] for i, row in enumerate(s)]
    else:
        blocks = {0: ((1, -1), (-1, -1)), 1: ((1, 1), (1, -1)), -1: ((-1, -1), (-1, 1))}
        table = [[v for value in row for v in blocks[value][half]] for row in s for half in range(2)]
    return tuple(zip(*table, strict=True))


@lru_cache
def hartley(order: int) -> tuple[tuple[float, ...], ...]:
    """The columns of Hartley's matrix, which is orthogonal and symmetric.

    Source: Hartley, A more symmetrical Fourier analysis, 1942.
    """
    angles = [2 * math.pi * k / order for k in range(order)]
    cas = [(math.cos(angle) + math.sin(angle)) / math.sqrt(order) for angle in angles]
    return tuple(tuple(cas[i * j % order] for j in range(order)) for i in range(order))
