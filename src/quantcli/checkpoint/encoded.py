"""A weight that is stored as codes, and stands for the float one: what a quantized source holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quantcli.checkpoint.header import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor


class Rows(Protocol):
    """A weight that is read by rows, whatever it is stored as."""

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), as many as there are: float32 [rows, k], the caller's own."""


@dataclass(frozen=True, slots=True)
class Encoded(StoredTensor):
    """A float weight [n, k] that several tensors on disk stand for.

    spec:   of the decoded weight: `X.weight`, F32. `file` and `offset` are those of its codes, which
            nobody may read as if they were float.
    parts:  every stored tensor that the module is made of, its codes first, then what decoding needs,
            then what only served the source's engine, such as input scales.
    open:   gives what decodes rows. One reader is one thread's.
    kind:   the format as text; all that decides how parts are read is in it.
    buffer_nbytes: bytes that a reader keeps in addition to the rows that it returns.
    """

    parts: tuple[StoredTensor, ...]
    open: Callable[[], AbstractContextManager[Rows]]
    kind: str
    buffer_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of all parts."""
        return sum(part.spec.nbytes for part in self.parts)


def decoded_kinds(tensors: Iterable[StoredTensor]) -> list[dict[str, Any]]:
    """What is decoded, by kind: modules, bytes on disk, and a module for an example. JSON-able."""
    kinds: dict[str, list[Encoded]] = defaultdict(list)
    for stored in tensors:
        if isinstance(stored, Encoded):
            kinds[stored.kind].append(stored)
    return [
        {
            "format": kind,
            "modules": len(found),
            "bytes": sum(stored.nbytes for stored in found),
            "first": found[0].spec.name.removesuffix(".weight"),
        }
        for kind, found in sorted(kinds.items())
    ]
