"""Int8 weights per channel, int8 inputs per token, no data needed."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quantcli.core.numerics import Numerics, Operand, Parts
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.integer import IntegerWeights


class W8A8Dynamic(IntegerWeights):
    """Int8 weights, one scale per output channel; int8 inputs, one scale per token."""

    name: ClassVar[str] = "w8a8_dynamic"

    @property
    def numerics(self) -> Numerics:
        """Int8 per channel x int8 per token, dynamic."""
        return Numerics(Operand("int8", "channel"), Operand("int8", "token", dynamic=True))

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = (f32(sum_k xq wq) * weight_scale) * token_scale + bias, rounded once to x.dtype."""
        return rounding.linear_int8_tokens(x, parts["weight"], parts["weight_scale"], bias)
