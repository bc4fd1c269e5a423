"""Weights of codes in tiles: the codes of a tile share a scale, and one more scale may come on top.

Formats differ in the type of the codes, in the sides of a tile, and in the order in which codes and
scales stand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.checkpoint.spec import TensorSpec
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.codes import scale_values, scaled_values
from quantcli.core.number_types import ELEMENTS
from quantcli.sources.base import SCALES, Source, check_scales, encoded, matrix, wrong

_TALL, _WIDE = 128, 4  # rows and columns of scales that swizzled scales keep together


@dataclass(frozen=True)
class Blocks:
    """A weight [n, k] as it is stored.

    codes:      [n, k / per_byte], of the type `element`.
    scale:      [ceil(n / rows), ceil(k / columns)], one for each tile: float, or uint8, an exponent.
    tile:       the rows and columns of a tile.
    whole:      a float scale of the whole weight that comes on top; None: 1.
    divides:    values are divided by `whole`, not multiplied.
    high_first: of two codes in a byte, that of the even column is in the high four bits.
    swizzled:   scales stand as tensor cores read them, see `_in_rows`, with rows and columns of
                padding: `scale` is of these sides.
    """

    codes: StoredTensor
    element: str
    scale: StoredTensor
    tile: tuple[int, int]
    whole: StoredTensor | None = None
    divides: bool = False
    high_first: bool = False
    swizzled: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The sides n and k."""
        n, stored = self.codes.spec.shape
        return n, stored * ELEMENTS[self.element].per_byte

    def encoded(self, module: str, kind: str, unused: Sequence[StoredTensor] = ()) -> Encoded:
        """The weight of a module. unused: its tensors that only the source's engine takes."""
        parts = [self.codes, self.scale, *([self.whole] if self.whole else []), *unused]
        return encoded(module, self.shape, parts, partial(_open_rows, self), kind)


@contextmanager
def _open_rows(blocks: Blocks) -> Iterator[_BlockRows]:
    """Rows of a weight, as long as its files are open."""
    whole = None
    if blocks.whole is not None:
        whole = read_tensor(blocks.whole).float().reshape(())
        if not float(whole) > 0 or not math.isfinite(whole):
            suffix = blocks.whole.spec.name.rpartition(".")[2]
            raise wrong(blocks.whole, f"{suffix} is {float(whole):g}: a scale is a positive number")
    with blocks.codes.open() as codes, blocks.scale.open() as scales:
        yield _BlockRows(blocks, codes, scales, whole)


@dataclass(frozen=True)
class _BlockRows:
    """Rows of codes times the scales of their tiles."""

    blocks: Blocks
    codes: Rows
    scales: Rows
    whole: Tensor | None

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count) in float32."""
        blocks = self.blocks
        rows, columns = blocks.tile
        element = ELEMENTS[blocks.element]
        codes = self.codes.weight(start, count)
        if element.per_byte > 1:
            codes = codes.view(torch.uint8)
            if blocks.high_first:
                codes = codes << 4 | codes >> 4
        first, last = start // rows, -(-(start + len(codes)) // rows)
        scale = scale_values(self._scales(first, last))
        if rows > 1:
            scale = scale[torch.arange(start, start + len(codes)) // rows - first]

        def decode(scale: Tensor) -> Tensor:
            return scaled_values(codes, element, scale, columns)

        check_scales(scale, blocks.scale, start, rows, decode)
        values = decode(scale)
        if self.whole is not None:
            return values.div_(self.whole) if blocks.divides else values.mul_(self.whole)
        return values

    def _scales(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of scales as they are stored."""
        if not self.blocks.swizzled:
            return self.scales.weight(first, last - first)
        begin = first - first % _TALL
        rows = _in_rows(self.scales.weight(begin, last + -last % _TALL - begin))
        groups = -(-self.blocks.shape[1] // self.blocks.tile[1])
        return rows[first - begin : last - begin, :groups].contiguous()


def _in_rows(swizzled: Tensor) -> Tensor:
    """Scales in the order of rows and columns: [128 a, 4 b] -> [128 a, 4 b].

    Each 128 x 4 of them stand together, row 32 i + j at place 4 j + i. Source: comfy-kitchen 7d86acf,
    comfy_kitchen/float_utils.py:292-350.
    """
    height, width = swizzled.shape
    tiles = swizzled.view(torch.uint8).view(height // _TALL, width // _WIDE, 32, 4, _WIDE)
    return tiles.permute(0, 3, 2, 1, 4).reshape(height, width).view(swizzled.dtype)


def as_swizzled(scale: StoredTensor, n: int, groups: int) -> StoredTensor:
    """Swizzled scales as a matrix; InputError if their number is not that of n rows of `groups`."""
    sides = n + -n % _TALL, groups + -groups % _WIDE
    if scale.spec.numel != sides[0] * sides[1]:
        what = f"is {scale.spec}; swizzled scales of {n} x {groups} blocks are {list(sides)}"
        raise wrong(scale, what)
    return with_shape(scale, sides)


def with_shape(stored: StoredTensor, shape: tuple[int, ...], dtype: str | None = None) -> StoredTensor:
    """The same bytes as a tensor of another shape, or dtype of the same size."""
    spec = TensorSpec(stored.spec.name, dtype or stored.spec.dtype, shape)
    return replace(stored, spec=spec)


def grouped(
    codes: StoredTensor, scale: StoredTensor, element: str, columns: int, dtypes: Sequence[str]
) -> tuple[int, int]:
    """n and k of codes with a scale for each group of `columns` columns, which must divide k.

    InputError for scales of other sides or dtypes.
    """
    n, stored = matrix(codes)
    k = stored * ELEMENTS[element].per_byte
    if k % columns:
        raise wrong(codes, f"is {codes.spec}: groups of {columns} columns do not divide {k}")
    if scale.spec.dtype not in dtypes or scale.spec.shape != (n, k // columns):
        expected = f"{n} x {k} in groups of {columns} has {' or '.join(dtypes)} {[n, k // columns]}"
        raise wrong(scale, f"is {scale.spec}; a weight of {expected}")
    return n, k


def one_number(stored: StoredTensor) -> StoredTensor:
    """A scale of a whole weight; InputError if it is not one float."""
    if stored.spec.numel != 1 or stored.spec.dtype not in SCALES:
        raise wrong(stored, f"is {stored.spec}; a scale of a whole weight is one float")
    return stored


def tiles_of(
    source: Source, scale: StoredTensor, sides: tuple[int, int], block: tuple[int, int] | None
) -> tuple[StoredTensor, tuple[int, int], str]:
    """The scale as a matrix, one value a tile; rows and columns of a tile; what shares a scale.

    block: rows and columns of a tile by the settings; None: a row, or all. InputError for others.
    """
    n, k = sides
    shape = scale.spec.shape
    if scale.spec.dtype not in {*SCALES, "U8"}:
        raise wrong(scale, f"scale is {scale.spec}; it must be float")
    if len(shape) == 4 and shape[1] == shape[3] == 1:  # ModelOpt's blocks
        shape = (shape[0], shape[2])
        scale = with_shape(scale, shape)
    if block is not None:
        expected = -(-n // block[0]), -(-k // block[1])
        if shape != expected:
            reason = f"blocks of {block[0]} x {block[1]} give a weight of {n} x {k} "
            raise source.contradicted(scale, f"{reason}{list(expected)} scales")
        return scale, block, f"blocks of {block[0]} x {block[1]}"
    if shape in {(), (1,), (1, 1)}:
        return with_shape(scale, (1, 1)), (n, k), "per tensor"
    if shape in {(n,), (n, 1)}:
        return with_shape(scale, (n, 1)), (1, k), "per channel"
    reason = f"no weight_block_size, so that a weight of {n} x {k} has 1 or {n} scales"
    raise source.contradicted(scale, reason)
