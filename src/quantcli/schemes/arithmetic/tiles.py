"""Weights whose scales are of tiles: some columns of a row (groups) or some rows and columns (blocks).

Tiles begin at row 0 and column 0; those at the end of a weight may be smaller.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from quantcli.core.kernels import tensors as kernels
from quantcli.schemes.arithmetic import rounding

_AT_ONCE = 2**19  # values whose float32 copy stays in the cache of a core


def cut(rows: Tensor, columns: int) -> Tensor:
    """[..., k] -> [..., ceil(k / columns), columns]; the last group is filled up with zeros."""
    k = rows.shape[-1]
    groups = -(-k // columns)
    if k % columns:
        rows = F.pad(rows, (0, groups * columns - k))
    return rows.reshape(*rows.shape[:-1], groups, columns)


def absmax(rows: Tensor, block: tuple[int, int]) -> Tensor:
    """max |w| of each tile: [..., n, k] in any float dtype -> float32 [..., ceil(n/r), ceil(k/c)].

    NaN and Inf in a tile show in it.
    """
    tall, columns = block
    compiled = kernels.absmax_tiles(rows, tall, columns)
    if compiled is not None:
        return compiled
    amax = rounding.absmax(cut(rows, columns)).squeeze(-1)
    if tall == 1:
        return amax
    n = amax.shape[-2]
    stacked = -(-n // tall)
    amax = F.pad(amax, (0, 0, 0, stacked * tall - n))
    return amax.reshape(*amax.shape[:-2], stacked, tall, amax.shape[-1]).amax(-2)


def to_fp8_e4m3(rows: Tensor, scale: Tensor, block: tuple[int, int], *, clip: bool = False) -> Tensor:
    """See `rounding.to_fp8_e4m3`; for the scales of tiles, float32 [..., ceil(n/r), ceil(k/c)]."""
    tall, columns = block
    compiled = kernels.encode(rows, scale, "fp8_e4m3", tall, columns)
    if compiled is not None:
        return compiled
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    step = max(1, _AT_ONCE // (tall * columns))  # tiles side by side
    for i, j in itertools.product(range(scale.shape[-2]), range(0, scale.shape[-1], step)):
        part = (..., slice(i * tall, (i + 1) * tall), slice(j * columns, (j + step) * columns))
        each = scale[..., i : i + 1, j : j + step].repeat_interleave(columns, -1)
        width = rows[part].shape[-1]
        codes[part] = rounding.to_fp8_e4m3(rows[part], each[..., :width], clip=clip)
    return codes


def spread(scale: Tensor, block: tuple[int, int], n: int, k: int) -> Tensor:
    """The scale of each element: [..., ceil(n/r), ceil(k/c)] -> [..., n, k]."""
    tall, columns = block
    wide = scale.repeat_interleave(columns, -1)[..., :k]
    return wide if tall == 1 else wide.repeat_interleave(tall, -2)[..., :n, :]
