"""The scales with the least squared error: where the largest weights of a row or group are cut off.

The error of each weight counts as much as its column: by its inputs' mean square if calibration has
measured it, as the error of an output is sum_j d_j x_j; else by what the weight itself tells of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.checkpoint.spec import torch_dtype
from quantcli.core.kernels import LANES, REFINEMENTS
from quantcli.core.kernels import tensors as kernels
from quantcli.core.kernels.machine import only_shapes
from quantcli.core.number_types import ELEMENTS, ElementType
from quantcli.schemes.arithmetic import rounding, tiles


@dataclass(frozen=True)
class Codes:
    """The numbers that weights are rounded to, and the scales to try.

    element: the name of their type.
    nearest: quotients, float32 -> codes, float32, half to even, clipped; in place.
    coarse:  shares of the widest scale; 1, that scale itself, is the first.
    fine:    steps around the best of them.
    sums:    the dtype in which errors are summed.
    """

    element: str
    nearest: Callable[[Tensor], Tensor]
    coarse: tuple[float, ...]
    fine: tuple[float, ...]
    sums: torch.dtype = torch.float64

    def codes(self, rows: Tensor, scale: Tensor) -> Tensor:
        """The codes of rows / scale as stored. rows: float [..., k]; scale: float32 [..., 1]."""
        compiled = kernels.encode(rows, scale, self.element)
        if compiled is not None:
            return compiled
        return self.nearest(rows.float() / scale).to(torch_dtype(ELEMENTS[self.element].dtype))


def _integers(element: ElementType) -> Callable[[Tensor], Tensor]:
    """Rounded, and clipped to the numbers of the type."""
    least, largest = element.least, element.largest
    return lambda values: values.round_().clamp_(least, largest)


_INT4 = ELEMENTS["int4"]
_HALF = 63 / 128  # how far beyond the largest code w / scale is still rounded to it
INT4 = Codes(
    "int4",
    _integers(_INT4),
    coarse=(1.0, 1.1, *(0.92 - 0.08 * step for step in range(7))),
    fine=(-0.032, -0.016, 0.016, 0.032),
    sums=torch.float32,
)
INT8 = Codes(
    "int8",
    _integers(ELEMENTS["int8"]),
    # no further: steps of 8 bits are small, and a weight that is off by a tenth looks like damage
    coarse=tuple(1 - 0.01 * step for step in range(8)),
    fine=(-0.005, 0.005),
)


def _fp8(values: Tensor) -> Tensor:
    largest = rounding.FP8_E4M3_MAX
    return values.clamp_(-largest, largest).to(torch.float8_e4m3fn).float()


# Steps of fp8 double at powers of two: between two of them, a wider scale may fit the weights better.
FP8 = Codes(
    "fp8_e4m3", _fp8, coarse=(1.0, *(2 ** (step / 8) for step in range(1, 8)), 0.96, 0.92), fine=()
)


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


def facing_down(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The sign that each row of [..., k] is multiplied with: -1 if its largest value is positive. And
    its largest value after that, at least 0. Both float32 [..., 1].

    Codes reach one step further below zero: with the largest value at -8, steps are 1/8 smaller.
    """
    found = kernels.extremes(rows)
    if found is None:
        values = rows.float()
        found = values.amax(-1, keepdim=True), values.neg().amax(-1, keepdim=True)
    above, below = found
    sign = torch.where(above > below, -1.0, 1.0)
    return sign, torch.where(above > below, below, above).clamp_min(0)


def widest_signed(
    amax: Tensor, above: Tensor, engine_dtype: torch.dtype, element: ElementType = _INT4
) -> Tensor:
    """The smallest scale that clips nothing, for the largest |w| and the largest w of rows that
    `facing_down` has turned: float32 [..., 1]. element: a type of integers."""
    return rounding.scale_of(amax, -element.least, engine_dtype, above / (element.largest + _HALF))


def least_error(
    rows: Tensor,
    widest: Tensor,
    engine_dtype: torch.dtype,
    codes: Codes,
    importance: Tensor | None,
    sign: Tensor | None = None,
) -> Tensor:
    """The scale of each row with the least squared error.

    Shares of the widest scale are tried, coarse ones and then finer ones around the best. Each gives
    codes q, and these the scale that is best for them, s = sum(h w q) / sum(h q^2), which leaves the
    error sum(h w^2) - s sum(h w q). The s with the least error is rounded to `engine_dtype`, and
    refined: its codes give another such s. Of both and `widest` the one with the least error is
    chosen. Codes are round(w * (1 / s)).

    rows: float [..., k]; widest: positive float32 [..., 1]; importance: the h of each column, float32,
    which broadcasts against rows; sign: float32 [..., 1], which rows are multiplied with.

    Ties go to the earlier, and `widest` is the first. Sums are in an order of their own, see `total`:
    every machine finds the same scales.
    """
    compiled = kernels.least_error(
        rows, sign, widest, engine_dtype, rounding.FLOOR[engine_dtype],
        (codes.element, (codes.coarse, codes.fine), codes.sums), importance,
    )  # fmt: skip
    if compiled is not None:
        return compiled
    if only_shapes():
        return widest  # of rows of zeros no other scale has less error
    values = rows.float() if sign is None else rows.float() * sign

    def error(scale: Tensor) -> Tensor:
        """[..., 1]; infinite if it is NaN."""
        squares = codes.nearest(values * (1 / scale)).mul_(scale).sub_(values).square_()
        if importance is not None:
            squares.mul_(importance)
        return total(squares, codes.sums).nan_to_num_(torch.inf, torch.inf)

    def fitted(scale: Tensor) -> tuple[Tensor, Tensor]:
        """The best scale for the codes of `scale`, not rounded, and how much it explains."""
        rounded = codes.nearest(values * (1 / scale))
        weighted = rounded if importance is None else rounded * importance
        square, mixed = total(rounded * weighted, codes.sums), total(values * weighted, codes.sums)
        best, sound = mixed / square, (square > 0) & (mixed > 0)
        return torch.where(sound, best.float(), scale), torch.where(sound, best * mixed, 0)

    scale, most = fitted(widest)
    share = torch.ones_like(widest)
    for step in codes.coarse[1:]:
        found, explained = fitted(rounding.nearest(widest * step, engine_dtype))
        better = explained > most
        scale, most = torch.where(better, found, scale), torch.where(better, explained, most)
        share = torch.where(better, step, share)
    for step in codes.fine:
        found, explained = fitted(rounding.nearest(widest * (share + step), engine_dtype))
        better = explained > most
        scale, most = torch.where(better, found, scale), torch.where(better, explained, most)
    best, lowest = widest, error(widest)
    for again in range(REFINEMENTS):
        if again:
            scale, _ = fitted(scale)
        scale = rounding.nearest(scale, engine_dtype)
        left = error(scale)
        better = left < lowest
        best, lowest = torch.where(better, scale, best), torch.where(better, left, lowest)
    return best


def total(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of each row in `dtype`: [..., k] -> [..., 1]. In an order of its own.

    Every sixteenth value goes to the same of 16 sums. The upper half of these is added to the lower one
    until one is left.
    """
    k = values.shape[-1]
    sums = values.new_zeros((*values.shape[:-1], LANES), dtype=dtype)
    for start in range(0, k, LANES):
        part = values[..., start : start + LANES]
        sums[..., : part.shape[-1]] += part
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums
