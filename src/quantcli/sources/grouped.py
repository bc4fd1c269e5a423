"""Codes with a scale and a zero point for groups of columns, stored [k, n], as in AWQ and GPTQ.

qweight and qzeros are int32 with several codes in each; scales are float [ceil(k / group), n]. A weight
is (q - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantcli.checkpoint.columns import Columns
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.codes import scale_groups, spread
from quantcli.sources.base import Source, Tensors, matrix, must_be, needed

FLOAT = "start from the float checkpoint, or from one in another format"
# (qweight, qzeros, start, stop) -> these rows: codes [rows, k], zero points [rows, groups], float32;
# None for zero points of 0
Unpack = Callable[[Columns, Any, int, int], tuple[Tensor, "Tensor | None"]]
NAMES = ("qweight", "scales", "qzeros")


@dataclass(frozen=True)
class GroupedModule:
    """A module whose tensors fit together: a weight [n, k] in groups of `group` columns."""

    name: str
    tensors: Tensors
    parts: tuple[StoredTensor, ...]  # qweight, scales, qzeros if there are any
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
    names: tuple[str, str, str] = NAMES,
    zeros: bool = True,
) -> Iterator[GroupedModule]:
    """Every module with codes. InputError for tensors that do not fit.

    method: its name. numbers: the bits of a module's codes, and the columns of its groups; -1: all.
    packed_along_k: whether the codes in an int32 of qweight are of neighbouring inputs; else of
    neighbouring outputs.
    names: the suffixes of codes, which are a module's if they are int32, of scales and of zero points.
    zeros: there must be zero points.
    """
    for name, tensors in source.modules.items():
        codes = tensors.get(names[0])
        if codes is None or (names != NAMES and codes.spec.dtype != "I32"):
            continue
        bits, group = numbers(name)
        if group != -1 and group < 1:
            raise source.refused(f"{method} in groups of {group}")
        where = "per channel" if group == -1 else f"in groups of {group}"
        height, width = matrix(codes)
        k, n = (height * 32 // bits, width) if packed_along_k else (height, width * 32 // bits)
        must_be(codes, ("I32",), (height, width), method)
        scales = needed(name, tensors, names[1], codes)
        points = needed(name, tensors, names[2], codes) if zeros else tensors.get(names[2])
        columns = k if group == -1 else group
        groups = -(-k // columns)
        if scales.spec.shape != (groups, n):
            expected = f"a weight of {n} x {k} [{groups}, {n}] scales"
            raise source.contradicted(scales, f"{bits} bits in groups of {group} give {expected}")
        must_be(scales, sorted(FLOATS), (groups, n), method)
        parts: tuple[StoredTensor, ...] = (codes, scales)
        if points is not None:
            must_be(points, ("I32",), (groups, -(-n * bits // 32)), f"{method} of {n} x {k}")
            parts = (codes, scales, points)
        kind = f"{method.lower()} int{bits} {where}"
        yield GroupedModule(name, tensors, parts, (n, k), columns, kind, bits)


@dataclass(frozen=True)
class GroupedRows:
    """Rows of such a weight. group_of: of each column, if groups are not contiguous."""

    module: GroupedModule
    codes: Columns
    scales: Columns
    zeros: Columns | None
    unpack: Unpack
    group_of: Tensor | None

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count) in float32."""
        (n, k), group = self.module.shape, self.module.group
        stop = min(start + count, n)
        values, zeros = self.unpack(self.codes, self.zeros, start, stop)
        scales = self.scales.columns(start, stop).float()
        if self.group_of is not None:
            if zeros is not None:
                values -= zeros.index_select(1, self.group_of)
            values *= scales.index_select(1, self.group_of)
            return values
        if zeros is None:
            return scale_groups(values, scales, group)
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
    with ExitStack() as stack:
        codes, scales, *zeros = (stack.enter_context(Columns(part)) for part in module.parts)
        yield GroupedRows(module, codes, scales, zeros[0] if zeros else None, unpack, groups)
