"""Four-bit floats (e2m1) in groups of columns: the scale of each group, and packed codes.

The scales of a type are few and in order, so that a search tries some neighbours: those with which the
largest weight of a group ends up near the largest code, 6, or is cut off a little above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantcli.checkpoint.spec import torch_dtype
from quantcli.core.codes import code_values, scale_groups, spread
from quantcli.core.kernels import ROWS, WIDE
from quantcli.core.kernels import tensors as kernels
from quantcli.core.number_types import ELEMENTS, SCALES
from quantcli.schemes.arithmetic import clipping, rounding, tiles

_FP4 = ELEMENTS["fp4_e2m1"]
LARGEST = _FP4.largest
_E4M3_MAX = ELEMENTS["fp8_e4m3"].largest
# of a global scale: its reciprocal and its product with any other scale are normal float32 numbers
LEAST_GLOBAL = 2.0**-64


@dataclass(frozen=True)
class Grid:
    """The scales that a group may have, and those of them that a search tries.

    scale:   the name of their type.
    columns: that share a scale.
    reach:   the first scale tried is the least with which no weight is over `reach` times the scale.
    count:   how many are tried, from that on.
    largest: the largest that a group may have.
    per:     rows of a table of errors for a step of the first scale; 1: errors are computed.
    """

    scale: str
    columns: int
    reach: float
    count: int
    largest: float
    per: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return torch_dtype(SCALES[self.scale].dtype)

    def code(self, scale: float) -> int:
        """The code of a scale."""
        return int(torch.tensor([scale]).to(self.dtype).view(torch.uint8))

    @cached_property
    def table(self) -> Tensor:
        """All scales up to the largest, by their codes: float32."""
        return self.scales(torch.arange(self.code(self.largest) + 1).to(torch.uint8))

    @cached_property
    def errors(self) -> Tensor | None:
        """The squared errors of rounding, int16 [codes, ROWS, WIDE]; None if they are computed.

        For each code of a first scale, each size of a number and each of the scales tried: the error in
        steps of the first one, times 512. Row r stands for sizes from r / per to (r + 1) / per steps.
        At most 2047, so that no sum of 16 overflows. A search by such sums takes a third of the time,
        and the weight has 0.03 % more error at most.
        """
        if self.per == 1:
            return None
        table = self.table.double()
        codes = torch.arange(len(table)).unsqueeze(1) + torch.arange(WIDE)
        ratios = (
            table[codes.clamp_max(len(table) - 1)] / table.clamp_min(self.table[1]).unsqueeze(1)
        ).unsqueeze(1)
        sizes = ((torch.arange(ROWS) + 0.5) / self.per).view(1, -1, 1) / ratios
        squares = (sizes - nearest(sizes.float()).double()).square() * ratios.square()
        return (squares * 512).round().clamp_max(2047).to(torch.int16)

    def scales(self, codes: Tensor) -> Tensor:
        """The scales of their codes, uint8: float32 in the same shape."""
        return codes.view(self.dtype).float()


# A scale with which the largest weight is below half of the largest code is never needed: half of it
# has all of its numbers, and more. Up to 7 times a scale, the largest weight is rounded to 6. Eight
# scales lie between 3.5 and 7: `benchmarks/weight_error.py` finds no less error with all 126.
NVFP4 = Grid("e4m3", 16, reach=7.0, count=8, largest=_E4M3_MAX, per=32.0)
# The scale with which nothing is clipped has all numbers of any larger one that are needed. Half of it
# clips the largest weight, by less than a half; a quarter would by more than all others can gain. With
# 2^125 the largest code is still a float32.
MXFP4 = Grid("e8m0", 32, reach=12.0, count=2, largest=2.0**125)


def global_scale(amax: Tensor) -> Tensor:
    """The scale of everything, with which the largest block scale is 448: float32 [1].

    amax / (448 * 6), where 448 * 6 is the largest product of a block scale and a code; then the float32
    next to it whose reciprocal's reciprocal is that number itself, so that engines may store either. At
    least 2^-64. NaN comes through.
    """
    scale = (amax.float() / (_E4M3_MAX * LARGEST)).clamp_min(LEAST_GLOBAL)
    return 1 / (1 / scale)


def power_scale(amax: Tensor) -> Tensor:
    """The same as a power of two: float32 [1], for weights that are e2m1 numbers times powers of two.

    2^8 is the largest power of two that is a block scale, 2^-9 the smallest: all powers of two from
    that of the largest weight down to its 2^-17 can be the step of a group, and the search finds that
    with them nothing is lost.
    """
    power = rounding.round_up(amax.float() / LARGEST, torch.float8_e8m0fnu)
    return (power * 2.0**-8).clamp_min(LEAST_GLOBAL)


def nearest(values: Tensor) -> Tensor:
    """The nearest numbers of e2m1, float32, half to even, clipped to -6..6.

    Numbers below 2 have steps of 0.5, those from 2 on steps of 1, those from 4 on steps of 2. A sum
    with a power of two that has these steps in float32 is rounded to them.
    """
    magnitude = values.abs().clamp_max(LARGEST)
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)
    power = power.clamp_min(1.0) * 2.0**22
    return ((magnitude + power) - power).copysign(values)


def nearest_away(values: Tensor) -> Tensor:
    """The same, but halfway numbers are rounded away from zero."""
    magnitude = values.abs().clamp_max(LARGEST)
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(1.0)
    return ((magnitude * 2 / power + 0.5).floor() * power / 2).copysign(values)


def to_packed(groups: Tensor, scale: Tensor) -> Tensor:
    """The nearest codes for groups / scale, two in a byte, that of the even column in the low bits.

    groups: float [..., groups, columns]; scale: float32 [..., groups, 1]. uint8 [..., groups, columns /
    2]. A code is the sign, then the place of its number among 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    """
    rounded = nearest(groups.float() / scale)
    magnitude = rounded.abs()
    # twice the number up to 2, then one more for each power of two, and for each half of one
    place = torch.minimum(magnitude * 2, magnitude + 2)
    place = torch.minimum(place, magnitude / 2 + 4)
    codes = place.to(torch.uint8) | torch.signbit(rounded).to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def quantize(rows: Tensor, whole: Tensor | None, grid: Grid, *, search: bool) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [..., n, ceil(k / 2)], and scales float32 [..., n, ceil(k / columns)].

    rows: float [..., n, k]; the last group is filled up with zeros. whole: the global scale, float32
    [1]. Numbers are codes * (scale * whole). A group with NaN or Inf has NaN as scale.

    search: of the scales tried, the one with the least squared error; of equals the smallest. Else
    e4m3 scales are the nearest to amax / 6, and powers of two those that clip nothing.
    """
    by = kernels.Groups(
        grid.columns,
        grid.scale,
        grid.table,
        grid.code(SCALES[grid.scale].least),
        reach=grid.reach if search else LARGEST,
        up=search or grid.scale == "e8m0",
        count=grid.count if search else 1,
        errors=grid.errors,
        per=grid.per,
    )
    compiled = kernels.encode_groups(rows, _FP4.name, by, whole)
    if compiled is not None:
        return compiled
    groups = tiles.cut(rows, grid.columns)
    amax = rounding.absmax(groups)
    limit = amax if whole is None else amax / whole
    finite = torch.isfinite(amax)
    codes = _first(torch.where(finite, limit, 0.0), grid, search=search)
    if search:
        codes = _least_error(groups, codes, whole, grid)
    scale = torch.where(finite, grid.scales(codes), torch.nan)
    step = scale if whole is None else scale * whole
    packed = to_packed(groups, step).flatten(-2)[..., : -(-rows.shape[-1] // 2)]
    return packed.contiguous(), scale.squeeze(-1)


def _first(amax: Tensor, grid: Grid, *, search: bool) -> Tensor:
    """The code of the first scale tried, or of the only one: uint8 in the shape of `amax`."""
    least, largest = SCALES[grid.scale].least, grid.largest
    if search or grid.scale == "e8m0":
        scale = rounding.round_up(amax / (grid.reach if search else LARGEST), grid.dtype)
        scale = scale.nan_to_num(largest, largest)
    else:
        scale = amax / LARGEST
    return scale.clamp(least, largest).to(grid.dtype).view(torch.uint8)


def _least_error(groups: Tensor, first: Tensor, whole: Tensor | None, grid: Grid) -> Tensor:
    """The code of the scale with the least squared error: uint8 [..., groups, 1].

    The error of a scale is the sum of (w / scale - q)^2 in its own steps, times the square of how many
    times it is as large as the first one. With a table, that of the middle of a row counts.
    """
    values = groups.float().abs()
    if grid.errors is not None:
        step = grid.scales(first) if whole is None else grid.scales(first) * whole
        rows = (values * (grid.per * (1 / step))).nan_to_num(0).clamp_max(ROWS - 1).to(torch.int64)
        sums = grid.errors.to(first.device)[first.long(), rows].sum(-2)
        best = sums.argmin(-1, keepdim=True)
        return (first.to(torch.int64) + best).to(torch.uint8)
    last = grid.code(grid.largest)
    smallest = grid.scales(first)
    best, lowest = first, torch.full(first.shape, torch.inf, device=first.device)
    for place in range(grid.count):
        codes = (first.to(torch.int16) + place).clamp_max(last).to(torch.uint8)
        scale = grid.scales(codes)
        step = scale if whole is None else scale * whole
        quotients = values * (1 / step)
        ratio = scale / smallest
        error = (quotients - nearest(quotients)).square_()
        left = clipping.total(error, torch.float32) * (ratio * ratio)
        better = left < lowest
        best, lowest = torch.where(better, codes, best), torch.where(better, left, lowest)
    return best


def dequantize(packed: Tensor, scale: Tensor, whole: Tensor | None, columns: int) -> Tensor:
    """Codes times the scales of their groups, float32 [..., n, k]: code * (scale * whole)."""
    values = code_values(packed, _FP4)
    step = scale if whole is None else scale * whole
    if values.dim() == 2:
        return scale_groups(values, step, columns)
    return values * spread(step, columns, values.shape[-1])


def nvfp4_inputs(x: Tensor, whole: Tensor) -> Tensor:
    """Inputs [..., k] as vLLM rounds them to fp4 with a given global scale, float32 [..., k].

    whole: float32 [1], a multiplier. The scale of a block is amax / 6 in e4m3, and at most 448; a block
    whose scale vanishes is zero. Source: vllm 0.32.0, model_executor/layers/quantization/utils/
    nvfp4_emulation_utils.py:620-678.
    """
    divisor = 1 / whole
    groups = tiles.cut(x.float(), NVFP4.columns)
    amax = groups.abs().amax(-1, keepdim=True)
    scale = (divisor * (amax * (1 / LARGEST))).clamp_max(_E4M3_MAX).to(torch.float8_e4m3fn).float()
    factor = torch.where(scale > 0, 1 / (scale * whole), 0.0)
    return (nearest(groups * factor) * (scale / divisor)).flatten(-2)[..., : x.shape[-1]]
