"""Int8 weights per channel, float inputs: half the memory, no loss from inputs, no data needed."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quantcli.core.numerics import Numerics, Operand, Parts
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.integer import IntegerWeights


class W8A16(IntegerWeights):
    """Int8 weights, symmetric, one scale per output channel; inputs stay float."""

    name: ClassVar[str] = "w8a16"

    @property
    def numerics(self) -> Numerics:
        """Int8 per channel x float inputs."""
        return Numerics(Operand("int8", "channel"), None)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = x @ (wq * weight_scale), weights dequantized in x.dtype, float32 sums, + bias."""
        return rounding.linear_float_inputs(x, self.dequantize(parts), bias)
