"""Int8 weights per channel; int8 inputs with a measured scale while decoding, per token in prefill."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats, multiplier
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.arithmetic.static_int8 import deq_grid, least_deq_scale, row_parts
from quantcli.schemes.base import Bias
from quantcli.schemes.by_data import chosen
from quantcli.schemes.w8a8_static import WEIGHT, Int8Static


class W8A8Mix(Int8Static):
    """Int8 weights, one scale per output channel; int8 inputs, static in decoding, else per token.

    Nodes that only decode use the static formula (`forward`), all others `forward_prefill`.
    """

    name: ClassVar[str] = "w8a8_mix"

    @property
    def numerics(self) -> Numerics:
        """Int8 per channel x int8 per tensor; int8 per token, dynamic, in prefill."""
        return Numerics(WEIGHT, self.inputs, Operand("int8", "token", dynamic=True))

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes int8 [..., n, k], weight_scale float32 [..., n, 1], and the parts of `row_parts`.

        Codes follow weight_scale, which is representable in `engine_dtype`; deq_scale is the nearest to
        weight_scale / r that the hardware honours. Without a clip |error| <= weight_scale / 2. NaN or
        Inf in the weight or the bias shows in weight_scale.
        """
        input_scale = constants["input_scale"]
        r = multiplier(input_scale).to(rows.device)
        least = least_deq_scale(r, bias) * r
        if self.clip == "none":
            scale = rounding.int8_scale(rows, engine_dtype, least)
        else:
            clipped = self.search(rows, engine_dtype, constants).scale(engine_dtype)
            scale = rounding.round_up(torch.maximum(clipped, least), engine_dtype)
        deq = deq_grid(scale / r, input_scale.dtype, up=False)
        scale = torch.where(torch.isfinite(deq), scale, deq)  # so that an overflow shows
        codes = chosen(constants, self.nearest_codes(rows, scale))
        return {"weight": codes, "weight_scale": scale, **row_parts(codes, deq, bias, constants)}

    def forward_prefill(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """The linear with inputs quantized per token, as in w8a8_dynamic; here `bias` counts."""
        return rounding.linear_int8_tokens(x, parts["weight"], parts["weight_scale"], bias)
