"""Which scale and offset represent the inputs of a module in int8, from their range or distribution.

x ~ (xq - offset) / r with xq = clamp(rint(x r + offset), -128, 127) and r = multiplier(scale). A scale
is always a number of the dtype in which the engine holds it, judged by what the engine makes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantcli.core.numerics import multiplier
from quantcli.schemes.arithmetic.rounding import BITS

# The smallest scale, also of a module whose inputs were all zero: a normal number with a finite
# reciprocal, small enough for any real input, and large enough that its product with a weight's scale
# is a normal float32.
_SMALLEST = {torch.bfloat16: 2.0**-64, torch.float32: 2.0**-64, torch.float16: 2.0**-14}
# Steps of a dtype between scales that are tried. Of float32 only numbers of 16 bits: engines that hold
# scales in it find scale and offset again from the ends of the range, s (127 - o) and s (-128 - o), and
# cut the fraction of the offset off. These products are exact then; else every tenth offset is lost.
_STEP = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2**8}
_NARROWEST = 0.25  # of the range, at either end, in one round
_COARSE = 0.05  # step over the narrowed ranges, as a fraction of the whole
_FINE = (0.0125, 0.003)  # steps around the best so far, three to either side
_ULPS = 8  # scales on either side of the best that are tried in the end
_CHUNK = 2**16  # values times candidates that are looked at together: temporaries of 512 KB

_Best = tuple[float, float, float, float, float]  # loss, -scale, offset, share of low, share of high


def of_range(
    low: float, high: float, engine_dtype: torch.dtype, *, symmetric: bool
) -> tuple[float, float]:
    """Scale and offset that represent [low, high], which includes 0, in 255 steps.

    engine_dtype: in which the engine holds the scale. Symmetric: 127 steps to either side, offset 0.
    """
    scale, offset = _fit(np.array([low]), np.array([high]), engine_dtype, symmetric)
    return float(scale[0]), float(offset[0])


def of_distribution(
    values: Tensor, counts: Tensor, engine_dtype: torch.dtype, *, symmetric: bool
) -> tuple[float, float]:
    """Scale and offset with the least squared error over all values; ties go to the wider range.

    values: ascending float32 [v]; counts: int64 [v]. Ranges are tried coarsely, then finely around the
    best, at last the neighbours of its scale and offset. The whole range is among them, so that no
    result is worse than `of_range` of the extremes.
    """
    low = min(0.0, float(values[0])) if len(values) else 0.0
    high = max(0.0, float(values[-1])) if len(values) else 0.0
    if low == high:
        return of_range(low, high, engine_dtype, symmetric=symmetric)
    search = _Search(values.numpy(), counts.numpy().astype(np.float64), engine_dtype, symmetric)
    best = search.best(low, high)
    while min(best[3:]) <= _NARROWEST:  # a few huge values: narrower still may be better
        low *= best[3] if best[3] <= _NARROWEST else 1
        high *= best[4] if best[4] <= _NARROWEST else 1
        narrower = search.best(low, high)
        if narrower[0] >= best[0]:
            break
        best = narrower
    return -best[1], best[2]


@dataclass(frozen=True)
class _Search:
    """A search for scale and offset. values: ascending float32 [v]; weights: float64 [v]."""

    values: np.ndarray
    weights: np.ndarray
    engine_dtype: torch.dtype
    symmetric: bool

    def best(self, low: float, high: float) -> _Best:
        """The least loss over ranges from a quarter of [low, high] up to the whole."""
        axis = np.arange(1, _NARROWEST - _COARSE / 2, -_COARSE)
        axes = axis, axis
        best: _Best = (math.inf, 0.0, 0.0, 1.0, 1.0)
        for step in (*_FINE, 0.0):
            below, above = self._pairs(*axes, low, high)
            scale, offset = _fit(low * below, high * above, self.engine_dtype, self.symmetric)
            best = min(best, self._least(scale, offset, below, above))
            around = step * np.arange(-3, 4)
            below, above = (np.clip(centre + around, _NARROWEST, 1) for centre in best[3:])
            axes = below, above
        scale, offset = self._neighbours(-best[1], best[2])
        polished = self._least(scale, offset, np.ones_like(scale), np.ones_like(scale))
        return min(best, (*polished[:3], *best[3:]))

    def _pairs(
        self, below: np.ndarray, above: np.ndarray, low: float, high: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shares of both ends to try together; only one if an end is 0, or the range symmetric."""
        if self.symmetric:
            return below, below
        shares = np.meshgrid(below if low else np.ones(1), above if high else np.ones(1))
        return shares[0].ravel(), shares[1].ravel()

    def _neighbours(self, scale: float, offset: float) -> tuple[np.ndarray, np.ndarray]:
        """The scales next to `scale` in the engine dtype, each with the offsets next to `offset`."""
        engine_dtype, integer = self.engine_dtype, BITS[self.engine_dtype]
        bits = torch.tensor([scale]).to(engine_dtype).view(integer)
        near = bits + _STEP[engine_dtype] * torch.arange(-_ULPS, _ULPS + 1, dtype=integer)
        least, largest = _SMALLEST[engine_dtype], torch.finfo(engine_dtype).max
        scales = near.view(engine_dtype).float().clamp(least, largest).numpy()
        offsets = np.zeros(1) if self.symmetric else np.clip(offset + np.arange(-1, 2), -128, 127)
        pairs = np.meshgrid(scales, offsets.astype(np.float32))
        return pairs[0].ravel(), pairs[1].ravel()

    def _least(
        self, scale: np.ndarray, offset: np.ndarray, below: np.ndarray, above: np.ndarray
    ) -> _Best:
        """The best of some candidates."""
        losses = squared_error(self.values, self.weights, scale, offset, self.engine_dtype)
        columns = (losses, -scale, offset, below, above)
        return min(zip(*(column.tolist() for column in columns), strict=True))


def _fit(
    low: np.ndarray, high: np.ndarray, engine_dtype: torch.dtype, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of each range: float32 arrays, the scales representable in `engine_dtype`."""
    exact = np.maximum(-low, high) / 127 if symmetric else (high - low) / 255
    exact = np.clip(exact, _SMALLEST[engine_dtype], torch.finfo(engine_dtype).max)
    scale = _cast(torch.from_numpy(exact), engine_dtype).numpy()
    offset = np.zeros_like(low) if symmetric else np.clip(np.rint(-128 - low / scale), -128, 127)
    return scale, offset.astype(np.float32)


def _cast(exact: Tensor, engine_dtype: torch.dtype) -> Tensor:
    """The nearest scale that is tried: float64 -> float32."""
    nearest, step = exact.to(engine_dtype), _STEP[engine_dtype]
    bits = (nearest.view(BITS[engine_dtype]) + step // 2) & -step
    return bits.view(engine_dtype).float()


def squared_error(
    values: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    engine_dtype: torch.dtype,
) -> np.ndarray:
    """sum over values of weight * (v - (xq - offset) / r)^2 for each candidate: float64 [c].

    values: float32 [v]; weights: float64 [v]; scale, offset: float32 [c]. The engine has two ways to
    xq: its quantize kernel multiplies by r, the one that is fused with a norm divides by the scale;
    both are scaled back by 1 / r. Their errors are added, which favours scales for which they agree.
    Codes in float32 as the engine makes them, sums in float64.
    """
    r = multiplier(torch.from_numpy(scale).to(engine_dtype)).numpy()
    exact = values.astype(np.float64)
    losses = np.empty(len(scale))
    step = max(1, _CHUNK // len(values))
    for start in range(0, len(scale), step):
        part = slice(start, start + step)
        losses[part] = 0
        for codes in (values * r[part, None], values / scale[part, None]):
            codes += offset[part, None]
            np.rint(codes, out=codes)
            np.clip(codes, -128, 127, out=codes)
            codes -= offset[part, None]
            error = codes.astype(np.float64)
            error /= r[part, None]
            error -= exact
            error *= error
            error *= weights
            losses[part] += error.sum(axis=1)
    return losses
