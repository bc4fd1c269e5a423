"""Codes with a scale and a zero point for groups of columns, stored [k, n], as in AWQ and GPTQ.

qweight and qzeros are int32 with several codes in each; scales are float [ceil(k / group), n]. A weight
is (q - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from quantcli.checkpoint.columns import Columns
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.codes import scale_groups, spread
from quantcli.sources.base import Source, Tensors, matrix, must_be, needed

FLOAT = "start from the float checkpoint, or from one in another format"
# (qweight, qzeros, start, stop) -> these rows: codes [rows, k], zero points [rows, groups], float32
Unpack = Callable[[Columns, Columns, int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GroupedModule:
    """A module whose tensors fit together: a weight [n, k] in groups of `group` columns."""

    name: str
    tensors: Tensors
    parts: tuple[StoredTensor, StoredTensor, StoredTensor]  # qweight, scales, qzeros
    shape: tuple[int, int]
    group: int
    kind: str  # the format, such as "awq int4 in groups of 128"
    bits: int


def grouped_modules(
    source: Source,
    method: str,
    numbers: Callable[[str], tuple[int, int]],
    *,
    packed_along_k: bool,
) -> Iterator[GroupedModule]:
    """Every module with a `qweight`. InputError for tensors that do not fit.

    method: its name. numbers: the bits of a module's codes, and the columns of its groups; -1: all.
    packed_along_k: whether the codes in an int32 of qweight are of neighbouring inputs; else of
    neighbouring outputs.
    """
    for name, tensors in source.modules.items():
        codes = tensors.get("qweight")
        if codes is None:
            continue
        bits, group = numbers(name)
        if group != -1 and group < 1:
            raise source.refused(f"{method} in groups of {group}")
        where = "per channel" if group == -1 else f"in groups of {group}"
        height, width = matrix(codes)
        k, n = (height * 32 // bits, width) if packed_along_k else (height, width * 32 // bits)
        must_be(codes, ("I32",), (height, width), method)
        scales, zeros = (needed(name, tensors, suffix, codes) for suffix in ("scales", "qzeros"))
        columns = k if group == -1 else group
        groups = -(-k // columns)
        if scales.spec.shape != (groups, n):
            expected = f"a weight of {n} x {k} [{groups}, {n}] scales"
            raise source.contradicted(scales, f"{bits} bits in groups of {group} give {expected}")
        must_be(scales, sorted(FLOATS), (groups, n), method)
        must_be(zeros, ("I32",), (groups, -(-n * bits // 32)), f"{method} of {n} x {k}")
        kind = f"{method.lower()} int{bits} {where}"
        yield GroupedModule(name, tensors, (codes, scales, zeros), (n, k), columns, kind, bits)


@dataclass(frozen=True)
class GroupedRows:
    """Rows of such a weight. group_of: of each column, if groups are not contiguous."""

    module: GroupedModule
    codes: Columns
    scales: Columns
    zeros: Columns
    unpack: Unpack
    group_of: Tensor | None

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count) in float32."""
        (n, k), group = self.module.shape, self.module.group
        stop = min(start + count, n)
        values, zeros = self.unpack(self.codes, self.zeros, start, stop)
        scales = self.scales.columns(start, stop).float()
        if self.group_of is not None:
            values -= zeros.index_select(1, self.group_of)
            values *= scales.index_select(1, self.group_of)
            return values
        if k % group:
            values -= spread(zeros, group, k)
        else:
            values.view(len(values), -1, group).sub_(zeros.unsqueeze(-1))
        return scale_groups(values, scales, group)


@contextmanager
def open_rows(
    module: GroupedModule, unpack: Unpack, group_of: Callable[[], Tensor | None] = lambda: None
) -> Iterator[GroupedRows]:
    """Rows of a weight, as long as its files are open."""
    groups = group_of()
    codes, scales, zeros = map(Columns, module.parts)
    with codes, scales, zeros:
        yield GroupedRows(module, codes, scales, zeros, unpack, groups)
