"""A stack, which is one stored tensor with matrices of all experts of a layer: its layout, and readers
of the rows of its matrices.

`sources/stacked.py` says which tensors of which family are stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from quantcli.checkpoint.columns import Columns, strip_bytes
from quantcli.checkpoint.encoded import EncodedStack
from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.checkpoint.spec import TensorSpec

_MOST_EXPERTS = 65536  # of a layer: a header must not make up more


@dataclass(frozen=True)
class Stack:
    """One stored tensor with a matrix, or several, of every expert.

    name:        the end of its name.
    projections: last parts of the names of an expert's matrices, in the order of their rows.
    hidden:      the side of each matrix that is as wide as hidden states.
    transposed:  whether an expert's part is stored [k, n] and not [n, k].
    interleaved: whether rows of the projections alternate; otherwise each has its rows together.
    flat:        whether experts follow each other in dimension 0 of a 2-D tensor; otherwise it is 3-D.
    joined:      whether its one projection holds gate and up, and so has an even number of rows.
    """

    name: str
    projections: tuple[str, ...]
    hidden: Literal["inputs", "outputs"]
    transposed: bool = False
    interleaved: bool = False
    flat: bool = False
    joined: bool = False

    def __str__(self) -> str:
        several = 2 if self.joined else len(self.projections)
        sides = [f"{several} x n" if several > 1 else "n", "k"]
        height, width = reversed(sides) if self.transposed else sides
        return f"[experts x {height}, {width}]" if self.flat else f"[experts, {height}, {width}]"

    def sides(self, shape: tuple[int, ...], count: int) -> tuple[int, int, int] | None:
        """The number of experts, and n and k of each of their matrices; None for a shape that no such
        stack has.

        count: of the experts in a flat stack, whose shape does not tell.
        """
        if len(shape) != (2 if self.flat else 3) or not all(shape):
            return None
        if self.flat:
            if count < 1 or shape[0] % count:
                return None
            shape = (count, shape[0] // count, shape[1])
        experts, height, width = shape
        rows, k = (width, height) if self.transposed else (height, width)
        if rows % (2 if self.joined else len(self.projections)) or experts > _MOST_EXPERTS:
            return None
        return experts, rows // len(self.projections), k

    def matrices(self, stored: StoredTensor, experts: str, count: int) -> list[ExpertMatrix] | None:
        """The matrices in a stored stack, expert by expert; None for a shape that no such stack has.

        experts: the name of the set. count: see `sides`.
        """
        spec, several = stored.spec, len(self.projections)
        sides = self.sides(spec.shape, count)
        if sides is None:
            return None
        count, n, k = sides
        if isinstance(stored, EncodedStack):
            wholes: list[StoredTensor] = [stored.matrix(expert) for expert in range(count)]
            transposed = False
        else:
            height, width = (k, several * n) if self.transposed else (several * n, k)
            whole = TensorSpec(spec.name, spec.dtype, (height, width))
            wholes = [
                StoredTensor(whole, stored.file, stored.offset + expert * whole.nbytes)
                for expert in range(count)
            ]
            transposed = self.transposed
        return [
            ExpertMatrix(
                TensorSpec(f"{experts}.{expert}.{projection}.weight", spec.dtype, (n, k)),
                whole.file,
                whole.offset,
                stack=stored,
                whole=whole,
                first=number if self.interleaved else number * n,
                step=several if self.interleaved else 1,
                transposed=transposed,
            )
            for expert, whole in enumerate(wholes)
            for number, projection in enumerate(self.projections)
        ]

    def merge(self, matrices: Sequence[Tensor]) -> Tensor:
        """The stack, from the matrices [n, k] of the first expert, then of the second and so on.

        Its shape and the order of its elements are those that `matrices` reads: splitting and merging
        give the same bytes.
        """
        wholes = []
        for start in range(0, len(matrices), len(self.projections)):
            parts = list(matrices[start : start + len(self.projections)])
            whole = torch.stack(parts, 1).flatten(0, 1) if self.interleaved else torch.cat(parts)
            wholes.append(whole.t() if self.transposed else whole)
        return torch.cat(wholes) if self.flat else torch.stack(wholes)


@dataclass(frozen=True, slots=True)
class ExpertMatrix(StoredTensor):
    """A matrix [n, k] of one expert within a stack, which is read by rows like any other.

    stack:      the tensor on disk, or what several there stand for.
    whole:      what the stack holds for this expert, [h, w] as stored.
    first, step: its rows are the rows `first`, `first` + `step`, .. of `whole`, or columns if it is
                `transposed`.
    """

    # `field()` keeps the properties of the base class from being taken for defaults
    stack: StoredTensor = field()
    whole: StoredTensor = field()
    first: int = field()
    step: int = field()
    transposed: bool = field()

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on disk."""
        if not self.stack.kind:
            return self.spec.nbytes
        return self.stack.nbytes * self.spec.numel // self.stack.spec.numel

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """What is read for it: itself, or the parts of `whole` if the stack is encoded."""
        return self.whole.parts if self.stack.kind else (self,)

    @property
    def kind(self) -> str:
        """The format of an encoded stack as text; empty for any other."""
        return self.stack.kind

    @property
    def buffer_nbytes(self) -> int:
        """Bytes that a reader keeps in addition to rows: a strip of columns, or rows in between."""
        return strip_bytes(self.whole) if self.transposed or self.step > 1 else 0

    def open(self) -> AbstractContextManager[Rows]:
        """A reader of its rows. One reader is one thread's."""
        return _ExpertRows(self)


class _ExpertRows:
    """Rows of a matrix within a stack; no more of the stack is read than they span."""

    def __init__(self, matrix: ExpertMatrix) -> None:
        self._matrix = matrix
        width = matrix.first + (matrix.spec.shape[0] - 1) * matrix.step + 1
        self._columns = Columns(matrix.whole, width) if matrix.transposed else None
        self._files = ExitStack()

    def __enter__(self) -> Self:
        if self._columns is not None:
            self._files.enter_context(self._columns)
        else:
            self._rows = self._files.enter_context(self._matrix.whole.open())
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), as many as there are: [rows, k] in the stored dtype."""
        step, last = self._matrix.step, min(start + count, self._matrix.spec.shape[0]) - 1
        begin, end = self._matrix.first + start * step, self._matrix.first + last * step + 1
        if self._columns is not None:
            rows = self._columns.columns(begin, end)
        else:
            rows = self._rows.weight(begin, end - begin)
        return rows if step == 1 else rows[::step].contiguous()
