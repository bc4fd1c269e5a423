"""MXFP4 weights, fp8 inputs, whose scales are of the engine's choice."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor

from quantcli.core.numerics import Numerics, Operand, Parts
from quantcli.schemes.arithmetic import fp8, mx, rounding, tiles
from quantcli.schemes.base import Bias
from quantcli.schemes.fp4 import MxFp4Weights

_GROUP = 128
_INPUTS = {
    "mx": Operand("fp8_e4m3", "group", dynamic=True, block=(1, mx.SIDE), scale="e8m0"),
    "groups": Operand("fp8_e4m3", "group", dynamic=True, block=(1, _GROUP)),
    "token": Operand("fp8_e4m3", "token", dynamic=True),
}


class MxFp4Fp8(MxFp4Weights):
    """Fp4 weights with a power of two as a scale per 32 columns; fp8 inputs, scaled while serving."""

    name: ClassVar[str] = "mxfp4_fp8"

    inputs: Literal["auto", "mx", "groups", "token"] = Field(
        "auto",
        description="what shares a scale of inputs: mx: 32 columns of a token, a power of two; groups: "
        "128 columns; token: a whole one; auto: the first of these that the target stores",
    )

    @classmethod
    def for_numerics(cls, numerics: Numerics) -> Self | None:
        """With the inputs that they have."""
        schemes = (cls.model_validate({"inputs": name}) for name in _INPUTS)
        return next((scheme for scheme in schemes if scheme.numerics == numerics), None)

    @property
    def choices(self) -> tuple[Self, ...]:
        """Fine scales first."""
        if self.inputs != "auto":
            return ()
        return tuple(self.model_copy(update={"inputs": name}) for name in _INPUTS)

    @property
    def numerics(self) -> Numerics:
        """Fp4 per group of 32, e8m0 scales x fp8 e4m3, dynamic. Of `auto` its first choice."""
        return Numerics(self.weights, _INPUTS["mx" if self.inputs == "auto" else self.inputs])

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = sum_k xq (wq * weight_scale) + bias in float32, rounded once to x.dtype.

        Inputs in blocks of 32 as `mx.fp8_inputs` rounds them, the others as vLLM's `QuantFP8`.
        """
        operand = self.numerics.input
        if operand == _INPUTS["mx"]:
            rounded = mx.fp8_inputs(x, parts)
        elif operand == _INPUTS["groups"]:
            codes, scale = fp8.group_codes(x, _GROUP)
            rounded = codes * tiles.spread(scale, (1, _GROUP), codes.shape[-2], codes.shape[-1])
        else:
            codes, scale = fp8.token_codes(x)
            rounded = codes * scale
        return rounding.add_bias(rounded @ self.dequantize(parts).mT, bias, x.dtype)
