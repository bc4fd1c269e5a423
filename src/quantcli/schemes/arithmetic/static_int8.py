"""Int8 inputs with one scale and one offset per module, measured beforehand.

The engine's arithmetic (`npu_quantize`, then `npu_quant_matmul`), with r = multiplier(input_scale):

    xq = clamp(rint(f32(x) r + input_offset), -128, 127)
    y  = f32(sum_k xq wq + quant_bias) * deq_scale

So x ~ (xq - input_offset) / r, and with a weight ~ wq * weight_scale

    deq_scale  = weight_scale / r
    quant_bias = rint(bias / deq_scale - input_offset * sum_k wq)

All of it from 1 / r and not from input_scale, which differs in bfloat16 by up to 0.4 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.core.numerics import Parts, Stats, multiplier

# quant_bias is int32. What the bias adds stays below 2^30; what the offset adds is at most
# 128 * 127 * 65535, just below 2^30, for the 65535 columns that the engine's matmul takes.
_BIAS_STEPS = 2.0**30

_TINY = torch.finfo(torch.float32).tiny

# With float16 the hardware honours the top 19 bits of deq_scale: sign, exponent, 10 of the mantissa.
_IGNORED_BITS = 13

# With bfloat16 it honours all. Where deq_scale is all that says the weight's scale, its last bits stay
# zero: its product with r, of 8 bits, is then exact in float32, and weight_scale tells deq_scale.
_SPARE_BITS = 8


def to_codes(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Inputs as the engine quantizes them: x [..., k] in any float dtype -> codes as float32 [..., k].

    scale: [1] in the serving dtype; offset: float32 [1]. Multiply and add are rounded one by one.
    """
    return (x.float() * multiplier(scale) + offset).round_().clamp_(-128, 127)


def least_deq_scale(r: Tensor, bias: Tensor | None) -> Tensor:
    """The smallest deq_scale that a row may have: float32 [..., n, 1], or [1] without a bias.

    |bias| / deq_scale fits quant_bias, and neither deq_scale nor deq_scale * r is below the smallest
    normal number: for a row of zeros, and for one that is tiny compared with its bias. Other rows never
    reach it. NaN and Inf in a bias come through.
    """
    least = _TINY * (1 / r).clamp_min(1)
    if bias is None:
        return least
    return torch.maximum(least, bias.float().abs().unsqueeze(-1) / _BIAS_STEPS)


def deq_grid(value: Tensor, serving: torch.dtype, *, up: bool) -> Tensor:
    """deq_scale as the hardware honours it: the nearest such float32.

    With `up` none below `value`, and with bfloat16 one of 16 bits, whose product with r is exact.
    value: positive float32; NaN and Inf come through.
    """
    left = _IGNORED_BITS if serving == torch.float16 else _SPARE_BITS
    if serving == torch.float32 or (serving == torch.bfloat16 and not up):
        return value
    bits = value.view(torch.int32)
    add = 2**left - 1 if up else 2 ** (left - 1)
    return torch.where(torch.isfinite(value), _cut(bits + add, left), value)


def honoured(deq: Tensor) -> Tensor:
    """Without the bits that the hardware ignores: the mask 0xFFFFE000."""
    return _cut(deq.view(torch.int32), _IGNORED_BITS)


def _cut(bits: Tensor, left: int) -> Tensor:
    kept: Tensor = bits & -(2**left)
    return kept.view(torch.float32)


def row_parts(codes: Tensor, deq: Tensor, bias: Tensor | None, constants: Stats) -> Parts:
    """The parts that the static matmul needs in addition to the codes, and the constants.

    codes: int8 [..., n, k], at most 65535 columns; deq: float32 [..., n, 1]; bias: [..., n]. Returns
    deq_scale float32 [..., n], quant_bias int32 [..., n] (from an exact sum, in float64), input_scale,
    input_offset.
    """
    deq = deq.squeeze(-1)
    offset = constants["input_offset"].to(codes.device).double()
    total = -offset * codes.sum(-1, dtype=torch.int32).double()
    if bias is not None:
        total = total + bias.double() / deq.double()
    shared = {name: constants[name].to(codes.device) for name in ("input_scale", "input_offset")}
    return {"deq_scale": deq, "quant_bias": total.round().to(torch.int32), **shared}
