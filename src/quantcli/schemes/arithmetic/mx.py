"""Inputs in blocks of 32 columns with powers of two as scales, as engines quantize them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.core.numerics import Parts
from quantcli.schemes.arithmetic import fp4, rounding, tiles

SIDE = 32
_SCALES = torch.float8_e8m0fnu
_EXPONENT = 0x7F800000  # the bits of a float32's exponent
_HALF_STEP = 0x200000  # of e2m1, in the bits of a float32: numbers from 1.75 on round up to 2


def _rounds_down(parts: Parts) -> bool:
    """Whether the engine rounds scales of inputs down: a part `input_scale_alg` is 0."""
    return "input_scale_alg" in parts and not bool(parts["input_scale_alg"])


def fp8_inputs(x: Tensor, parts: Parts) -> Tensor:
    """Inputs [..., k] rounded to e4m3, float32 [..., k].

    Scales are rounded up, so that nothing is clipped: 2^ceil(log2(amax / 448)). Down to
    2^(floor(log2 amax) - 8), which clips, if a part `input_scale_alg` is 0. Sources: vllm 0.32.0,
    model_executor/layers/quantization/utils/mxfp8_utils.py:44-74; vllm-ascend 182b75ea84,
    quantization/methods/w8a8_mxfp8.py:95-113, and ops-nn e5c3fa93, quant/dynamic_mx_quant/docs/
    aclnnDynamicMxQuantV2.md:31-49, for both values of scale_alg.
    """
    groups = tiles.cut(x.float(), SIDE)
    amax = groups.abs().amax(-1, keepdim=True)
    if _rounds_down(parts):
        scale = rounded_down(amax, 2**8)
    else:
        scale = rounding.scale_of(amax, rounding.FP8_E4M3_MAX, _SCALES)
    codes = rounding.to_fp8_e4m3(groups, scale, clip=True).float()
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]


def fp4_inputs(x: Tensor, parts: Parts) -> Tensor:
    """Inputs [..., k] rounded to e2m1, float32 [..., k].

    The largest input of a block is rounded to a step of e2m1, and its power of two over 4 is the scale:
    it is at 3.5 to 7 steps, and clipped to 6. With a part `input_scale_alg` of 0 it is not rounded
    first, so that it is at 4 to 8, and halfway numbers are rounded away from zero, not to even codes.
    Sources: vllm 0.32.0, model_executor/layers/quantization/utils/mxfp4_utils.py:176-184,213-246;
    vllm-ascend 182b75ea84, quantization/methods/w4a4_mxfp4.py:86-110 (`round_mode="round"`).
    """
    groups = tiles.cut(x.float(), SIDE)
    amax = groups.abs().amax(-1, keepdim=True)
    down = _rounds_down(parts)
    if not down:
        amax = (amax.view(torch.int32) + _HALF_STEP).view(torch.float32)
    scale = rounded_down(amax, 4)
    codes = (fp4.nearest_away if down else fp4.nearest)(groups / scale)
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]


def rounded_down(amax: Tensor, largest: float) -> Tensor:
    """The power of two below each largest input, over that below the largest code, as a scale: float32
    in the shape of `amax`, float32 and not negative; at least 2^-127."""
    power = (amax.view(torch.int32) & _EXPONENT).view(torch.float32)
    return rounding.nearest(power / largest, _SCALES)
