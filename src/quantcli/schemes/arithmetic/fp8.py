"""Inputs in fp8 (e4m3) as vLLM quantizes them, and scales that span a whole weight."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.core.number_types import ELEMENTS
from quantcli.schemes.arithmetic import rounding, tiles

# Of inputs: the smallest dynamic scale in vLLM (`_FP8_MIN_SCALING_FACTOR`).
_LEAST_INPUT = ELEMENTS["fp8_e4m3"].step / rounding.FP8_E4M3_MAX
# Of a whole weight: vLLM dequantizes such weights to float16 while it loads them, and quantizes them
# again. From 2^-15 on every code survives that; below, small codes fall together in float16.
_LEAST_WEIGHT = 2.0**-15


def tensor_scale(amax: Tensor, engine_dtype: torch.dtype) -> Tensor:
    """The scale of a whole weight from its largest value: float32 [1]; NaN and Inf come through."""
    return rounding.scale_of(amax, rounding.FP8_E4M3_MAX, engine_dtype).clamp_min(_LEAST_WEIGHT)


def static_codes(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., k] with a given scale [1] -> codes as float32 [..., k].

    Multiplied by the reciprocal in float32 and clamped, as `static_scaled_fp8_quant` does it.
    """
    return _codes(x.float() * (1 / scale.float()))


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., k] -> codes as float32 [..., k], scale of each token float32 [..., 1] (`QuantFP8`)."""
    values = x.float()
    amax = values.abs().amax(-1, keepdim=True)
    scale = (amax / rounding.FP8_E4M3_MAX).clamp_min(_LEAST_INPUT)
    return _codes(values * (1 / scale)), scale


def npu_token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `npu_dynamic_quant` makes them: no smallest scale, and multiplied by 448 / amax."""
    scaled, scale = rounding.scale_tokens(x, rounding.FP8_E4M3_MAX)
    return _codes(scaled), scale


def group_codes(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """x [..., k] -> codes as float32 [..., k], scales float32 [..., ceil(k / columns)].

    One scale for a token's values in `columns` columns; here the engine divides (`QuantFP8`).
    """
    groups = tiles.cut(x.float(), columns)
    amax = groups.abs().amax(-1, keepdim=True)
    scale = (amax / rounding.FP8_E4M3_MAX).clamp_min(_LEAST_INPUT)
    return _codes(groups / scale).flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def _codes(scaled: Tensor) -> Tensor:
    """Clamped before the cast: values over 448 would be NaN."""
    limit = rounding.FP8_E4M3_MAX
    return scaled.clamp(-limit, limit).to(torch.float8_e4m3fn).float()
