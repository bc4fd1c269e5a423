"""Int4 weights in groups, int8 inputs per token, no data needed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quantcli.core.numerics import Numerics, Operand, Parts
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.integer import Int4Groups


class W4A8(Int4Groups):
    """Int4 weights, symmetric, one scale per group of columns or per channel; int8 inputs per token."""

    name: ClassVar[str] = "w4a8"

    @property
    def numerics(self) -> Numerics:
        """Int4 per group or channel x int8 per token, dynamic."""
        return Numerics(self.weights, Operand("int8", "token", dynamic=True))

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = sum over groups of (sum_k (xq - zero) wq) * weight_scale / r + bias in float32, rounded
        once to x.dtype.

        As torch's `_dyn_quant_matmul_4bit`, with which vLLM computes it on CPUs: whatever config.json
        config.json says of symmetry, it gives each token's inputs all 255 steps between their extremes.
        With a part `symmetric_inputs`, and scales of whole rows, as vLLM-Ascend: the zero is 0, and the
        sum exact, as its product of halves of inputs comes to that. Source: vllm-ascend 182b75ea84,
        csrc/gmm/grouped_matmul_swiglu_quant_v2/op_kernel, a8w4_msd_pre.h:169-198, a8w4_msd_post.h.
        """
        if "symmetric_inputs" in parts:
            return rounding.linear_int8_tokens(x, parts["weight"], parts["weight_scale"], bias)
        codes, zero, r = _token_codes(x)
        y = (codes - zero) @ self.dequantize(parts).mT / r
        return rounding.add_bias(y, bias, x.dtype)


def _token_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., k] -> codes -128..127 and, for each token, their zero and what inputs were multiplied
    with: x ~ (codes - zero) / r. All float32, the last two [..., 1].
    """
    values = x.float()
    low = values.amin(-1, keepdim=True).clamp_max(0)
    high = values.amax(-1, keepdim=True).clamp_min(0)
    r = torch.where(low < high, 255 / (high - low), 1.0)
    below, above = -128 - low * r, 127 - high * r  # the zero, from either end: they differ by rounding
    zero = torch.where(below + above < 0, below, above)
    zero = zero.clamp(-128, 127).round()
    return ((values * r).round() + zero).clamp(-128, 127), zero, r
