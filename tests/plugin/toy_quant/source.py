"""Checkpoints of a format of its own: offset codes of 8 bits and a step for each row."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

from torch import Tensor

from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.sources.base import Source, SourceFormat, encoded, matrix, must_be, needed


class Toy8(SourceFormat):
    """`X.codes` uint8 [n, k], 128 for zero; `X.steps` float32 [n, 1]."""

    name: ClassVar[str] = "toy8"
    methods: ClassVar[frozenset[str]] = frozenset({"toy8"})
    own_file: ClassVar[str] = "toy8.json"
    suffixes: ClassVar[frozenset[str]] = frozenset({"codes", "steps"})

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every module with codes."""
        for module, tensors in source.modules.items():
            if (codes := tensors.get("codes")) is not None:
                n, k = matrix(codes)
                steps = needed(module, tensors, "steps", codes)
                must_be(steps, ("F32",), (n, 1), f"codes of {n} x {k}")
                yield encoded(module, (n, k), (codes, steps), partial(_open, codes, steps), "toy8")


@contextmanager
def _open(codes: StoredTensor, steps: StoredTensor) -> Iterator[Rows]:
    with codes.open() as code_rows, steps.open() as step_rows:
        yield _Decoded(code_rows, step_rows)


class _Decoded:
    def __init__(self, codes: Rows, steps: Rows) -> None:
        self._codes, self._steps = codes, steps

    def weight(self, start: int, count: int) -> Tensor:
        """Float32 rows."""
        return (self._codes.weight(start, count).float() - 128) * self._steps.weight(start, count)
