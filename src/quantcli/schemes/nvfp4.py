"""NVFP4: e2m1 weights and inputs in blocks of 16 columns, e4m3 scales, and a global scale of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS, Numerics, Parts, Stats
from quantcli.schemes.arithmetic import fp4, rounding
from quantcli.schemes.arithmetic.observers import Observer, input_observer
from quantcli.schemes.base import Bias, has_effect
from quantcli.schemes.fp4 import NvFp4Weights


class NvFp4(NvFp4Weights):
    """Fp4 weights and inputs in groups of 16 with e4m3 scales. Those of inputs are made while serving,
    against a global scale that is measured."""

    model_config = ConfigDict(serialize_by_alias=True)
    name: ClassVar[str] = "nvfp4"

    # `observer` in recipes; here that is the name of a method
    chosen_by: Literal["minmax", "percentile"] = Field(
        "minmax",
        alias="observer",
        description="how the range of the inputs is chosen that scales of their groups can reach",
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="for percentile: how much of the inputs lies in the range"
    )

    _has_effect = field_validator("percentile")(has_effect)

    @property
    def without_data(self) -> str | None:
        """The same weights, with float inputs."""
        return "nvfp4a16"

    @property
    def numerics(self) -> Numerics:
        """Fp4 per group of 16 x fp4 per token and group of 16, dynamic; a global scale of each."""
        return Numerics(self.weights, replace(self.weights, dynamic=True))

    def observer(self, engine_dtype: torch.dtype) -> Observer:
        """Measures input_global_scale, float32 whatever `engine_dtype` is."""

        def of_range(low: float, high: float) -> Stats:
            return {"input_global_scale": fp4.global_scale(torch.tensor([max(-low, high)]))}

        def of_distribution(values: Tensor, counts: Tensor) -> Stats:
            raise AssertionError("no observer of this scheme tries ranges")

        return input_observer(self.chosen_by, of_range, of_distribution, percent=self.percentile)

    def observed(self, engine_dtype: torch.dtype) -> Any:
        """Not the options of weights."""
        return ["nvfp4", self.model_dump(mode="json", include={"chosen_by", "percentile"})]

    def constants(self, stats: Stats, engine_dtype: torch.dtype) -> Parts:
        """input_global_scale float32 [1]. InputError for a value that no observer gives."""
        scale = stats["input_global_scale"]
        sound = bool(torch.isfinite(scale).all()) and float(scale) >= fp4.LEAST_GLOBAL
        if not sound or scale.dtype != torch.float32 or not torch.equal(1 / (1 / scale), scale):
            raise InputError(
                f"input_global_scale {float(scale)} is not a scale whose reciprocal engines can store",
                fix="calibrate again",
            )
        return {"input_global_scale": scale}

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """As for all such weights; also input_global_scale float32 [1]."""
        parts = super().quantize(rows, engine_dtype, constants, bias)
        return parts | {"input_global_scale": constants["input_global_scale"].to(rows.device)}

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = (x rounded by `fp4.nvfp4_inputs`) @ weight, both in x.dtype, float32 sums, + bias."""
        rounded = fp4.nvfp4_inputs(x, parts["input_global_scale"]).to(x.dtype)
        return rounding.linear_float_inputs(rounded, self.dequantize(parts), bias)
