"""The loops over rows that are compiled: one function for each kernel and dtype. Imported only to
compile.

Arguments are pointers and counts. Weights are rows [n, k] without gaps; their scales are of tiles of
`tall` rows and `columns` columns, [ceil(n / tall), ceil(k / columns)], which begin at row and column 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from quantcli.core.kernels import LANES
from quantcli.core.kernels.formulas import DTYPES, ENCODERS, f32, helper, nearest_scale

_COUNT = types.int64
_FLOATS = types.CPointer(types.float32)


def absmax_tiles(dtype: str) -> Any:
    """max |x| of each tile: float32."""
    element, _, magnitude, largest, zero = DTYPES[dtype]

    def kernel(rows, n, k, tall, columns, out):
        groups = (k + columns - 1) // columns
        for top in range(0, n, tall):
            bottom = min(top + tall, n)
            for group in range(groups):
                first = group * columns
                last = min(first + columns, k)
                most = zero
                for i in range(top, bottom):
                    start = i * k
                    for j in range(start + first, start + last):
                        value = magnitude(rows[j])
                        most = value if value > most else most
                out[(top // tall) * groups + group] = largest(most)

    return kernel, types.void(types.CPointer(element), _COUNT, _COUNT, _COUNT, _COUNT, _FLOATS)


def absmax_columns(dtype: str) -> Any:
    """The larger of `out` and max |x| of each column: float32 [k]. NaN is larger than all."""
    element, _, magnitude, largest, _ = DTYPES[dtype]

    def kernel(rows, n, k, out):
        for i in range(n):
            start = i * k
            for j in range(k):
                value = largest(magnitude(rows[start + j]))
                out[j] = out[j] if value <= out[j] or out[j] != out[j] else value

    return kernel, types.void(types.CPointer(element), _COUNT, _COUNT, _FLOATS)


def encode(dtype: str, to: str) -> Any:
    """The code of x / scale for each number: [n, k]."""
    element, value, *_ = DTYPES[dtype]
    encoder = ENCODERS[to]
    code = encoder.code

    def kernel(rows, n, k, tall, columns, scales, codes):
        groups = (k + columns - 1) // columns
        for i in range(n):
            for group in range(groups):
                first = i * k + group * columns
                last = min(first + columns, i * k + k)
                scale = scales[(i // tall) * groups + group]
                for j in range(first, last):
                    codes[j] = code(value(rows[j]) / scale)

    counts = [_COUNT] * 4
    pointer = types.CPointer(encoder.element)
    return kernel, types.void(types.CPointer(element), *counts, _FLOATS, pointer)


def extremes(dtype: str) -> Any:
    """The largest x and the largest -x of each row, or 0 if there is none: float32 [n] each."""
    element, value, *_ = DTYPES[dtype]

    def kernel(rows, n, k, above, below):
        for i in range(n):
            high = f32(0)
            low = f32(0)
            for j in range(i * k, i * k + k):
                x = value(rows[j])
                high = x if x > high else high
                low = -x if -x > low else low
            above[i] = high
            below[i] = low

    return kernel, types.void(types.CPointer(element), _COUNT, _COUNT, _FLOATS, _FLOATS)


@helper
def _total(lanes):
    """The sum of the lanes: the upper half onto the lower one, until one is left."""
    a, b, c, d = lanes[0] + lanes[8], lanes[1] + lanes[9], lanes[2] + lanes[10], lanes[3] + lanes[11]
    e, f, g, h = lanes[4] + lanes[12], lanes[5] + lanes[13], lanes[6] + lanes[14], lanes[7] + lanes[15]
    return ((a + e) + (c + g)) + ((b + f) + (d + h))


def least_error(dtype: str, to: str, sums: str) -> Any:
    """The scale of each row with the least squared error, see `least_error` in
    schemes/arithmetic/clipping.py.

    sums: the dtype in which errors are summed. values, weights: space for a row; lanes, more: space for
    LANES sums each.
    """
    element, value, *_ = DTYPES[dtype]
    nearest = ENCODERS[to].nearest
    wide = {"float32": f32, "float64": np.float64}[sums]
    infinite = wide(np.inf)

    @helper
    def square(x, weight, scale, inverse):
        error = nearest(x * inverse) * scale - x
        return wide(error * error * weight)

    @helper
    def error(values, weights, k, scale, bound, lanes):
        """Infinite if it is NaN, or if a part of the sum reaches `bound` already."""
        inverse = f32(1) / scale
        for lane in range(LANES):
            lanes[lane] = wide(0)
        j = 0
        while j + 4 * LANES <= k:  # the compiler makes one vector of the lanes
            for lane in range(LANES):
                a, b, c, d = j + lane, j + 16 + lane, j + 32 + lane, j + 48 + lane
                total = lanes[lane]
                total += square(values[a], weights[a], scale, inverse)
                total += square(values[b], weights[b], scale, inverse)
                total += square(values[c], weights[c], scale, inverse)
                total += square(values[d], weights[d], scale, inverse)
                lanes[lane] = total
            j += 4 * LANES
            if _total(lanes) >= bound:  # the rest only adds to it
                return infinite
        while j < k:
            for lane in range(min(LANES, k - j)):
                lanes[lane] += square(values[j + lane], weights[j + lane], scale, inverse)
            j += LANES
        total = _total(lanes)
        return total if total == total else infinite

    @helper
    def refined(values, weights, k, scale, engine, least, lanes, more):
        """The best scale for the codes of `scale`."""
        inverse = f32(1) / scale
        for lane in range(LANES):
            lanes[lane] = wide(0)
            more[lane] = wide(0)
        for j in range(0, k, LANES):
            for lane in range(min(LANES, k - j)):
                x = values[j + lane]
                rounded = nearest(x * inverse)
                weighted = rounded * weights[j + lane]
                lanes[lane] += wide(x * weighted)
                more[lane] += wide(rounded * weighted)
        square = _total(more)
        found = f32(_total(lanes) / square)
        return nearest_scale(found if square > 0 and found > 0 else scale, engine, least)

    def kernel(
        rows, n, k, signs, widest, importance, period, coarse, coarses, fine, fines, engine, least,
        values, weights, lanes, more, out,
    ):  # fmt: skip
        for i in range(n):
            sign = signs[i]
            column = (i % period) * k
            for j in range(k):
                values[j] = value(rows[i * k + j]) * sign
                weights[j] = importance[column + j]
            first = widest[i]
            best, share = first, f32(1)
            lowest = error(values, weights, k, best, infinite, lanes)
            for step in range(1, coarses):
                scale = nearest_scale(first * coarse[step], engine, least)
                found = error(values, weights, k, scale, lowest, lanes)
                if found < lowest:
                    lowest, best, share = found, scale, coarse[step]
            for step in range(fines):
                scale = nearest_scale(first * (share + fine[step]), engine, least)
                found = error(values, weights, k, scale, lowest, lanes)
                if found < lowest:
                    lowest, best = found, scale
            for _ in range(2):
                scale = refined(values, weights, k, best, engine, least, lanes, more)
                found = error(values, weights, k, scale, lowest, lanes)
                if not found < lowest:
                    break  # the same codes would give the same scale again
                lowest, best = found, scale
            out[i] = best

    totals = types.CPointer({"float32": types.float32, "float64": types.float64}[sums])
    return kernel, types.void(
        types.CPointer(element), _COUNT, _COUNT, _FLOATS, _FLOATS, _FLOATS, _COUNT, _FLOATS, _COUNT,
        _FLOATS, _COUNT, _COUNT, types.float32, _FLOATS, _FLOATS, totals, totals, _FLOATS,
    )  # fmt: skip


KERNELS = {
    kernel.__name__: kernel for kernel in (absmax_tiles, absmax_columns, extremes, encode, least_error)
}
