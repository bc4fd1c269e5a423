"""Loops over int4 weights with zero points, which are compiled as those of `loops` are: see there.

Rows are groups of columns, each with a scale and a zero point: codes stand for (code - zero) * scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from quantcli.core.kernels import BLOCK, LANES, REFINEMENTS
from quantcli.core.kernels.formulas import DTYPES, f32, helper, i8, i32, nearest_scale
from quantcli.core.kernels.loops import COUNT, FLOATS, folded

_CODES = types.CPointer(types.int8)


@helper
def _nearest(x, ends):
    """A quotient, rounded and clipped: a code less its zero point. ends: the least and the largest."""
    y = np.rint(x)
    y = ends[0] if y < ends[0] else y
    return ends[1] if y > ends[1] else y


@helper
def _ends(zero):
    """Of codes less a zero point."""
    return f32(-8) - zero, f32(7) - zero


@helper
def _zero(below, share, scale):
    """The zero point for a range that reaches down to -below * share; 0 if that is NaN."""
    zero = _nearest(below * share / scale - f32(8), (f32(-8), f32(7)))
    return zero if zero == zero else f32(0)


def encode_shifted(dtype: str) -> Any:
    """The codes of rows [n, k]: the nearest to x / scale, plus the zero point of the row."""
    element, value, *_ = DTYPES[dtype]

    def kernel(rows, n, k, scales, zeros, codes):
        for i in range(n):
            scale = scales[i]
            zero = f32(zeros[i])
            ends = _ends(zero)
            for j in range(i * k, i * k + k):
                codes[j] = i8(i32(_nearest(value(rows[j]) / scale, ends) + zero))

    pointer = types.CPointer(element)
    return kernel, types.void(pointer, COUNT, COUNT, FLOATS, _CODES, _CODES)


def least_error_shifted(dtype: str) -> Any:
    """The scale and the zero point of each row with the least squared error, see `search` in
    schemes/arithmetic/zero_points.py. Space is that of `least_error` in `loops`."""
    element, value, *_ = DTYPES[dtype]
    infinite = f32(np.inf)

    @helper
    def square(x, weight, scale, inverse, ends):
        error = _nearest(x * inverse, ends) * scale - x
        return error * error * weight

    @helper
    def squares(values, weights, a, scale, ends, total):
        b, c, d = a + LANES, a + 2 * LANES, a + 3 * LANES
        inverse = f32(1) / scale
        total += square(values[a], weights[a], scale, inverse, ends)
        total += square(values[b], weights[b], scale, inverse, ends)
        total += square(values[c], weights[c], scale, inverse, ends)
        return total + square(values[d], weights[d], scale, inverse, ends)

    @helper
    def error(values, weights, k, scale, zero, lanes):
        """Infinite if it is NaN."""
        ends = _ends(zero)
        for lane in range(LANES):
            lanes[lane] = squares(values, weights, lane, scale, ends, f32(0))
        for j in range(BLOCK, k, BLOCK):
            for lane in range(LANES):
                lanes[lane] = squares(values, weights, j + lane, scale, ends, lanes[lane])
        total = folded(lanes)
        return total if total == total else infinite

    @helper
    def product(x, weight, inverse, ends):
        rounded = _nearest(x * inverse, ends)
        weighted = rounded * weight
        return x * weighted, rounded * weighted

    @helper
    def products(values, weights, a, inverse, ends, sums):
        b, c, d = a + LANES, a + 2 * LANES, a + 3 * LANES
        mixed, square = sums
        one, other = product(values[a], weights[a], inverse, ends)
        mixed, square = mixed + one, square + other
        one, other = product(values[b], weights[b], inverse, ends)
        mixed, square = mixed + one, square + other
        one, other = product(values[c], weights[c], inverse, ends)
        mixed, square = mixed + one, square + other
        one, other = product(values[d], weights[d], inverse, ends)
        return mixed + one, square + other

    @helper
    def fitted(values, weights, k, scale, zero, lanes, more):
        """The best scale for the codes of `scale`, not rounded, and how much it explains."""
        inverse = f32(1) / scale
        ends = _ends(zero)
        for lane in range(LANES):
            found = products(values, weights, lane, inverse, ends, (f32(0), f32(0)))
            lanes[lane], more[lane] = found
        for j in range(BLOCK, k, BLOCK):
            for lane in range(LANES):
                found = products(values, weights, j + lane, inverse, ends, (lanes[lane], more[lane]))
                lanes[lane], more[lane] = found
        mixed, square = folded(lanes), folded(more)
        best = mixed / square
        if square > 0 and mixed > 0:
            return best, best * mixed
        return scale, f32(0)

    def kernel(
        rows, n, k, above, below, importance, period, coarse, coarses, fine, fines, engine, floor,
        searched, values, weights, lanes, more, scales, zeros,
    ):  # fmt: skip
        for i in range(n):
            column = (i % period) * k
            for j in range(k):
                values[j] = value(rows[i * k + j])
            for j in range(k):
                weights[j] = importance[column + j]
            high, low = above[i], below[i]
            first = nearest_scale((high + low) / f32(15), engine, floor)
            origin = _zero(low, f32(1), first)
            best, best_zero = first, origin
            if searched:
                scale, most = fitted(values, weights, k, first, origin, lanes, more)
                zero = origin
                share = f32(1)
                for step in range(1, coarses):
                    tried = nearest_scale(
                        (high * coarse[step] + low * coarse[step]) / f32(15), engine, floor
                    )
                    place = _zero(low, coarse[step], tried)
                    found, explained = fitted(values, weights, k, tried, place, lanes, more)
                    if explained > most:
                        scale, zero, most, share = found, place, explained, coarse[step]
                for step in range(fines):
                    upper, lower = share + fine[2 * step], share + fine[2 * step + 1]
                    tried = nearest_scale((high * upper + low * lower) / f32(15), engine, floor)
                    place = _zero(low, lower, tried)
                    found, explained = fitted(values, weights, k, tried, place, lanes, more)
                    if explained > most:
                        scale, zero, most = found, place, explained
                lowest = error(values, weights, k, first, origin, lanes)
                for again in range(REFINEMENTS):
                    if again:
                        scale, _ = fitted(values, weights, k, scale, zero, lanes, more)
                    scale = nearest_scale(scale, engine, floor)
                    found = error(values, weights, k, scale, zero, lanes)
                    if found < lowest:
                        best, best_zero, lowest = scale, zero, found
            scales[i] = best
            zeros[i] = i8(i32(best_zero))

    return kernel, types.void(
        types.CPointer(element), COUNT, COUNT, FLOATS, FLOATS, FLOATS, COUNT, FLOATS, COUNT,
        FLOATS, COUNT, COUNT, types.float32, COUNT, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS,
        _CODES,
    )  # fmt: skip


KERNELS = {kernel.__name__: kernel for kernel in (encode_shifted, least_error_shifted)}
