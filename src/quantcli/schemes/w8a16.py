"""Int8 weights per channel, float inputs: half the memory, no loss from inputs, no data needed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.integer import IntegerWeights, chosen


class W8A16(IntegerWeights):
    """Int8 weights, symmetric, one scale per output channel; inputs stay float."""

    name: ClassVar[str] = "w8a16"

    @property
    def numerics(self) -> Numerics:
        """Int8 per channel x float inputs."""
        return Numerics(Operand("int8", "channel"), None)

    def quantize(
        self,
        rows: Tensor,
        engine_dtype: torch.dtype,
        constants: Stats = NO_STATS,
        bias: Tensor | None = None,
    ) -> Parts:
        """Codes int8 [..., n, k], weight_scale float32 [..., n, 1]; |error| <= scale / 2 to nearest."""
        scale = rounding.int8_scale(rows, engine_dtype)
        codes = chosen(constants, rounding.to_int8(rows, scale))
        return {"weight": codes, "weight_scale": scale}

    def forward(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
        """y = x @ (wq * weight_scale), weights dequantized in x.dtype, float32 sums, + bias."""
        weight = self.dequantize(parts).to(x.dtype).float()
        y = x.float() @ weight.mT
        if bias is not None:
            y = y + bias.float()
        return y.to(x.dtype)
