"""FP8 (e4m3) weights per channel, fp8 inputs per token, no data needed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import clipping, fp8, rounding
from quantcli.schemes.base import Bias, ClippedWeights


class Fp8Dynamic(ClippedWeights):
    """FP8 e4m3 weights, one scale per output channel; fp8 inputs, one scale per token."""

    name: ClassVar[str] = "fp8_dynamic"

    @property
    def numerics(self) -> Numerics:
        """Fp8 e4m3 per channel x fp8 e4m3 per token, dynamic."""
        return Numerics(Operand("fp8_e4m3", "channel"), Operand("fp8_e4m3", "token", dynamic=True))

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes float8_e4m3fn [..., n, k], weight_scale float32 [..., n, 1]."""
        scale = rounding.channel_scale(rows, rounding.FP8_E4M3_MAX, engine_dtype)
        importance = self.importance(constants, rows.device)
        if importance is not None:
            scale = clipping.least_error(rows, scale, engine_dtype, clipping.FP8, importance)
        codes = rounding.to_fp8_e4m3(rows, scale, clip=importance is not None)
        return {"weight": codes, "weight_scale": scale}

    def nearest_codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """float8_e4m3fn [..., n, k] for scales [..., n, 1]."""
        return rounding.to_fp8_e4m3(rows, scale, clip=True)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = (sum_k xq wq) * weight_scale * token_scale in float32, cast to x.dtype, then + bias."""
        codes, token_scale = fp8.npu_token_codes(x)
        total = codes @ parts["weight"].float().mT
        y = (total * parts["weight_scale"].squeeze(-1) * token_scale).to(x.dtype)
        return y if bias is None else (y + bias).to(x.dtype)
