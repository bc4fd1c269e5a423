"""A weight that is stored as codes, and stands for the float one: what a quantized source holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from quantcli.checkpoint.header import Rows, StoredTensor


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


def decoded_kinds(tensors: Iterable[StoredTensor]) -> list[dict[str, Any]]:
    """The kinds of encoded tensors: modules, bytes on disk, and a module as an example. JSON-able."""
    kinds: dict[str, list[StoredTensor]] = defaultdict(list)
    for stored in tensors:
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
