"""MXFP4: e2m1 weights in blocks of 32 columns with powers of two as scales, fp4 inputs likewise."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from quantcli.core.numerics import Numerics, Parts
from quantcli.schemes.arithmetic import mx, rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.fp4 import MxFp4Weights


class MxFp4(MxFp4Weights):
    """Fp4 weights and inputs, one power of two as a scale per 32 columns of a row or a token."""

    name: ClassVar[str] = "mxfp4"

    @property
    def numerics(self) -> Numerics:
        """Fp4 per group of 32 x fp4 per token and group of 32, dynamic; scales e8m0."""
        return Numerics(self.weights, replace(self.weights, dynamic=True))

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = (x rounded by `mx.fp4_inputs`) @ weight, both in x.dtype, float32 sums, + bias.

        The engine's way to round inputs is in the parts, see there.
        """
        rounded = mx.fp4_inputs(x, parts).to(x.dtype)
        return rounding.linear_float_inputs(rounded, self.dequantize(parts), bias)
