"""MXFP8: e4m3 weights in blocks of 32 columns with powers of two as scales, fp8 inputs likewise."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from quantcli.core.numerics import MXFP8, NO_STATS, Numerics, Parts, Stats
from quantcli.schemes.arithmetic import mx, rounding, tiles
from quantcli.schemes.base import Bias, Scheme

_SCALES = torch.float8_e8m0fnu


class Mxfp8(Scheme):
    """FP8 e4m3 weights and inputs, one power of two as a scale per 32 columns of a row or a token.

    The scale is the least power of two with which nothing is clipped: 2^ceil(log2(amax / 448)). One
    step lower, as the OCP specification has it, blocks whose largest weight is more than 1.75 times a
    power of two are clipped, by up to an eighth of it.
    """

    name: ClassVar[str] = "mxfp8"

    inputs: Literal["mx", "float"] = Field(
        "mx", description="mx: inputs as weights, with scales made while serving; float: not rounded"
    )

    @classmethod
    def for_numerics(cls, numerics: Numerics) -> Self | None:
        """With the inputs that they have."""
        scheme = cls(inputs="float" if numerics.input is None else "mx")
        return scheme if scheme.numerics == numerics else None

    @property
    def numerics(self) -> Numerics:
        """Fp8 e4m3 per group of 32 x the same per token and group of 32, dynamic; scales e8m0."""
        return Numerics(MXFP8, replace(MXFP8, dynamic=True) if self.inputs == "mx" else None)

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes float8_e4m3fn [..., n, k], weight_scale float32 [..., n, ceil(k / 32)], powers of two
        from 2^-127 on, whatever `engine_dtype` is."""
        groups = tiles.cut(rows, mx.SIDE)
        scale = rounding.scale_of(rounding.absmax(groups), rounding.FP8_E4M3_MAX, _SCALES)
        codes = rounding.to_fp8_e4m3(groups, scale).flatten(-2)[..., : rows.shape[-1]]
        return {"weight": codes.contiguous(), "weight_scale": scale.squeeze(-1)}

    def dequantize(self, parts: Parts) -> Tensor:
        """Codes times the scales of their groups: float32 [..., n, k]."""
        codes = parts["weight"].float()
        return codes * tiles.spread(parts["weight_scale"], (1, mx.SIDE), *codes.shape[-2:])

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = sum over groups of (sum_k xq wq) * group_scale * weight_scale + bias in float32, rounded
        once to x.dtype. The engine's way to round inputs is in the parts, see `mx.fp8_inputs`.

        Float inputs: y = x @ weight, dequantized in x.dtype, float32 sums, + bias; also if there is a
        part `float_inputs`, for an engine that has only this arithmetic on every device.
        """
        if self.inputs == "float" or "float_inputs" in parts:
            return rounding.linear_float_inputs(x, self.dequantize(parts), bias)
        rounded = mx.fp8_inputs(x, parts)
        return rounding.add_bias(rounded @ self.dequantize(parts).mT, bias, x.dtype)
