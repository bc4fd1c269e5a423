"""Int4 weights and inputs after a Kronecker transform: the kernel's arithmetic, for any transform."""

from __future__ import annotations

from torch import Tensor

from quantcli.core.numerics import Numerics, Operand, Parts
from quantcli.schemes import flatquant
from quantcli.schemes.arithmetic import kronecker, rounding
from quantcli.schemes.base import Bias
from quantcli.schemes.integer import Int4Weights


class Int4Kronecker(Int4Weights):
    """Int4 weights, one scale per output channel; inputs that the engine transforms, then int4, one
    scale per token. A subclass makes left_trans, right_trans and clip_ratio."""

    @property
    def numerics(self) -> Numerics:
        """Int4 per channel x int4 per token, dynamic, inputs transformed."""
        token = Operand("int4", "token", dynamic=True)
        return Numerics(Operand("int4", "channel"), token, transform="kronecker")

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """The kernel `npu_kronecker_quant`, then an int4 product, with all their roundings.

        t = f16(L^T (X R)), m = max |t| of a token, token_scale = m clip_ratio / 7 and
        xq = clamp(rint(f16(t ((7 / clip_ratio) / m))), -8, 7);
        y = (f32(sum_k xq wq) * weight_scale) * token_scale, cast to x.dtype, then + bias. The sum is
        exact in float32, below 2^24 for the widest matrix that the kernel takes.
        """
        codes, token_scale = flatquant.quantize_tokens(
            kronecker.served(x, parts["left_trans"], parts["right_trans"]), parts["clip_ratio"]
        )
        total = codes @ parts["weight"].float().mT
        y = total * rounding.per_output(parts["weight_scale"].squeeze(-1)) * token_scale
        y = y.to(x.dtype)
        return y if bias is None else y + rounding.per_output(bias.to(x.dtype))
