"""Experts of gpt-oss in MXFP4: four-bit floats with an exponent for every 32 inputs.

`X_blocks` is uint8 [experts, n, k / 32, 16], two codes in a byte, that of the even column in the low
four bits; `X_scales` is uint8 [experts, n, k / 32], an exponent: 2^(byte - 127). Together they stand
for the float stack `X` [experts, k, n]. Source: transformers 5.23.0, integrations/mxfp4.py:109-300.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from quantcli.checkpoint.columns import Columns
from quantcli.checkpoint.encoded import Encoded, EncodedStack
from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.codes import code_values, scale_groups, scale_values
from quantcli.core.errors import InputError
from quantcli.core.number_types import ELEMENTS
from quantcli.sources.base import AGAIN, Source, SourceFormat, must_be, wrong

_GROUP = 32  # inputs that share an exponent
_FP4 = ELEMENTS["fp4_e2m1"]
_NAN = 255  # as an exponent
_KIND = "mxfp4 in groups of 32"
_NAMES = ("gate_up_proj", "down_proj")


class Mxfp4(SourceFormat):
    """The experts of gpt-oss as published."""

    name: ClassVar[str] = "mxfp4"
    methods: ClassVar[frozenset[str]] = frozenset({"mxfp4", "gpt_oss_mxfp4"})
    suffixes: ClassVar[frozenset[str]] = frozenset(
        f"{name}_{part}" for name in _NAMES for part in ("blocks", "scales")
    )

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every stack of experts."""
        for module, tensors in source.modules.items():
            for name in _NAMES:
                blocks, scales = (tensors.get(f"{name}_{part}") for part in ("blocks", "scales"))
                if blocks is None and scales is None:
                    continue
                if blocks is None or scales is None:
                    there = blocks or scales
                    assert there is not None
                    absent = "scales" if blocks else "blocks"
                    raise wrong(there, f"means nothing without `{module}.{name}_{absent}`")
                yield _stack(f"{module}.{name}", blocks, scales)


def _stack(name: str, blocks: StoredTensor, scales: StoredTensor) -> EncodedStack:
    """The float stack that blocks and scales stand for. InputError for shapes that do not fit."""
    shape = blocks.spec.shape
    if blocks.spec.dtype != "U8" or len(shape) != 4 or shape[3] != _GROUP // 2 or not all(shape):
        raise wrong(blocks, f"is {blocks.spec}; MXFP4 has U8 [experts, n, k / 32, 16]")
    must_be(scales, ("U8",), shape[:3], f"MXFP4 with {blocks.spec}")
    experts, n, groups, _ = shape
    spec = TensorSpec(name, "F32", (experts, groups * _GROUP, n))
    codes = replace(blocks, spec=TensorSpec(blocks.spec.name, "U8", (experts * n, groups * 16)))
    exponents = replace(scales, spec=TensorSpec(scales.spec.name, "U8", (experts * n, groups)))
    matrix = partial(_matrix, name, codes, exponents, n)
    opened = partial(_TurnedRows, codes, exponents, n)
    parts = (blocks, scales)
    return EncodedStack(spec, blocks.file, blocks.offset, parts, _KIND, opened, 0, matrix=matrix)


def _part(stored: StoredTensor, expert: int, n: int) -> StoredTensor:
    """The rows of an expert, of a matrix that has n rows for each."""
    spec = replace(stored.spec, shape=(n, stored.spec.shape[1]))
    return replace(stored, spec=spec, offset=stored.offset + expert * spec.nbytes)


def _matrix(name: str, codes: StoredTensor, exponents: StoredTensor, n: int, expert: int) -> Encoded:
    """The matrix [n, k] of an expert in a stack."""
    parts = (_part(codes, expert, n), _part(exponents, expert, n))
    spec = TensorSpec(name, "F32", (n, 2 * codes.spec.shape[1]))
    opened = partial(_open_rows, *parts)
    return Encoded(spec, parts[0].file, parts[0].offset, parts, _KIND, opened)


def _numbers(exponents: Tensor, stored: StoredTensor) -> Tensor:
    """The scales of exponents, float32. InputError for NaN."""
    if bool((exponents == _NAN).any()):
        raise InputError(
            "a scale is 255, which stands for NaN",
            where=f"`{stored.spec.name}` in {stored.file.name}",
            fix=f"the model is damaged: {AGAIN}",
        )
    return scale_values(exponents)


@contextmanager
def _open_rows(codes: StoredTensor, exponents: StoredTensor) -> Iterator[_DecodedRows]:
    """Rows of a matrix [n, k], as long as its files are open."""
    with codes.open() as code_rows, exponents.open() as exponent_rows:
        yield _DecodedRows(code_rows, exponent_rows, exponents)


@dataclass(frozen=True)
class _DecodedRows:
    """Rows of a matrix [n, k] as they are stored."""

    codes: Rows
    exponents: Rows
    stored: StoredTensor

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count) in float32."""
        values = code_values(self.codes.weight(start, count), _FP4)
        scale = _numbers(self.exponents.weight(start, count), self.stored)
        return scale_groups(values, scale, _GROUP)


class _TurnedRows:
    """Rows of all the matrices [k, n] of a stack, one below the other: columns of what is stored."""

    def __init__(self, codes: StoredTensor, exponents: StoredTensor, n: int) -> None:
        self._stored = codes, exponents
        self._n, self._k = n, 2 * codes.spec.shape[1]
        self._expert = -1
        self._files = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), as many as there are: float32 [rows, n]."""
        stop = min(start + count, self._stored[0].spec.shape[0] // self._n * self._k)
        rows = []
        while start < stop:
            expert, first = divmod(start, self._k)
            last = min(self._k, first + stop - start)
            rows.append(self._of(expert, first, last))
            start += last - first
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _of(self, expert: int, first: int, last: int) -> Tensor:
        """Rows [first, last) of an expert's matrix [k, n]."""
        if expert != self._expert:
            self._files.close()
            codes, self._scales = (_part(stored, expert, self._n) for stored in self._stored)
            self._codes = self._files.enter_context(Columns(codes))
            self._exponents = self._files.enter_context(Columns(self._scales))
            self._expert = expert
        begin, end = first // _GROUP, -(-last // _GROUP)
        octets = self._codes.columns(first // 2, -(-last // 2))  # [bytes, n]
        pairs = code_values(octets, _FP4).view(*octets.shape, 2)
        values = pairs.transpose(1, 2).reshape(-1, self._n)[first % 2 :][: last - first]
        scale = _numbers(self._exponents.columns(begin, end), self._scales)
        return values * scale[torch.arange(first, last) // _GROUP - begin]
