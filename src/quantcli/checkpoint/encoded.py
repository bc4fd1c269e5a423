"""A weight that is stored as codes, and stands for the float one: what a quantized source holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.header import Rows, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Encoded(StoredTensor):
    """A float weight [n, k] that several tensors on disk stand for.

    spec:   of the decoded weight: `X.weight`, F32. `file` and `offset` are those of its codes, which
            nobody may read as if they were float.
    parts:  every stored tensor that the module is made of, its codes first, then what decoding needs,
            then what only served the source's engine, such as input scales.
    kind:   the format as text; all that decides how parts are read is in it.
    decoder: gives a reader of decoded rows; see `open`.
    """

    # `field()` keeps the properties of the base class from being taken for defaults
    parts: tuple[StoredTensor, ...] = field()
    kind: str = field()
    decoder: Callable[[], AbstractContextManager[Rows]]
    buffer_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of all parts."""
        return sum(part.spec.nbytes for part in self.parts)

    def open(self) -> AbstractContextManager[Rows]:
        """A reader of its rows, decoded to float32. One reader is one thread's."""
        return self.decoder()


@dataclass(frozen=True, slots=True)
class EncodedStack(Encoded):
    """Encoded matrices of several experts as one float tensor [experts, h, w].

    decoder: gives a reader of rows [w] of all matrices, one below the other.
    matrix:  gives the matrix of an expert as it is stored, [h, w] or [w, h].
    """

    matrix: Callable[[int], Encoded] = field(kw_only=True)

    def open(self) -> AbstractContextManager[Rows]:
        """A reader of its rows, which are matrices of experts; or rows of these, if `spec` is 2-D."""
        opened = self.decoder()
        return opened if len(self.spec.shape) == 2 else _opened(opened, self.spec.shape)


@contextmanager
def _opened(opened: AbstractContextManager[Rows], shape: tuple[int, ...]) -> Iterator[_Matrices]:
    """Matrices of a stack, as long as its files are open."""
    with opened as rows:
        yield _Matrices(rows, shape)


@dataclass(frozen=True)
class _Matrices:
    """Matrices [h, w] that are read by rows. shape: of the stack."""

    rows: Rows
    shape: tuple[int, ...]

    def weight(self, start: int, count: int) -> Tensor:
        """Matrices [start, start + count), as many as there are: [matrices, h, w]."""
        _, height, width = self.shape
        return self.rows.weight(start * height, count * height).view(-1, height, width)


def decoded_kinds(tensors: Iterable[StoredTensor]) -> list[dict[str, Any]]:
    """The kinds of encoded tensors: modules, bytes on disk, and a module as an example. JSON-able."""
    kinds: dict[str, list[StoredTensor]] = defaultdict(list)
    for stored in (each.in_source for each in tensors):
        if stored.kind:
            kinds[stored.kind].append(stored)
    return [
        {
            "format": kind,
            "modules": len(encoded),
            "bytes": sum(stored.nbytes for stored in encoded),
            "first": encoded[0].spec.name.removesuffix(".weight"),
        }
        for kind, encoded in sorted(kinds.items())
    ]
