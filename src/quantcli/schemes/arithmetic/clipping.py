"""The scales with the least squared error: where the largest weights of a row or group are cut off.

The error of each weight counts as much as its column: by its inputs' mean square if calibration has
measured it, as the error of an output is sum_j d_j x_j; else by what the weight itself tells of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.core.number_types import ELEMENTS, ElementType
from quantcli.schemes.arithmetic import rounding, tiles

_REFINEMENTS = 2


@dataclass(frozen=True)
class Codes:
    """The numbers that weights are rounded to, and the scales to try.

    round:  values and scales, float32 -> codes, float32, clipped.
    coarse: shares of the widest scale; 1, that scale itself, is the first.
    fine:   steps around the best of them.
    sums:   the dtype in which errors are summed. In float64 the order of a CPU's sums hardly matters;
            for int4, which needs no data, the search would take half as long again.
    """

    round: Callable[[Tensor, Tensor], Tensor]
    coarse: tuple[float, ...]
    fine: tuple[float, ...]
    sums: torch.dtype = torch.float64


def _integers(element: ElementType) -> Callable[[Tensor, Tensor], Tensor]:
    """round(values / scale), half to even, clipped to the numbers of the type."""
    least, largest = element.least, element.largest
    return lambda values, scale: (values / scale).round_().clamp_(least, largest)


_INT4 = ELEMENTS["int4"]
INT4_REACH = 7 + 63 / 128  # the largest w / scale that still rounds to 7
INT4 = Codes(
    _integers(_INT4),
    coarse=(1.0, 1.1, *(0.92 - 0.08 * step for step in range(7))),
    fine=(-0.04, 0.04),
    sums=torch.float32,
)
INT8 = Codes(
    _integers(ELEMENTS["int8"]),
    # no further: steps of 8 bits are small, and a weight that is off by a tenth looks like damage
    coarse=tuple(1 - 0.01 * step for step in range(8)),
    fine=(-0.005, 0.005),
)


def _fp8(values: Tensor, scale: Tensor) -> Tensor:
    return rounding.to_fp8_e4m3(values, scale, clip=True).float()


# Steps of fp8 double at powers of two: between two of them, a wider scale may fit the weights better.
FP8 = Codes(_fp8, coarse=(1.0, *(2 ** (step / 8) for step in range(1, 8)), 0.96, 0.92), fine=())


def by_columns(amax: Tensor) -> Tensor:
    """How much columns count if their inputs are not known: float32 [k], from max |w| of each.

    Its fourth power. A trained model has its largest weights in the columns of its largest inputs, and
    clipping takes from these first: with all columns alike, a clip of the least squared error makes a
    worse model than none. `benchmarks/pretrained.py` has chosen the power.
    """
    return (amax / amax.amax().clamp_min(torch.finfo(torch.float32).tiny)).square().square()


def in_groups(importance: Tensor, columns: int | None) -> Tensor:
    """[k] -> [ceil(k / columns), columns], at most 1 in each group; None: [k], all one group."""
    return _relative(importance if columns is None else tiles.cut(importance, columns))


def _relative(importance: Tensor) -> Tensor:
    """Over the largest of a group; all 1 if there is none."""
    largest = importance.amax(-1, keepdim=True)
    return torch.where(largest > 0, importance / largest, 1.0)


def facing_down(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [..., k] times -1 if the largest of a row is positive, and that sign, float32 [..., 1].

    Codes reach one step further below zero: with the largest value at -8, steps are 1/8 smaller.
    """
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    sign = torch.where(high > -low, -1.0, 1.0)
    return values * sign, sign


def widest_int4(down: Tensor, amax: Tensor, engine_dtype: torch.dtype) -> Tensor:
    """The smallest scale that clips nothing of `down`, as `facing_down` gives it: float32 [..., 1]."""
    above = down.amax(-1, keepdim=True) / INT4_REACH
    return rounding.scale_of(amax, -_INT4.least, engine_dtype, above)


def least_error(
    values: Tensor, widest: Tensor, engine_dtype: torch.dtype, codes: Codes, importance: Tensor | None
) -> Tensor:
    """The scale of each row with the least squared error: a coarse grid, a finer one around its best,
    then s = sum(h w q) / sum(h q^2), the best scale for given codes, as long as it gets better.
    Each is tried as the number of `engine_dtype` that it becomes.

    values: float32 [..., k]; widest: positive [..., 1]; importance: the h of each column, which
    broadcasts against values. Ties go to the earlier, and `widest` is the first.
    """

    def error(scale: Tensor) -> Tensor:
        """[..., 1]; infinite if it is NaN."""
        squares = codes.round(values, scale).mul_(scale).sub_(values).square_()
        if importance is not None:
            squares.mul_(importance)
        total: Tensor = squares.sum(-1, keepdim=True, dtype=codes.sums)
        return total.nan_to_num_(torch.inf)

    best, least = widest, error(widest)
    share = torch.ones_like(widest)
    for step in codes.coarse[1:]:
        found = error(rounding.nearest(widest * step, engine_dtype))
        better = found < least
        least, share = torch.where(better, found, least), torch.where(better, step, share)
    best = torch.where(share == 1, widest, rounding.nearest(widest * share, engine_dtype))
    for step in codes.fine:
        scale = rounding.nearest(widest * (share + step), engine_dtype)
        found = error(scale)
        better = found < least
        least, best = torch.where(better, found, least), torch.where(better, scale, best)
    for _ in range(_REFINEMENTS):
        scale = _refined(values, best, engine_dtype, codes, importance)
        found = error(scale)
        better = found < least
        least, best = torch.where(better, found, least), torch.where(better, scale, best)
    return best


def _refined(
    values: Tensor, scale: Tensor, engine_dtype: torch.dtype, codes: Codes, importance: Tensor | None
) -> Tensor:
    """The best scale for the codes of `scale`; `scale` itself if all of them are 0."""
    rounded = codes.round(values, scale)
    weighted = rounded if importance is None else rounded * importance
    square = (rounded * weighted).sum(-1, keepdim=True, dtype=codes.sums)
    found = ((values * weighted).sum(-1, keepdim=True, dtype=codes.sums) / square).float()
    return rounding.nearest(torch.where((square > 0) & (found > 0), found, scale), engine_dtype)


# Sums of float32 in another order: how far errors, and scales, may be apart relatively.
_OTHER_ERRORS, OTHER_SCALES = 2.0**-18, 2.0**-19


def least_elsewhere(
    values: Tensor,
    widest: Tensor,
    scale: Tensor,
    engine_dtype: torch.dtype,
    codes: Codes,
    importance: Tensor,
) -> bool:
    """Whether `least_error` may find `scale` [1] for a row [k], float32, on a CPU that adds in another
    order. importance: [k].

    All choices between candidates are followed whose errors such a CPU may order the other way. What
    is not a sum is the same on every CPU.
    """

    def error(candidate: Tensor) -> float:
        errors = codes.round(values, candidate).mul_(candidate).sub_(values).square_()
        return float(errors.mul_(importance).sum(dtype=torch.float64))

    def least(shares: list[float]) -> Iterator[tuple[float, Tensor]]:
        candidates = [
            widest if share == 1 else rounding.nearest(widest * share, engine_dtype) for share in shares
        ]
        errors = [error(candidate) for candidate in candidates]
        bound = min(errors) * (1 + _OTHER_ERRORS)
        return ((s, c) for s, c, e in zip(shares, candidates, errors, strict=True) if e <= bound)

    def refined(best: Tensor, times: int) -> Iterator[Tensor]:
        rounded = codes.round(values, best).double()
        weighted = rounded * importance
        square = (rounded * weighted).sum()
        if not times or not square:
            yield best
            return
        found = (values.double() * weighted).sum() / square
        for nudge in (-OTHER_SCALES, 0, OTHER_SCALES):
            other = rounding.nearest((found * (1 + nudge)).float(), engine_dtype)
            if error(other) < error(best) * (1 + _OTHER_ERRORS):
                yield from refined(other.view(1), times - 1)
        yield from refined(best, times - 1) if error(other) >= error(best) * (1 - _OTHER_ERRORS) else ()

    return any(
        bool(torch.isclose(scale, candidate, rtol=OTHER_SCALES, atol=0))
        for share, _ in least(list(codes.coarse))
        for _, best in least([share, *(share + step for step in codes.fine)])
        for candidate in refined(best, _REFINEMENTS)
    )
