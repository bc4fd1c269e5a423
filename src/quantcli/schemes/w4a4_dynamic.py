"""Int4 weights per channel, int4 inputs per token, no data needed: for models that were rotated so that
they have no outliers, and as the baseline of better 4-bit schemes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quantcli.core.numerics import Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.integer import LARGEST, Int4Weights


class W4A4Dynamic(Int4Weights):
    """Int4 weights, one scale per output channel; int4 inputs, one scale per token."""

    name: ClassVar[str] = "w4a4_dynamic"

    @property
    def numerics(self) -> Numerics:
        """Int4 per channel x int4 per token, dynamic."""
        return Numerics(Operand("int4", "channel"), Operand("int4", "token", dynamic=True))

    def nearest(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., n, k] in -8..7, scale float32 [..., n, 1] whatever `engine_dtype` is."""
        return super().nearest(rows, torch.float32, constants)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = f16((f32(sum_k xq wq) * weight_scale) * token_scale), cast to x.dtype, then + bias.

        The kernel puts out float16 whatever the model is served in; the sum is exact.
        """
        scaled, token_scale = rounding.scale_tokens(x, LARGEST)
        total = rounding.exact_product(scaled.round_(), parts["weight"], 2**6).float().to(x.device)
        y = total * rounding.per_output(parts["weight_scale"].squeeze(-1)) * token_scale
        y = y.to(torch.float16).to(x.dtype)
        return y if bias is None else y + rounding.per_output(bias.to(x.dtype))
