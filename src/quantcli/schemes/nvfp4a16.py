"""NVFP4 weights, float inputs: less than a third of the memory, no data needed."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quantcli.core.numerics import Numerics, Parts
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.fp4 import NvFp4Weights


class NvFp4A16(NvFp4Weights):
    """Fp4 weights in groups of 16 with e4m3 scales and a global scale; inputs stay float."""

    name: ClassVar[str] = "nvfp4a16"

    @property
    def numerics(self) -> Numerics:
        """Fp4 per group of 16 x float inputs."""
        return Numerics(self.weights, None)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = x @ weight, dequantized in x.dtype, float32 sums, + bias."""
        return rounding.linear_float_inputs(x, self.dequantize(parts), bias)
