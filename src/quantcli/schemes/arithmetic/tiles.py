"""Weights whose scales are of tiles: some columns of a row (groups) or some rows and columns (blocks).

Tiles begin at row 0 and column 0; those at the end of a weight may be smaller.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from quantcli.core.kernels import tensors as kernels
from quantcli.schemes.arithmetic import rounding


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


def spread(scale: Tensor, block: tuple[int, int], n: int, k: int) -> Tensor:
    """The scale of each element: [..., ceil(n/r), ceil(k/c)] -> [..., n, k]."""
    tall, columns = block
    wide = scale.repeat_interleave(columns, -1)[..., :k]
    return wide if tall == 1 else wide.repeat_interleave(tall, -2)[..., :n, :]
