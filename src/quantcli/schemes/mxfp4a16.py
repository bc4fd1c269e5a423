"""MXFP4 weights, float inputs: about a quarter of the memory, no data needed."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quantcli.core.numerics import Numerics, Parts
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.fp4 import MxFp4Weights


class MxFp4A16(MxFp4Weights):
    """Fp4 weights in groups of 32 with powers of two as scales; inputs stay float."""

    name: ClassVar[str] = "mxfp4a16"

    @property
    def numerics(self) -> Numerics:
        """Fp4 per group of 32 x float inputs."""
        return Numerics(self.weights, None)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = x @ weight, dequantized in x.dtype, float32 sums, + bias."""
        return rounding.linear_float_inputs(x, self.dequantize(parts), bias)
