"""Int4 weights in groups, float inputs: a quarter of the memory, no data needed."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import rounding, zero_points
from quantcli.schemes.base import Bias
from quantcli.schemes.by_data import chosen
from quantcli.schemes.integer import Int4Groups


class W4A16(Int4Groups):
    """Int4 weights, one scale per group of columns or per channel; inputs stay float."""

    name: ClassVar[str] = "w4a16"

    symmetric: bool = Field(
        True,
        description="false: each group has a zero point, too, so that its range need not be symmetric "
        "about 0; for compressed-tensors alone",
    )

    @classmethod
    def for_numerics(cls, numerics: Numerics) -> Self | None:
        """With the group_size and the symmetry that they have."""
        weight = numerics.weight
        alike = super().for_numerics(replace(numerics, weight=replace(weight, symmetric=True)))
        return alike and alike.model_copy(update={"symmetric": weight.symmetric})

    @property
    def has_signs(self) -> bool:
        """Also those of whole rows."""
        return self.signed

    @property
    def weights(self) -> Operand:
        """How weights are quantized."""
        return replace(super().weights, symmetric=self.symmetric)

    @property
    def numerics(self) -> Numerics:
        """Int4 per group or channel x float inputs."""
        return Numerics(self.weights, None)

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes int8 [..., n, k] in -8..7; weight_scale float32 [..., n, ceil(k / group_size)]. If not
        symmetric, scales are positive, and weight_zero_point, int8 in -8..7, has their shape."""
        if self.symmetric:
            return super().quantize(rows, engine_dtype, constants, bias)
        groups = self.in_groups(rows)
        importance = self.importance(constants, rows.device, self.columns)
        scale, zero = zero_points.search(groups, engine_dtype, importance)
        codes = self.in_rows(zero_points.codes(groups, scale, zero), rows.shape[-1])
        if self.columns is not None:
            scale, zero = scale.squeeze(-1), zero.squeeze(-1)
        weight = chosen(constants, codes)
        return {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}

    def nearest_codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """int8 [..., n, k] for the scales, and zero points, of groups or of rows."""
        if zero is None:
            return super().nearest_codes(rows, scale)
        if self.columns is not None:
            scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        return self.in_rows(zero_points.codes(self.in_groups(rows), scale, zero), rows.shape[-1])

    def dequantize(self, parts: Parts) -> Tensor:
        """Codes, less their zero points, times scales: float32 [..., n, k]."""
        if self.symmetric:
            return super().dequantize(parts)
        codes = parts["weight"].float()
        k = codes.shape[-1]
        shifted = codes - self.spread(parts["weight_zero_point"], k)
        return shifted * self.spread(parts["weight_scale"], k)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = x @ w with weights dequantized in x.dtype, float32 sums, + bias."""
        return rounding.linear_float_inputs(x, self.dequantize(parts), bias)
