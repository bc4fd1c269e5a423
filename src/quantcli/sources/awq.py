"""AWQ as AutoAWQ writes it for its `gemm` kernels: int4, weights stored [k, n / 8].

qweight: int32 [k, n / 8]; qzeros: int32 [k / g, n / 8]; scales: float [k / g, n]. Eight output channels
stand in a word, in the order that the kernel unpacks pairs: nibble i, from the lowest, is channel
(0, 2, 4, 6, 1, 3, 5, 7)[i] of the eight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from quantcli.checkpoint.columns import Columns, strip_bytes
from quantcli.checkpoint.encoded import Encoded
from quantcli.sources.base import Source, SourceFormat, encoded
from quantcli.sources.grouped import FLOAT, grouped_modules, open_rows

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the channel of each nibble


class Awq(SourceFormat):
    """AWQ for `gemm` kernels."""

    name: ClassVar[str] = "awq"
    methods: ClassVar[frozenset[str]] = frozenset({"awq"})
    own_file: ClassVar[str] = "quant_config.json"

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every AWQ module."""
        if (bits := source.whole("bits", "w_bit")) != 4:
            raise source.refused(f"AWQ of {bits} bits: this version decodes 4", FLOAT)
        if (version := source.word("version", "gemm")) != "gemm":
            what = f"AWQ in the layout `{version:.40}`: this version decodes `gemm`"
            raise source.refused(what, FLOAT)
        group = source.whole("group_size", "q_group_size")
        yield from read(source, lambda _: (bits, group))


def read(source: Source, numbers: Callable[[str], tuple[int, int]]) -> Iterator[Encoded]:
    """Every module with a `qweight`. numbers: 4 bits, and the columns of its groups, by its name."""
    for module in grouped_modules(source, "AWQ", numbers, packed_along_k=False):
        opened = partial(open_rows, module, _unpack)
        yield encoded(
            module.name, module.shape, module.parts, opened, module.kind, strip_bytes(module.parts[0])
        )


def _unpack(codes: Columns, zeros: Columns, start: int, stop: int) -> tuple[Tensor, Tensor]:
    first, last = start // 8, -(-stop // 8)
    rows = slice(start - 8 * first, stop - 8 * first)
    return nibbles(codes.columns(first, last))[rows], nibbles(zeros.columns(first, last))[rows]


def nibbles(packed: Tensor, order: Sequence[int] = ORDER) -> Tensor:
    """Words of eight channels: int32 [n / 8, k] -> float32 [n, k]."""
    codes = torch.empty((len(packed), 8, packed.shape[1]))
    for place, channel in enumerate(order):
        codes[:, channel] = (packed >> (4 * place)).bitwise_and_(15)
    return codes.flatten(0, 1)
