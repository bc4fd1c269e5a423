"""Scales of channels in the form in which they are folded into weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LIMIT = 13  # scales stay within 2^-13 .. 2^13


def as_scales(exponent: Tensor, amax: Tensor, largest: float, *, powers: bool) -> Tensor:
    """2^exponent, float32 [channels]; 1 where the exponent is 0.

    exponent: float64 [channels]. amax: max |w| of the columns that read each channel, float32. largest:
    the largest number of their dtype: no weight may overflow if it is kept in float16.
    powers: only powers of two; else numbers of bfloat16, in which the last bits of a power are lost.
    """
    room = (math.log2(largest) - 1 - amax.log2()).floor()
    exponent = (exponent.round() if powers else exponent).clamp(-_LIMIT, _LIMIT)
    exponent = torch.where(exponent == 0, exponent, exponent.minimum(room))
    return exponent.exp2().to(torch.bfloat16).float()
