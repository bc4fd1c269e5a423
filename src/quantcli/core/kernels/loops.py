"""The loops over rows that are compiled: one function for each kernel and dtype. Imported only to
compile.

Arguments are pointers and counts. Weights are rows [n, k] without gaps; their scales are of tiles of
`tall` rows and `columns` columns, [ceil(n / tall), ceil(k / columns)], which begin at row and column 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from quantcli.core.kernels import BLOCK, LANES, REFINEMENTS, ROWS, WIDE
from quantcli.core.kernels.formulas import (
    DTYPES,
    ENCODERS,
    GRIDS,
    as_f32,
    as_i32,
    f32,
    helper,
    i32,
    inlined,
    nearest_scale,
    u8,
)
from quantcli.core.kernels.lanes import (
    bits_larger,
    bits_least,
    largest_bits,
    load,
    place_of_least,
    place_of_least_sum,
    spread,
    store,
)

COUNT = types.int64
FLOATS = types.CPointer(types.float32)
_OCTETS = types.CPointer(types.uint8)


def absmax_tiles(dtype: str) -> Any:
    """max |x| of each tile: float32."""
    element, _, magnitude, largest, zero, *_ = DTYPES[dtype]

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

    return kernel, types.void(types.CPointer(element), COUNT, COUNT, COUNT, COUNT, FLOATS)


def absmax_columns(dtype: str) -> Any:
    """The larger of `out` and max |x| of each column: float32 [k]. NaN is larger than all."""
    element, _, magnitude, largest, *_ = DTYPES[dtype]

    def kernel(rows, n, k, out):
        for i in range(n):
            start = i * k
            for j in range(k):
                value = largest(magnitude(rows[start + j]))
                out[j] = out[j] if value <= out[j] or out[j] != out[j] else value

    return kernel, types.void(types.CPointer(element), COUNT, COUNT, FLOATS)


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

    counts = [COUNT] * 4
    pointer = types.CPointer(encoder.element)
    return kernel, types.void(types.CPointer(element), *counts, FLOATS, pointer)


def decode(of: str) -> Any:
    """The numbers of codes times the scales of their groups: float32 [n, k]."""
    encoder = ENCODERS[of]
    value, stored = encoder.value, encoder.stored

    def one(codes, n, k, columns, scales, out):
        groups = (k + columns - 1) // columns
        for i in range(n):
            for group in range(groups):
                first = i * k + group * columns
                last = min(first + columns, i * k + k)
                scale = scales[i * groups + group]
                for j in range(first, last):
                    out[j] = value(codes[j]) * scale

    def two(codes, n, k, columns, scales, out):
        groups = (k + columns - 1) // columns
        for i in range(n):
            for group in range(groups):
                first = (i * k + group * columns) // 2
                last = min(first + columns // 2, (i * k + k) // 2)
                scale = scales[i * groups + group]
                for j in range(first, last):
                    out[2 * j] = value(codes[j] & u8(15)) * scale
                    out[2 * j + 1] = value(codes[j] >> u8(4)) * scale

    signature = types.void(types.CPointer(encoder.element), *[COUNT] * 3, FLOATS, FLOATS)
    return (one if stored == 1 else two), signature


def pack_nibbles() -> Any:
    """Two codes of 4 bits in a byte, the first in the low bits; `more` is added to each."""

    def kernel(codes, count, more, out):
        added = u8(more)
        for j in range(count):
            out[j] = (codes[2 * j] + added) | ((codes[2 * j + 1] + added) << u8(4))

    return kernel, types.void(_OCTETS, COUNT, COUNT, _OCTETS)


def unpack_nibbles() -> Any:
    """The inverse, for `count` bytes; `less` is subtracted from each code."""

    def kernel(octets, count, less, out):
        subtracted = u8(less)
        for j in range(count):
            octet = octets[j]
            out[2 * j] = (octet & u8(15)) - subtracted
            out[2 * j + 1] = (octet >> u8(4)) - subtracted

    return kernel, types.void(_OCTETS, COUNT, COUNT, _OCTETS)


def extremes(dtype: str) -> Any:
    """The largest x and the largest -x of each row, or 0 if there is none: float32 [n] each."""
    element, _, _, largest, _, ordered, negated, none = DTYPES[dtype]

    def kernel(rows, n, k, above, below):
        for i in range(n):
            high = none
            low = none
            for j in range(i * k, i * k + k):
                x = ordered(rows[j])
                high = x if x > high else high
                y = negated(rows[j])
                low = y if y > low else low
            above[i] = largest(high)
            below[i] = largest(low)

    return kernel, types.void(types.CPointer(element), COUNT, COUNT, FLOATS, FLOATS)


@helper
def folded(lanes):
    """The sum of the lanes: the upper half onto the lower one, until one is left."""
    a, b, c, d = lanes[0] + lanes[8], lanes[1] + lanes[9], lanes[2] + lanes[10], lanes[3] + lanes[11]
    e, f, g, h = lanes[4] + lanes[12], lanes[5] + lanes[13], lanes[6] + lanes[14], lanes[7] + lanes[15]
    return ((a + e) + (c + g)) + ((b + f) + (d + h))


def least_error(dtype: str, to: str, sums: str) -> Any:
    """The scale of each row with the least squared error, see `least_error` in
    schemes/arithmetic/clipping.py.

    sums: the dtype in which errors are summed. values, weights: space for a row, up to a multiple of
    BLOCK numbers, zeros behind it; lanes, more: space for LANES sums each.

    A block is written out as four vectors, and the first one sets the lanes: they are memory, and each
    addition to them waits for the one before.
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
    def error(values, weights, k, scale, lanes):
        """Infinite if it is NaN."""
        inverse = f32(1) / scale
        for lane in range(LANES):
            a, b, c, d = lane, 16 + lane, 32 + lane, 48 + lane
            total = wide(0)
            total += square(values[a], weights[a], scale, inverse)
            total += square(values[b], weights[b], scale, inverse)
            total += square(values[c], weights[c], scale, inverse)
            total += square(values[d], weights[d], scale, inverse)
            lanes[lane] = total
        for j in range(BLOCK, k, BLOCK):
            for lane in range(LANES):
                a, b, c, d = j + lane, j + 16 + lane, j + 32 + lane, j + 48 + lane
                total = lanes[lane]
                total += square(values[a], weights[a], scale, inverse)
                total += square(values[b], weights[b], scale, inverse)
                total += square(values[c], weights[c], scale, inverse)
                total += square(values[d], weights[d], scale, inverse)
                lanes[lane] = total
        total = folded(lanes)
        return total if total == total else infinite

    @helper
    def product(x, weight, inverse):
        rounded = nearest(x * inverse)
        weighted = rounded * weight
        return wide(x * weighted), wide(rounded * weighted)

    @helper
    def products(values, weights, a, inverse, mixed, square):
        b, c, d = a + LANES, a + 2 * LANES, a + 3 * LANES
        one, other = product(values[a], weights[a], inverse)
        mixed, square = mixed + one, square + other
        one, other = product(values[b], weights[b], inverse)
        mixed, square = mixed + one, square + other
        one, other = product(values[c], weights[c], inverse)
        mixed, square = mixed + one, square + other
        one, other = product(values[d], weights[d], inverse)
        return mixed + one, square + other

    @helper
    def fitted(values, weights, k, scale, lanes, more):
        """The best scale for the codes of `scale`, not rounded, and how much it explains."""
        inverse = f32(1) / scale
        for lane in range(LANES):
            found = products(values, weights, lane, inverse, wide(0), wide(0))
            lanes[lane], more[lane] = found
        for j in range(BLOCK, k, BLOCK):
            for lane in range(LANES):
                found = products(values, weights, j + lane, inverse, lanes[lane], more[lane])
                lanes[lane], more[lane] = found
        mixed, square = folded(lanes), folded(more)
        best = mixed / square
        if square > 0 and mixed > 0:
            return f32(best), best * mixed
        return scale, wide(0)

    def kernel(
        rows, n, k, signs, widest, importance, period, coarse, coarses, fine, fines, engine, least,
        values, weights, lanes, more, out,
    ):  # fmt: skip
        for i in range(n):
            sign = signs[i]
            column = (i % period) * k
            for j in range(k):
                values[j] = value(rows[i * k + j]) * sign
            for j in range(k):
                weights[j] = importance[column + j]
            first = widest[i]
            scale, most = fitted(values, weights, k, first, lanes, more)
            share = f32(1)
            for step in range(1, coarses):
                tried = nearest_scale(first * coarse[step], engine, least)
                found, explained = fitted(values, weights, k, tried, lanes, more)
                if explained > most:
                    scale, most, share = found, explained, coarse[step]
            for step in range(fines):
                tried = nearest_scale(first * (share + fine[step]), engine, least)
                found, explained = fitted(values, weights, k, tried, lanes, more)
                if explained > most:
                    scale, most = found, explained
            best, lowest = first, error(values, weights, k, first, lanes)
            for again in range(REFINEMENTS):
                if again:
                    scale, _ = fitted(values, weights, k, scale, lanes, more)
                scale = nearest_scale(scale, engine, least)
                found = error(values, weights, k, scale, lanes)
                if found < lowest:
                    best, lowest = scale, found
            out[i] = best

    totals = types.CPointer({"float32": types.float32, "float64": types.float64}[sums])
    return kernel, types.void(
        types.CPointer(element), COUNT, COUNT, FLOATS, FLOATS, FLOATS, COUNT, FLOATS, COUNT,
        FLOATS, COUNT, COUNT, types.float32, FLOATS, FLOATS, totals, totals, FLOATS,
    )  # fmt: skip


def encode_groups(dtype: str, to: str, by: str, wide: str) -> Any:
    """Codes of groups of 16 or 32 columns, and scales, see `quantize` in schemes/arithmetic/fp4.py.

    wide: the columns of a group. up: whether the first scale is the least that is not too small, or the
    nearest one; count: how many are tried. table: the scale of each code; behind the last one that is
    repeated, up to NaN at `last + WIDE`. errors: for groups of 16, ROWS rows for each code. inverses:
    the reciprocal of scale * whole for each code; with `errors` that of a row. sizes, steps, codes:
    space for a row, up to a multiple of the columns, zeros behind it; firsts: for a number of each
    group; space: WIDE infinite numbers, and as many more.
    """
    element, value, *_ = DTYPES[dtype]
    encoder, grid = ENCODERS[to], GRIDS[by]
    rounded, largest, code_of = encoder.rounded, encoder.largest, encoder.code
    above, nearest = grid.above, grid.nearest
    columns = int(wide)

    @inlined
    def clipped(x, start, inverse):
        quotients = load(x, start) * inverse
        error = quotients - rounded(bits_least(quotients, largest))
        return error * error

    @inlined
    def by_columns(x, start, inverse, space):
        """The error of 32 columns with one scale, with a column in each lane."""
        low = clipped(x, start, inverse) + clipped(x, start + 16, inverse)
        high = clipped(x, start + 8, inverse) + clipped(x, start + 24, inverse)
        store(space, WIDE, low + high)
        a, b = space[WIDE] + space[WIDE + 4], space[WIDE + 1] + space[WIDE + 5]
        c, d = space[WIDE + 2] + space[WIDE + 6], space[WIDE + 3] + space[WIDE + 7]
        return (a + c) + (b + d)

    @inlined
    def best_of_32(x, start, table, inverses, code, count, space):
        for place in range(count):
            space[place] = by_columns(x, start, spread(inverses[code + place]), space)
        ratios = load(table, code) / spread(table[code])
        return place_of_least(load(space, 0) * (ratios * ratios))

    def kernel(
        rows, n, k, whole, reach, up, count, least, last, table, inverses, sizes, steps, space,
        firsts, errors, codes, scales, packed,
    ):  # fmt: skip
        groups = (k + columns - 1) // columns
        octets = (k + 1) // 2
        for i in range(n):
            row = i * k
            for j in range(k):
                sizes[j] = as_f32(as_i32(value(rows[row + j])) & i32(0x7FFFFFFF))
            for group in range(groups):
                start = group * columns
                most = load(sizes, start)
                for j in range(start + WIDE, start + columns, WIDE):
                    most = bits_larger(most, load(sizes, j))
                firsts[group] = largest_bits(most)
            for group in range(groups):
                amax = as_f32(firsts[group])
                ideal = amax / whole / reach
                code = above(ideal) if up else nearest(ideal)
                code = min(max(code, i32(least)), i32(last))
                firsts[group] = code if firsts[group] < i32(0x7F800000) else i32(last + WIDE)
            if count > 1 and columns == 16:
                for group in range(groups):
                    inverse = spread(inverses[firsts[group]])
                    for j in range(group * columns, group * columns + columns, WIDE):
                        store(steps, j, inverse)
                for j in range(groups * columns):
                    codes[j] = u8(i32(min(sizes[j] * steps[j], f32(ROWS - 1))))
            for group in range(groups):
                start, code = group * columns, firsts[group]
                if count > 1 and code <= i32(last):
                    if columns == 16:
                        code += place_of_least_sum(errors, code * ROWS * WIDE, codes, start)
                    else:
                        code += best_of_32(sizes, start, table, inverses, code, count, space)
                scale = table[code]
                scales[i * groups + group] = scale
                step = spread(scale * whole)
                for j in range(start, start + columns, WIDE):
                    store(steps, j, step)
            for j in range(k):
                codes[j] = code_of(value(rows[row + j]) / steps[j])
            if k % 2:
                codes[k] = u8(0)
            for j in range(octets):
                packed[i * octets + j] = codes[2 * j] | (codes[2 * j + 1] << u8(4))

    return kernel, types.void(
        types.CPointer(element), COUNT, COUNT, types.float32, types.float32, *[COUNT] * 4,
        *[FLOATS] * 5, types.CPointer(types.int32), types.CPointer(types.int16), _OCTETS, FLOATS,
        _OCTETS,
    )  # fmt: skip


_ALL = (
    absmax_tiles, absmax_columns, extremes, encode, encode_groups, least_error, decode, pack_nibbles,
    unpack_nibbles,
)  # fmt: skip
KERNELS = {kernel.__name__: kernel for kernel in _ALL}
