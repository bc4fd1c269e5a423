"""Scales of a cache of keys and values from what was seen, and the numbers that come out of it.

Keys [tokens, heads, width] of one layer are in units that share a scale: all of them, a head, or a
channel of a head. Values likewise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from quantcli.core.numerics import Cache, Stats
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.arithmetic.observers import Summary

ChosenBy: TypeAlias = Literal["minmax", "percentile", "mse"]
# The smallest scale, also of keys that were all zero: its reciprocal is a normal number of float32 and
# bfloat16, and of float16.
LEAST = {torch.float32: 2.0**-64, torch.bfloat16: 2.0**-64, torch.float16: 2.0**-14}
_STEPS, _WIDER, _NARROWER = 16, 1, 4  # scales per power of two that are tried, and how far around
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
_COARSE = 3  # bits of a mantissa that tell numbers apart if each channel has a scale


def units_of(x: Tensor, cache: Cache) -> Tensor:
    """Keys or values [tokens, heads, width] with a row for each unit: [units, numbers]."""
    if cache.per == "tensor":
        return x.reshape(1, -1)
    rows = x.transpose(0, 1).flatten(1) if cache.per == "head" else x.flatten(1).T
    return rows.contiguous()


class Magnitudes(Summary):
    """max |x| of each unit, and how often each |x| occurs, if `counted`.

    Numbers are counted as bfloat16 (float16 as it is); with a scale for each channel as those with
    fewer bits, whose middle then stands for all of them.
    """

    def __init__(self, cache: Cache, *, counted: bool) -> None:
        self._cache = cache
        self._counted = counted
        self._amax: Tensor | None = None
        self._counts: Tensor | None = None
        self._dtype = torch.bfloat16

    def of(self, x: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype] | None:
        """Of [tokens, heads, width]: max |x| float32 [units], counts int64 [units, magnitudes]."""
        rows = units_of(x, self._cache).cpu()
        amax = rounding.absmax(rows).squeeze(-1)
        if not bool(torch.isfinite(amax).all()):
            return None
        if not self._counted:
            return amax, None, rows.dtype
        dtype = torch.bfloat16 if rows.dtype == torch.float32 else rows.dtype
        drop = self._dropped(dtype)
        bits = (rows.to(dtype).view(torch.int16).int() & 0x7FFF) >> drop
        size = 2 ** (15 - drop)
        places = bits + size * torch.arange(len(rows), dtype=torch.int32).unsqueeze(-1)
        counts = torch.bincount(places.flatten(), minlength=size * len(rows)).view(len(rows), size)
        return amax, counts, dtype

    def _dropped(self, dtype: torch.dtype) -> int:
        """Bits of a mantissa that are not looked at."""
        return _MANTISSA[dtype] - _COARSE if self._cache.per == "channel" else 0

    def add(self, summary: tuple[Tensor, Tensor | None, torch.dtype], batch: int) -> None:
        """Take the larger ones, and add the counts."""
        amax, counts, dtype = summary
        self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)
        if counts is not None:
            self._counts = counts if self._counts is None else self._counts + counts
            self._dtype = dtype

    def added(self) -> Iterator[tuple[tuple[Tensor, Tensor | None, torch.dtype], int]]:
        """All, as if of one batch."""
        if self._amax is not None:
            yield (self._amax, self._counts, self._dtype), 0

    def stats(self) -> Stats:
        """`amax`, float32 [units]."""
        return {"amax": self.amax}

    @property
    def amax(self) -> Tensor:
        """max |x| of each unit, float32 [units]; [0] if nothing was seen."""
        return torch.zeros(0) if self._amax is None else self._amax

    def scales(self, chosen_by: ChosenBy, percent: float, engine_dtype: torch.dtype) -> Tensor:
        """The scale of each unit, float32 [units], numbers of `engine_dtype`.

        minmax: clips nothing. percentile: `percent` % of the numbers are in the range, the others are
        clipped. mse: of scales around that of minmax the one with the least squared error.
        """
        if chosen_by == "minmax" or self._counts is None:
            return scales_of(self.amax, self._cache, engine_dtype)
        if chosen_by == "percentile":
            values = self._values(1).squeeze(-1)
            below = self._counts.cumsum(-1).double() / self._counts.sum(-1, keepdim=True)
            place = (below >= percent / 100).int().argmax(-1)
            amax = values[place].minimum(self.amax)
            return scales_of(torch.where(amax > 0, amax, self.amax), self._cache, engine_dtype)
        values = self._values(2 ** self._dropped(torch.bfloat16))
        return torch.stack([
            _least_error(values, counts, amax, self._cache, engine_dtype)
            for counts, amax in zip(self._counts, self.amax, strict=True)
        ])  # fmt: skip

    def _values(self, each: int) -> Tensor:
        """Numbers that a count is of, evenly chosen: float32 [magnitudes, each]."""
        drop = self._dropped(self._dtype)
        bits = torch.arange(2 ** (15 - drop), dtype=torch.int32).unsqueeze(-1) << drop
        step = 2**drop // each
        inner = bits + step // 2 + step * torch.arange(each, dtype=torch.int32)
        values: Tensor = inner.to(torch.int16).view(self._dtype).float()
        return values


def scales_of(amax: Tensor, cache: Cache, engine_dtype: torch.dtype) -> Tensor:
    """Scales that clip nothing up to `amax`, float32, in its shape: numbers of `engine_dtype`."""
    scale = rounding.scale_of(amax, cache.element.largest, engine_dtype)
    return scale.clamp_min(LEAST[engine_dtype])


def _least_error(
    values: Tensor, counts: Tensor, amax: Tensor, cache: Cache, engine_dtype: torch.dtype
) -> Tensor:
    """The scale of a unit with the least squared error, float32; that of minmax if it is as good."""
    seen = counts.nonzero().squeeze(-1)
    whole = scales_of(amax, cache, engine_dtype)
    weight = counts[seen].double().repeat_interleave(values.shape[-1])
    values = values[seen].flatten().minimum(amax)
    best, least = whole, math.inf
    order = sorted(range(-_NARROWER * _STEPS, _WIDER * _STEPS + 1), key=lambda step: (step != 0, -step))
    for step in order:
        scale = (whole * 2.0 ** (step / _STEPS)).to(engine_dtype).float().clamp_min(LEAST[engine_dtype])
        error = (rounded(values, scale, cache) - values).double()
        loss = float(torch.dot(error.square(), weight))
        if loss < least:
            best, least = scale, loss
    return best


def absorbed_amax(queries: Tensor, weight: Tensor, heads: int, plain: int) -> Tensor:
    """max |q W| of each head, float32 [heads]: the queries that are multiplied with latents.

    queries: [tokens, heads * (plain + rotated)], of each head the plain part first. weight: of
    kv_b_proj, [heads * (plain + values), rank], whose rows for keys are the first of each head.
    """
    q = queries.reshape(len(queries), heads, -1)[..., :plain]
    w = weight.reshape(heads, -1, weight.shape[-1])[:, :plain]
    return torch.stack([(q[:, h].float() @ w[h].float()).abs().amax() for h in range(heads)])


def paired(scale: Tensor, heads: int, rotated: int) -> Tensor:
    """Scales of the channels of keys [heads * width], those that are rotated into each other alike.

    Channels d and d + rotated / 2 of a head are a pair, for d < rotated / 2; both get the larger scale,
    as a later position turns one into the other.
    """
    paired = scale.view(heads, -1).clone()
    half = rotated // 2
    first, second = paired[:, :half], paired[:, half : 2 * half]
    larger = torch.maximum(first, second)
    paired[:, :half], paired[:, half : 2 * half] = larger, larger
    return paired.flatten()


def rounded(x: Tensor, scale: Tensor, cache: Cache) -> Tensor:
    """Numbers as they come out of the cache; x and scale broadcast.

    fp8: in float32, codes of x / scale, clamped before the cast. int8: in the dtype of the scale, which
    the engine serves in, codes of x * (1 / scale). The result is in the dtype of x.
    Sources: vllm 0.32.0, csrc/quantization (fp8_e4m3 scaled_convert); vllm-ascend 182b75ea84,
    attention/attention_v1.py:1918-1919,1970-1996.
    """
    limit = cache.element.largest
    if cache.element.family == "float":
        codes = (x.float() / scale.float()).clamp(-limit, limit).to(torch.float8_e4m3fn).float()
        return (codes * scale.float()).to(x.dtype)
    served = x.to(scale.dtype)
    codes = (served * (1 / scale)).round().clamp(cache.element.least, limit)
    return (codes * scale).to(x.dtype)
