"""GPTQ as AutoGPTQ and its successor write it: 4 or 8 bits, weights stored [k * bits / 32, n].

qweight: int32 [k * bits / 32, n], codes packed along k, the first in the lowest bits.
qzeros:  int32 [groups, n * bits / 32], packed along n. Version 1 stores the zero point less 1, modulo
         2^bits; `checkpoint_format: gptq_v2` stores it as it is.
scales:  float [groups, n].
g_idx:   int32 [k], the group of each column: with act-order, groups are not contiguous. Absent or
         empty: column i is in group i // g.
A weight is (q - zero) * scale.
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
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.codes import scale_groups, spread, unpack_rows
from quantcli.core.errors import InputError
from quantcli.sources.base import AGAIN, Source, encoded, matrix, must_be, needed
from quantcli.sources.columns import STRIP_BYTES, Columns

_FORMATS = {"gptq": 1, "gptq_v2": 0}  # -> what is to be added to stored zero points


def read(source: Source) -> Iterator[Encoded]:
    """Every GPTQ module. InputError for what does not fit."""
    bits = source.whole("bits")
    if bits not in {4, 8}:
        raise source.refused(f"GPTQ of {bits} bits: this version decodes 4 and 8", _FLOAT)
    stored_as = source.word("checkpoint_format", "gptq")
    if stored_as not in _FORMATS or source.settings.get("is_marlin_format"):
        reason = stored_as if stored_as not in _FORMATS else "marlin"
        formats = " and ".join(f"`{name}`" for name in _FORMATS)
        raise source.refused(
            f"GPTQ in the layout `{reason:.40}`: this version decodes {formats}", _FLOAT
        )
    group = source.whole("group_size")
    if group != -1 and group < 1:
        raise source.refused(f"GPTQ in groups of {group}")
    for module, tensors in source.modules.items():
        codes = tensors.get("qweight")
        if codes is None:
            continue
        words, n = matrix(codes)
        k = words * 32 // bits
        must_be(codes, ("I32",), (words, n), "GPTQ")
        scales, zeros = (needed(module, tensors, suffix, codes) for suffix in ("scales", "qzeros"))
        columns = k if group == -1 else group
        groups = -(-k // columns)
        if scales.spec.shape != (groups, n):
            reason = (
                f"{bits} bits in groups of {group} give a weight of {n} x {k} [{groups}, {n}] scales"
            )
            raise source.contradicted(scales, reason)
        must_be(scales, sorted(FLOATS), (groups, n), "GPTQ")
        must_be(zeros, ("I32",), (groups, -(-n * bits // 32)), f"GPTQ of {n} x {k}")
        parts = [codes, scales, zeros]
        index = tensors.get("g_idx")
        if index is not None:
            parts.append(index)
            if not index.spec.numel:
                index = None
            else:
                must_be(index, ("I32", "I64"), (k,), f"GPTQ of {n} x {k}")
        where = "per channel" if group == -1 else f"in groups of {group}"
        kind = f"gptq int{bits} {where}" + (" (v2)" if stored_as == "gptq_v2" else "")
        opened = partial(GptqRows, codes, scales, zeros, index, bits, columns, _FORMATS[stored_as])
        yield encoded(module, (n, k), parts, opened, kind, STRIP_BYTES)


class GptqRows:
    """Rows of a weight [n, k] of GPTQ."""

    def __init__(
        self,
        codes: StoredTensor,
        scales: StoredTensor,
        zeros: StoredTensor,
        index: StoredTensor | None,
        bits: int,
        group: int,
        added: int,
    ) -> None:
        self._codes, self._scales, self._zeros = Columns(codes), Columns(scales), Columns(zeros)
        self._index = index
        self._bits, self._group, self._added = bits, group, added
        self._groups, self._n = scales.spec.shape
        self._k = codes.spec.shape[0] * 32 // bits
        self._group_of: Tensor | None = None  # of each column, if groups are not contiguous

    def __enter__(self) -> Self:
        if self._index is not None:
            self._group_of = self._load_index(self._index)
        with ExitStack() as stack:
            for columns in (self._codes, self._scales, self._zeros):
                stack.enter_context(columns)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _load_index(self, stored: StoredTensor) -> Tensor | None:
        index = read_tensor(stored).long()
        bad = ((index < 0) | (index >= self._groups)).nonzero()
        if len(bad):
            place = int(bad[0])
            raise InputError(
                f"group of a column is {int(index[place])}; there are {self._groups} groups",
                where=f"`{stored.spec.name}`[{place}] in {stored.file.name}",
                fix=AGAIN,
            )
        runs = torch.arange(self._k) // self._group
        return None if torch.equal(index, runs) else index

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count) in float32."""
        stop = min(start + count, self._n)
        values = unpack_rows(self._codes.columns(start, stop), self._bits).float()
        zeros = self._zero_points(start, stop)
        scales = self._scales.columns(start, stop).float()
        if self._group_of is not None:
            values -= zeros.index_select(1, self._group_of)
            values *= scales.index_select(1, self._group_of)
            return values
        if self._k % self._group:
            values -= spread(zeros, self._group, self._k)
        else:
            values.view(len(values), -1, self._group).sub_(zeros.unsqueeze(-1))
        return scale_groups(values, scales, self._group)

    def _zero_points(self, start: int, stop: int) -> Tensor:
        """float32 [rows, groups]."""
        each = 32 // self._bits
        first, last = start // each, -(-stop // each)
        packed = self._zeros.columns(first, last).t()  # [groups, words]
        points = unpack_rows(packed, self._bits).int()[:, start - first * each : stop - first * each]
        return points.add_(self._added).bitwise_and_(2**self._bits - 1).t().float()


_FLOAT = "start from the float checkpoint, or from one in another format"
