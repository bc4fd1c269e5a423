"""Weights in integer codes: how they are rounded, and how int4 finds its scales.

Int4 codes are -8..7, stored in int8. With so few of them, clipping matters: a scale of amax / 7 clips
nothing and spends most codes on few values; a smaller scale has less squared error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import rounding, tiles
from quantcli.schemes.base import Bias, Scheme

LARGEST, LEAST = 7.0, -8.0  # int4 codes
_RANGES = {"int4": (LEAST, LARGEST), "int8": (-128.0, 127.0)}
_COARSE = tuple(1 - 0.05 * step for step in range(13))  # of amax: 1 down to 0.4
_FINE = (-0.0375, -0.025, -0.0125, 0.0125, 0.025, 0.0375)
_REFINEMENTS = 2


class IntegerWeights(Scheme):
    """The option that schemes with integer weights share.

    With `gptq`, codes are chosen while the model is calibrated, against the very scales that `quantize`
    finds; it is then given them as the stat `codes`, int8 [n, k], and takes them as they are.
    """

    row_stats: ClassVar[frozenset[str]] = frozenset({"codes"})

    weight_rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="gptq: each column of a weight makes up for the errors of those before it, by how "
        "inputs go together; needs calibration data",
    )

    @property
    def rounded_by_data(self) -> bool:
        """If an option says so."""
        return self.weight_rounding == "gptq"

    @property
    def needs_data(self) -> bool:
        """Also if codes are chosen by data."""
        return self.rounded_by_data or super().needs_data

    @property
    def without_data(self) -> Scheme | str | None:
        """The same scheme, rounded to nearest, if nothing else needs data."""
        nearest = self.model_copy(update={"weight_rounding": "nearest"})
        return nearest if self.needs_data and not nearest.needs_data else super().without_data

    @property
    def code_range(self) -> tuple[float, float]:
        """The least and the largest code."""
        return _RANGES[self.numerics.weight.dtype]

    def blank(self, k: int, engine_dtype: torch.dtype) -> Stats:
        """Also `codes`, int8 [0, k], if data chooses them."""
        measured = super().blank(k, engine_dtype)
        codes = {"codes": torch.empty((0, k), dtype=torch.int8)}
        return {**measured, **codes} if self.rounded_by_data else measured

    def nearest(self, rows: Tensor, engine_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., n, k] rounded to nearest; their scales, float32, exact in `engine_dtype`.

        Here int8 with a scale per row, float32 [..., n, 1]: |error| <= scale / 2. NaN and Inf show in
        the scale.
        """
        scale = rounding.int8_scale(rows, engine_dtype)
        return rounding.to_int8(rows, scale), scale

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes int8 [..., n, k], weight_scale as `nearest` gives it."""
        codes, scale = self.nearest(rows, engine_dtype)
        return {"weight": chosen(constants, codes), "weight_scale": scale}


def chosen(constants: Stats, nearest: Tensor) -> Tensor:
    """The codes of some rows: the stat `codes`, int8 in the shape of `nearest`, or else `nearest`."""
    codes = constants.get("codes")
    return nearest if codes is None else codes.to(nearest.device)


class Int4Weights(IntegerWeights):
    """The options that int4 schemes share."""

    clip: Literal["mse", "none"] = Field(
        "mse", description="largest weight of a row: mse cuts it off where the squared error is least"
    )

    def nearest(self, rows: Tensor, engine_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., n, k] in -8..7; scale float32 [..., n, 1], exact in `engine_dtype`.

        With `none` no code is clipped and |error| <= scale / 2; with `mse` the squared error of a row
        is never larger than that. NaN and Inf show in the scale.
        """
        values = rows.float()
        scale = rounding.scale_of(rounding.absmax(rows), LARGEST, engine_dtype)
        if self.clip == "mse":
            scale = least_error(values, scale, engine_dtype)
        return self.rounded(values, scale), scale

    def rounded(self, values: Tensor, scale: Tensor) -> Tensor:
        """The codes int8 that are nearest to values [..., n, k], float32, for scales [..., n, 1]."""
        return _round(values, scale).to(torch.int8)


class Int4Groups(Int4Weights):
    """Int4 weights with a scale for each group of columns of a row, or for the whole row."""

    group_size: Literal[32, 64, 128, "channel"] = Field(
        128, description="columns of a row that share a scale; channel: all of them"
    )

    @classmethod
    def for_numerics(cls, numerics: Numerics) -> Self | None:
        """With the group_size that they have."""
        block = numerics.weight.block
        try:
            scheme = cls.model_validate({"group_size": block[1] if block else "channel"})
        except ValidationError:  # groups that no option makes
            return None
        return scheme if scheme.numerics == numerics else None

    @property
    def weights(self) -> Operand:
        """How weights are quantized."""
        if self.group_size == "channel":
            return Operand("int4", "channel")
        return Operand("int4", "group", block=(1, self.group_size))

    def nearest(self, rows: Tensor, engine_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., n, k] in -8..7; scale float32 [..., n, ceil(k / group_size)]."""
        if self.group_size == "channel":
            return super().nearest(rows, engine_dtype)
        codes, scale = super().nearest(tiles.cut(rows, self.group_size), engine_dtype)
        return codes.flatten(-2)[..., : rows.shape[-1]].contiguous(), scale.squeeze(-1)

    def dequantize(self, parts: Parts) -> Tensor:
        """Codes times the scales of their groups: float32 [..., n, k]."""
        codes = parts["weight"].float()
        if self.group_size == "channel":
            return codes * parts["weight_scale"]
        block = (1, self.group_size)
        return codes * tiles.spread(parts["weight_scale"], block, *codes.shape[-2:])


def _round(values: Tensor, scale: Tensor) -> Tensor:
    """round(values / scale), half to even, clipped to -8..7; float32."""
    return (values / scale).round_().clamp_(LEAST, LARGEST)


def _error(values: Tensor, scale: Tensor) -> Tensor:
    """Squared error of each row [..., n, 1]; infinite if it is NaN."""
    error = _round(values, scale).mul_(scale).sub_(values)
    total: Tensor = error.square_().sum(-1, keepdim=True)
    return total.nan_to_num_(torch.inf)


def least_error(values: Tensor, widest: Tensor, engine_dtype: torch.dtype) -> Tensor:
    """The scale of each row with the least squared error: a coarse grid, a finer one around its best,
    then s = sum(w q) / sum(q^2), the best scale for given codes, as long as it gets better.
    Each is tried as the number of `engine_dtype` that it becomes.

    Ties go to the wider scale, and `widest` is among them.
    """
    best, least = widest, _error(values, widest)
    share = torch.ones_like(widest)
    for step in _COARSE[1:]:
        error = _error(values, rounding.nearest(widest * step, engine_dtype))
        better = error < least
        least, share = torch.where(better, error, least), torch.where(better, step, share)
    best = rounding.nearest(widest * share, engine_dtype)
    for step in _FINE:
        scale = rounding.nearest(widest * (share + step), engine_dtype)
        error = _error(values, scale)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    for _ in range(_REFINEMENTS):
        codes = _round(values, best)
        square = codes.square().sum(-1, keepdim=True)
        scale = (values * codes).sum(-1, keepdim=True) / square
        scale = rounding.nearest(torch.where((square > 0) & (scale > 0), scale, best), engine_dtype)
        error = _error(values, scale)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


# Sums of float32 in another order: how far errors, and scales, may be apart relatively.
_OTHER_ERRORS, OTHER_SCALES = 2.0**-18, 2.0**-19


def least_elsewhere(values: Tensor, scale: Tensor, engine_dtype: torch.dtype) -> bool:
    """Whether `least_error` may find `scale` [1] for a row [k], float32, on a CPU that adds in another
    order.

    All choices between candidates are followed whose errors such a CPU may order the other way. What
    is not a sum is the same on every CPU.
    """
    widest = rounding.scale_of(rounding.absmax(values), LARGEST, engine_dtype)

    def error(candidate: Tensor) -> float:
        errors = _round(values, candidate).mul_(candidate).sub_(values)
        return float(errors.square_().sum(dtype=torch.float64))

    def least(shares: list[float]) -> Iterator[tuple[float, Tensor]]:
        candidates = [rounding.nearest(widest * share, engine_dtype) for share in shares]
        errors = [error(candidate) for candidate in candidates]
        bound = min(errors) * (1 + _OTHER_ERRORS)
        return ((s, c) for s, c, e in zip(shares, candidates, errors, strict=True) if e <= bound)

    def refined(best: Tensor, times: int) -> Iterator[Tensor]:
        codes = _round(values, best).double()
        square = codes.square().sum()
        if not times or not square:
            yield best
            return
        found = (values.double() * codes).sum() / square
        for nudge in (-OTHER_SCALES, 0, OTHER_SCALES):
            other = rounding.nearest((found * (1 + nudge)).float(), engine_dtype)
            if error(other) < error(best) * (1 + _OTHER_ERRORS):
                yield from refined(other.view(1), times - 1)
        yield from refined(best, times - 1) if error(other) >= error(best) * (1 - _OTHER_ERRORS) else ()

    return any(
        bool(torch.isclose(scale, candidate, rtol=OTHER_SCALES, atol=0))
        for share, _ in least(list(_COARSE))
        for _, best in least([share, *(share + step for step in _FINE)])
        for candidate in refined(best, _REFINEMENTS)
    )
