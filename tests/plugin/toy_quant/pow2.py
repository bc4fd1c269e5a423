"""Int8 weights whose scales are powers of two."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.base import Bias, Scheme


class Pow2(Scheme):
    """Int8 weights per channel, scales 2^e; int8 inputs per token."""

    name: ClassVar[str] = "pow2"
    spare_bits: Literal[0, 1] = 0  # of each code

    @property
    def numerics(self) -> Numerics:
        """As w8a8_dynamic."""
        return Numerics(Operand("int8", "channel"), Operand("int8", "token", dynamic=True))

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes int8 [n, k], weight_scale [n, 1]."""
        values = rows.float()
        amax = values.abs().amax(-1, keepdim=True) * 2**self.spare_bits / 127
        scale = torch.where(amax > 0, amax, 1.0).log2().ceil().exp2()
        return {"weight": (values / scale).round().to(torch.int8), "weight_scale": scale}

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """With float inputs."""
        y = x.float() @ self.dequantize(parts).mT
        return (y if bias is None else y + bias).to(x.dtype)
