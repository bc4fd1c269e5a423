"""Int4 weights in groups, float inputs: a quarter of the memory, no data needed."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quantcli.core.numerics import Numerics, Parts
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.integer import Int4Groups


class W4A16(Int4Groups):
    """Int4 weights, symmetric, one scale per group of columns or per channel; inputs stay float."""

    name: ClassVar[str] = "w4a16"

    @property
    def numerics(self) -> Numerics:
        """Int4 per group or channel x float inputs."""
        return Numerics(self.weights, None)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = x @ (wq * weight_scale), weights dequantized in x.dtype, float32 sums, + bias."""
        return rounding.linear_float_inputs(x, self.dequantize(parts), bias)
