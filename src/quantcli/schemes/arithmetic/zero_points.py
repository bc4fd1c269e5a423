"""Int4 weights with a zero point for each group of columns: ranges that need not be symmetric about 0.

Codes q of -8..7 stand for (q - zero) * scale. A range contains 0, so that 0 is one of the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.core.kernels import REFINEMENTS
from quantcli.core.kernels import tensors as kernels
from quantcli.core.number_types import ELEMENTS
from quantcli.schemes.arithmetic import clipping, rounding

_INT4 = ELEMENTS["int4"]
_STEPS = _INT4.largest - _INT4.least
# shares of the range that are tried at both ends alike; 1, all of it, is the first
_COARSE = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 1.05)
# steps at the upper end and at the lower one around the best of these
_FINE = ((-0.12, 0.0), (0.0, -0.12), (-0.06, 0.0), (0.0, -0.06), (0.06, 0.0), (0.0, 0.06))


def search(rows: Tensor, engine_dtype: torch.dtype, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row: float [..., k] -> float32 [..., 1], exact in `engine_dtype`,
    and int8 [..., 1] in -8..7.

    Without `importance` those of the whole range: scale = (high - low) / 15, rounded to `engine_dtype`
    first, and zero = -8 - low / scale. With it, float32, which broadcasts against rows, those with the
    least weighted squared error among some: shares of the range, smaller ones at either end, each with
    the scale that is best for its codes, refined as in `clipping.least_error`; never worse than the
    whole range. NaN and Inf show in the scale.
    """
    ends = kernels.extremes(rows)
    if ends is None:
        values = rows.float()
        ends = values.amax(-1, keepdim=True), values.neg().amax(-1, keepdim=True)
        ends = ends[0].clamp_min(0), ends[1].clamp_min(0)
    floor = rounding.FLOOR[engine_dtype]
    compiled = kernels.least_error_shifted(
        rows, ends, engine_dtype, floor, (_COARSE, _FINE), importance
    )
    if compiled is not None:
        return compiled
    above, below = ends
    values = rows.float()
    weights = torch.ones(1, device=rows.device) if importance is None else importance

    def of_range(upper: Tensor | float, lower: Tensor | float) -> tuple[Tensor, Tensor]:
        """Scale and zero point for shares of either end."""
        scale = rounding.nearest((above * upper + below * lower) / _STEPS, engine_dtype)
        zero = (below * lower / scale + _INT4.least).round_()
        return scale, zero.clamp_(_INT4.least, _INT4.largest).nan_to_num_(0.0)

    def rounded(scale: Tensor, zero: Tensor) -> Tensor:
        codes = (values * (1 / scale)).round_()
        return torch.minimum(torch.maximum(codes, _INT4.least - zero), _INT4.largest - zero)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        """[..., 1]; infinite if it is NaN."""
        squares = rounded(scale, zero).mul_(scale).sub_(values).square_().mul_(weights)
        return clipping.total(squares, torch.float32).nan_to_num_(torch.inf, torch.inf)

    def fitted(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The best scale for the codes of `scale`, not rounded, and how much it explains."""
        codes = rounded(scale, zero)
        weighted = codes * weights
        square = clipping.total(codes * weighted, torch.float32)
        mixed = clipping.total(values * weighted, torch.float32)
        best, sound = mixed / square, (square > 0) & (mixed > 0)
        return torch.where(sound, best, scale), torch.where(sound, best * mixed, 0)

    whole, origin = of_range(1.0, 1.0)
    if importance is None:
        return whole, origin.to(torch.int8)
    (scale, most), zero = fitted(whole, origin), origin
    share = torch.ones_like(whole)
    for step in _COARSE[1:]:
        tried, place = of_range(step, step)
        found, explained = fitted(tried, place)
        better = explained > most
        scale, most = torch.where(better, found, scale), torch.where(better, explained, most)
        zero, share = torch.where(better, place, zero), torch.where(better, step, share)
    for upper, lower in _FINE:
        tried, place = of_range(share + upper, share + lower)
        found, explained = fitted(tried, place)
        better = explained > most
        scale, most = torch.where(better, found, scale), torch.where(better, explained, most)
        zero = torch.where(better, place, zero)
    best, best_zero, lowest = whole, origin, error(whole, origin)
    for again in range(REFINEMENTS):
        if again:
            scale, _ = fitted(scale, zero)
        scale = rounding.nearest(scale, engine_dtype)
        left = error(scale, zero)
        better = left < lowest
        best, lowest = torch.where(better, scale, best), torch.where(better, left, lowest)
        best_zero = torch.where(better, zero, best_zero)
    return best, best_zero.to(torch.int8)


def codes(rows: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest codes for scales and zero points [..., 1]: float [..., k] -> int8 [..., k]."""
    compiled = kernels.encode_shifted(rows, scale, zero)
    if compiled is not None:
        return compiled
    quotients = (rows.float() / scale).round_()
    shift = zero.float()
    clipped = torch.minimum(torch.maximum(quotients, _INT4.least - shift), _INT4.largest - shift)
    return (clipped + shift).to(torch.int8)
