"""FP8 (e4m3) weights with one scale per weight, fp8 inputs per token, no data needed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import fp8, rounding
from quantcli.schemes.base import Bias, Scheme


class Fp8Tensor(Scheme):
    """FP8 e4m3 weights, one scale for all that the engine merges; fp8 inputs, one scale per token."""

    name: ClassVar[str] = "fp8_tensor"
    needs_weight_amax: ClassVar[bool] = True

    @property
    def numerics(self) -> Numerics:
        """Fp8 e4m3 per tensor x fp8 e4m3 per token, dynamic."""
        return Numerics(Operand("fp8_e4m3", "tensor"), Operand("fp8_e4m3", "token", dynamic=True))

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes float8_e4m3fn [..., n, k], weight_scale float32 [1] from `weight_amax`."""
        scale = fp8.tensor_scale(constants["weight_amax"].to(rows.device), engine_dtype)
        return {"weight": rounding.to_fp8_e4m3(rows, scale), "weight_scale": scale}

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = (sum_k xq wq) * weight_scale * token_scale + bias in float32, rounded once to x.dtype."""
        codes, token_scale = fp8.token_codes(x)
        y = codes @ parts["weight"].float().mT * parts["weight_scale"] * token_scale
        return rounding.add_bias(y, bias, x.dtype)
