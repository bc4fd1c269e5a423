"""Int8 weights per channel or in groups, float inputs: half the memory, no loss from inputs, no data
needed."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantcli.core.numerics import Numerics, Parts, Stats
from quantcli.schemes.arithmetic import clipping, rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.integer import Groups, IntegerWeights, Search


class W8A16(Groups, IntegerWeights):
    """Int8 weights, symmetric, one scale per output channel or group of columns; inputs stay float."""

    name: ClassVar[str] = "w8a16"
    code_type: ClassVar[clipping.Codes] = clipping.INT8

    group_size: Literal[32, 64, 128, "channel", "auto"] = Field(
        "channel",
        description="columns of a row that share a scale; channel: all of them; auto: the first of "
        "128, 64 and 32 that the engine loads for a module, its siblings, the experts of its layer",
    )

    @property
    def numerics(self) -> Numerics:
        """Int8 per channel or group x float inputs."""
        return Numerics(self.weights, None)

    def search(self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats) -> Search:
        """Of the scales of groups [..., n, groups, columns], or of rows."""
        importance = self.importance(constants, rows.device, self.columns)
        return self.search_of(rows, engine_dtype, importance, self.widest)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = x @ (wq * weight_scale), weights dequantized in x.dtype, float32 sums, + bias."""
        return rounding.linear_float_inputs(x, self.dequantize(parts), bias)
