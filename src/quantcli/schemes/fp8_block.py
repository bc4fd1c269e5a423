"""FP8 (e4m3) weights in blocks of 128 x 128, fp8 inputs per token and 128 columns, no data needed."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import clipping, fp8, rounding, tiles
from quantcli.schemes.base import Bias, ClippedWeights

_SIDE = 128
_BLOCK = (_SIDE, _SIDE)
_BLOCKS = 32  # side by side, that are looked at together: 512K elements


class Fp8Block(ClippedWeights):
    """FP8 e4m3 weights, one scale per block of 128 x 128; fp8 inputs, one per token and 128 columns."""

    name: ClassVar[str] = "fp8_block"

    @property
    def row_multiple(self) -> int:
        """The rows of a block."""
        return _SIDE

    @property
    def numerics(self) -> Numerics:
        """Fp8 e4m3 per block x fp8 e4m3 per token and group, dynamic."""
        return Numerics(
            Operand("fp8_e4m3", "block", block=_BLOCK),
            Operand("fp8_e4m3", "group", dynamic=True, block=(1, _SIDE)),
        )

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes float8_e4m3fn [..., n, k], weight_scale float32 [..., ceil(n/128), ceil(k/128)]."""
        scale = rounding.scale_of(tiles.absmax(rows, _BLOCK), rounding.FP8_E4M3_MAX, engine_dtype)
        importance = self.importance(constants, rows.device, _SIDE)
        if importance is not None:
            scale = _clipped(rows, scale, engine_dtype, importance)
        codes = tiles.to_fp8_e4m3(rows, scale, _BLOCK, clip=importance is not None)
        return {"weight": codes, "weight_scale": scale}

    def nearest_codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """float8_e4m3fn [..., n, k] for the scales of blocks."""
        return tiles.to_fp8_e4m3(rows, scale, _BLOCK, clip=True)

    def dequantize(self, parts: Parts) -> Tensor:
        """Codes times the scales of their blocks: float32 [..., n, k]."""
        codes = parts["weight"].float()
        return codes * tiles.spread(parts["weight_scale"], _BLOCK, *codes.shape[-2:])

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = sum over groups of (sum_k xq wq) * group_scale * weight_scale, cast to x.dtype, then
        + bias.

        The sum over groups is in float32, as the engine's; here scales are multiplied in before it.
        """
        codes, scale = fp8.group_codes(x, _SIDE)
        scaled = codes * scale.repeat_interleave(_SIDE, -1)[..., : x.shape[-1]]
        y = (scaled @ self.dequantize(parts).mT).to(x.dtype)
        return y if bias is None else (y + rounding.per_output(bias)).to(x.dtype)


def _clipped(rows: Tensor, widest: Tensor, engine_dtype: torch.dtype, importance: Tensor) -> Tensor:
    """The scales of blocks [..., n, k] as inputs ask for, in the shape of `widest`.

    importance: [ceil(k / 128), 128], of each column in its block. It takes a row of blocks at a time,
    and of that so many columns as fit the cache.
    """
    scale = torch.empty_like(widest)
    tall, wide = widest.shape[-2:]
    for i, j in itertools.product(range(tall), range(0, wide, _BLOCKS)):
        part = rows[..., i * _SIDE : (i + 1) * _SIDE, j * _SIDE : (j + _BLOCKS) * _SIDE]
        blocks = tiles.cut(part, _SIDE).transpose(-3, -2).flatten(-2)
        each = importance[j : j + _BLOCKS].repeat(1, part.shape[-2])
        place = (..., slice(i, i + 1), slice(j, j + _BLOCKS))
        found = clipping.least_error(blocks, widest[place].mT, engine_dtype, clipping.FP8, each)
        scale[place] = found.mT
    return scale
