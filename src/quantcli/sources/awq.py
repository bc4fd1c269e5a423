"""AWQ as AutoAWQ writes it for its `gemm` kernels: int4, weights stored [k, n / 8].

qweight: int32 [k, n / 8]; qzeros: int32 [k / g, n / 8]; scales: float [k / g, n]. Eight output channels
stand in a word, in the order that the kernel unpacks pairs: nibble i, from the lowest, is channel
(0, 2, 4, 6, 1, 3, 5, 7)[i] of the eight. A weight is (q - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Self

import torch
from torch import Tensor

from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.codes import scale_groups, spread
from quantcli.sources.base import Source, encoded, matrix, must_be, needed
from quantcli.sources.columns import STRIP_BYTES, Columns

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read(source: Source) -> Iterator[Encoded]:
    """Every AWQ module. InputError for what does not fit."""
    if (bits := source.whole("bits", "w_bit")) != 4:
        raise source.refused(f"AWQ of {bits} bits: this version decodes 4", _FLOAT)
    if (version := source.word("version", "gemm")) != "gemm":
        raise source.refused(f"AWQ in the layout `{version:.40}`: this version decodes `gemm`", _FLOAT)
    group = source.whole("group_size", "q_group_size")
    if group != -1 and group < 1:
        raise source.refused(f"AWQ in groups of {group}")
    for module, tensors in source.modules.items():
        codes = tensors.get("qweight")
        if codes is None:
            continue
        k, words = matrix(codes)
        n = 8 * words
        must_be(codes, ("I32",), (k, words), "AWQ")
        scales, zeros = (needed(module, tensors, suffix, codes) for suffix in ("scales", "qzeros"))
        columns = k if group == -1 else group
        groups = -(-k // columns)
        if scales.spec.shape != (groups, n):
            expected = f"groups of {group} give a weight of {n} x {k} [{groups}, {n}] scales"
            raise source.contradicted(scales, expected)
        must_be(scales, sorted(FLOATS), (groups, n), "AWQ")
        must_be(zeros, ("I32",), (groups, words), f"AWQ of {n} x {k}")
        kind = "awq int4 per channel" if group == -1 else f"awq int4 in groups of {group}"
        parts = [codes, scales, zeros]
        opened = partial(AwqRows, codes, scales, zeros, columns)
        yield encoded(module, (n, k), parts, opened, kind, STRIP_BYTES)


class AwqRows:
    """Rows of a weight [n, k] of AWQ."""

    def __init__(
        self, codes: StoredTensor, scales: StoredTensor, zeros: StoredTensor, group: int
    ) -> None:
        self._codes, self._scales, self._zeros = Columns(codes), Columns(scales), Columns(zeros)
        self._group = group
        self._n = scales.spec.shape[1]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for columns in (self._codes, self._scales, self._zeros):
                stack.enter_context(columns)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count) in float32."""
        stop = min(start + count, self._n)
        first, last = start // 8, -(-stop // 8)
        rows = slice(start - 8 * first, stop - 8 * first)
        values = _nibbles(self._codes.columns(first, last))[rows]
        zeros = _nibbles(self._zeros.columns(first, last))[rows]
        scales = self._scales.columns(start, stop).float()
        k = values.shape[1]
        if k % self._group:
            values -= spread(zeros, self._group, k)
        else:
            values.view(len(values), -1, self._group).sub_(zeros.unsqueeze(-1))
        return scale_groups(values, scales, self._group)


def _nibbles(packed: Tensor) -> Tensor:
    """int32 [n / 8, k] -> float32 [n, k]."""
    found = torch.empty((len(packed), 8, packed.shape[1]))
    for place, channel in enumerate(_ORDER):
        found[:, channel] = (packed >> (4 * place)).bitwise_and_(15)
    return found.flatten(0, 1)


_FLOAT = "start from the float checkpoint, or from one in another format"
