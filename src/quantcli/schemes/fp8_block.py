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
        """Codes float8_e4m3fn [..., n, k], weight_scale float32 [..., ceil(n/128), ceil(k/128)].

        A row of blocks at a time, and of that so many columns as fit the cache.
        """
        n, k = rows.shape[-2:]
        importance = self.importance(constants, rows.device, _SIDE)
        tall, wide = -(-n // _SIDE), -(-k // _SIDE)
        codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
        scales = torch.empty((*rows.shape[:-2], tall, wide), device=rows.device)
        for i, j in itertools.product(range(tall), range(0, wide, _BLOCKS)):
            down, across = slice(i * _SIDE, (i + 1) * _SIDE), slice(j * _SIDE, (j + _BLOCKS) * _SIDE)
            part = rows[..., down, across]
            scale = rounding.scale_of(tiles.absmax(part, _BLOCK), rounding.FP8_E4M3_MAX, engine_dtype)
            if importance is not None:
                scale = _clipped(part, scale, engine_dtype, importance[j : j + _BLOCKS])
            each = tiles.spread(scale, (1, _SIDE), 1, part.shape[-1])
            codes[..., down, across] = rounding.to_fp8_e4m3(part, each, clip=importance is not None)
            scales[..., i : i + 1, j : j + _BLOCKS] = scale
        return {"weight": codes, "weight_scale": scales}

    def nearest_codes(self, rows: Tensor, scale: Tensor) -> Tensor:
        """float8_e4m3fn [..., n, k] for the scales of blocks."""
        each = tiles.spread(scale, _BLOCK, *rows.shape[-2:])
        return rounding.to_fp8_e4m3(rows, each, clip=True)

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


def _clipped(part: Tensor, widest: Tensor, engine_dtype: torch.dtype, importance: Tensor) -> Tensor:
    """The scales of some blocks side by side, float32 [..., 1, blocks], as [n, k] and inputs ask for.

    importance: [blocks, 128], of each column in its block.
    """
    blocks = tiles.cut(part.float(), _SIDE).transpose(-3, -2).flatten(-2)
    each = importance.repeat(1, part.shape[-2])
    scale = clipping.least_error(blocks, widest.mT, engine_dtype, clipping.FP8, each)
    return scale.mT
