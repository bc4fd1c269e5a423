"""Int8 weights per channel, int8 inputs with one measured scale per module: the fastest int8 scheme."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Parts, Stats, multiplier
from quantcli.schemes import rounding
from quantcli.schemes.int8_static import Int8Static, deq_grid, least_deq_scale, row_parts
from quantcli.schemes.integer import chosen


class W8A8Static(Int8Static):
    """Int8 weights, one scale per output channel; int8 inputs, one scale and offset per module."""

    name: ClassVar[str] = "w8a8_static"

    def quantize(
        self,
        rows: Tensor,
        held: torch.dtype,
        constants: Stats = NO_STATS,
        bias: Tensor | None = None,
    ) -> Parts:
        """Codes int8 [..., n, k], weight_scale float32 [..., n, 1], and what `row_parts` adds.

        The engine knows weights by deq_scale alone: that is chosen first, and weight_scale =
        deq_scale * r is what it amounts to, in float32 whatever `held` is. No code is clipped;
        |error| <= weight_scale / 2 to nearest. NaN or Inf in the weight or the bias shows in
        weight_scale.
        """
        scale = constants["input_scale"]
        r = multiplier(scale).to(rows.device)
        narrowest = rounding.absmax(rows) / rounding.INT8_BEST / r
        deq = deq_grid(torch.maximum(narrowest, least_deq_scale(r, bias)), scale.dtype, up=True)
        codes = chosen(constants, rounding.to_int8(rows, deq * r))
        return {"weight": codes, "weight_scale": deq * r, **row_parts(codes, deq, bias, constants)}
