"""Weights in four-bit floats (e2m1): how they are rounded, with either type of scales."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantcli.core.numerics import MXFP4, NO_STATS, NVFP4, Operand, Parts, Stats
from quantcli.schemes.arithmetic import fp4
from quantcli.schemes.base import Bias
from quantcli.schemes.by_data import RoundedWeights, chosen, given


class Fp4Weights(RoundedWeights):
    """The options that schemes with such weights share.

    A subclass sets `grid`, the scales of its groups.
    """

    grid: ClassVar[fp4.Grid]

    scales: Literal["search", "amax"] = Field(
        "search",
        description="how the scale of a group is chosen: search tries those that may be best and takes "
        "the one with the least squared error; amax takes the one that the largest weight leads to",
    )

    @property
    @abstractmethod
    def weights(self) -> Operand:
        """How weights are quantized."""

    @property
    def searches_scales(self) -> bool:
        """Unless the largest weight decides."""
        return self.scales == "search"

    def whole(self, constants: Stats, device: torch.device) -> Tensor | None:
        """The global scale, float32 [1]; None if the format has none."""
        return None

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes uint8 [..., n, ceil(k / 2)], two in a byte, that of the even column in the low bits;
        weight_scale float32 [..., n, ceil(k / columns)], exact in the type of scales, whatever
        `engine_dtype` is; weight_global_scale float32 [1] if the format has one."""
        whole = self.whole(constants, rows.device)
        parts = given(constants, rows.device)
        if parts is None:
            packed, scale = fp4.quantize(rows, whole, self.grid, search=self.searches_scales)
            parts = {"weight": chosen(constants, packed), "weight_scale": scale}
        return parts if whole is None else parts | {"weight_global_scale": whole}

    def dequantize(self, parts: Parts) -> Tensor:
        """code * (weight_scale * weight_global_scale): float32 [..., n, k]."""
        whole = parts.get("weight_global_scale")
        return fp4.dequantize(parts["weight"], parts["weight_scale"], whole, self.grid.columns)


class NvFp4Weights(Fp4Weights):
    """In groups of 16 with e4m3 scales, and one float32 scale of all that the engine merges."""

    grid: ClassVar[fp4.Grid] = fp4.NVFP4
    needs_weight_amax: ClassVar[bool] = True

    @property
    def weights(self) -> Operand:
        """Fp4 e2m1 per group of 16, e4m3 scales, a global scale."""
        return NVFP4

    def whole(self, constants: Stats, device: torch.device) -> Tensor:
        """From `weight_amax`; a power of two for numbers that such scales can hold exactly."""
        coarse = "weight_coarse" in constants and bool(constants["weight_coarse"])
        make = fp4.power_scale if coarse else fp4.global_scale
        return make(constants["weight_amax"].to(device))


class MxFp4Weights(Fp4Weights):
    """In groups of 32 with powers of two as scales."""

    grid: ClassVar[fp4.Grid] = fp4.MXFP4

    @property
    def weights(self) -> Operand:
        """Fp4 e2m1 per group of 32, e8m0 scales."""
        return MXFP4
