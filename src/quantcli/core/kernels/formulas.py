"""Numbers in compiled code: how values are read, and which code or scale is the nearest.

An entry of ENCODERS is all that a type of codes needs here. Imported only to compile: numba takes a
third of a second to import.

Everything is exact IEEE arithmetic in float32: numba neither reorders nor fuses it (`fastmath` is off,
and LLVM contracts no operations by itself), so that every CPU gives the numbers that torch gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from quantcli.core.kernels.lanes import bits_and, bits_most, bits_plus

f32, i32, u8, i8, u16, i16 = np.float32, np.int32, np.uint8, np.int8, np.uint16, np.int16


def _bitcast(source: Any, result: Any) -> Any:
    """The bits of a number as another type of the same size."""

    def bits(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

        return result(source), generate

    return intrinsic(bits)


as_f32 = _bitcast(types.int32, types.float32)
as_i32 = _bitcast(types.float32, types.int32)


def helper(function: Callable[..., Any]) -> Any:
    """Compiled into its callers."""
    return njit(function, error_model="numpy", inline="never")


def inlined(function: Callable[..., Any]) -> Any:
    """The same, also if it is long."""
    return njit(function, error_model="numpy", inline="never", forceinline=True)


# --- source dtypes: value of bits, magnitude of the largest bits ---


@helper
def bf16_value(bits):
    return as_f32(i32(bits) << i32(16))


@helper
def f16_value(bits):
    """Through the position of its bits in a float32, 2^112 times as small; Inf and NaN by hand."""
    wide = i32(bits)
    magnitude = wide & i32(0x7FFF)
    value = as_i32(as_f32(magnitude << i32(13)) * f32(2.0**112))
    if magnitude >= i32(0x7C00):
        value = (magnitude << i32(13)) | i32(0x7F800000)
    return as_f32(value | ((wide & i32(0x8000)) << i32(16)))


@helper
def f32_value(value):
    return value


@helper
def magnitude16(bits):
    return bits & u16(0x7FFF)


@helper
def magnitude32(value):
    return as_i32(value) & i32(0x7FFFFFFF)


@helper
def ordered16(bits):
    return i16(bits)


@helper
def negated16(bits):
    return i16(bits ^ u16(0x8000))


@helper
def ordered32(value):
    return as_i32(value)


@helper
def negated32(value):
    return as_i32(-value)


@helper
def same(bits):
    return as_f32(bits)


class Dtype(NamedTuple):
    """How compiled code reads a float dtype.

    element:   numba's type of a stored number.
    value:     its float32.
    magnitude: an integer that orders as the number without its sign; NaN and Inf come out on top.
    largest:   the float32 of such an integer.
    zero:      the integer of 0.
    ordered:   a signed integer: that of a positive number, and a negative one for all others.
    negated:   that of the number times -1.
    none:      a zero of these.
    """

    element: Any
    value: Any
    magnitude: Any
    largest: Any
    zero: Any
    ordered: Any
    negated: Any
    none: Any


DTYPES = {
    "bfloat16": Dtype(
        types.uint16, bf16_value, magnitude16, bf16_value, u16(0), ordered16, negated16, i16(0)
    ),
    "float16": Dtype(
        types.uint16, f16_value, magnitude16, f16_value, u16(0), ordered16, negated16, i16(0)
    ),
    "float32": Dtype(types.float32, f32_value, magnitude32, same, i32(0), ordered32, negated32, i32(0)),
}


# --- scales: positive numbers of the dtype in which an engine holds them ---


@helper
def to_bfloat16(x):
    """Bits of the nearest bfloat16 of a number that is not negative; NaN stays NaN."""
    bits = as_i32(x)
    if bits > i32(0x7F800000):
        return i32(0x7FC0)
    return (bits + i32(0x7FFF) + ((bits >> i32(16)) & i32(1))) >> i32(16)


@helper
def to_float16(x):
    """Bits of the nearest float16 of a number that is not negative; NaN stays NaN."""
    bits = as_i32(x)
    if bits > i32(0x7F800000):
        return i32(0x7E00)
    if bits >= i32(0x47800000):  # 2^16
        return i32(0x7C00)
    if bits < i32(0x38800000):  # 2^-14: the sum has steps of 2^-24, as subnormal numbers have
        return as_i32(x + f32(0.5)) - i32(0x3F000000)
    return (bits - i32(112 << 23) + i32(0xFFF) + ((bits >> i32(13)) & i32(1))) >> i32(13)


@helper
def nearest_scale(x, engine, least):
    """The nearest number of an engine dtype, at least `least`.

    engine: 0 float32, 1 bfloat16, 2 float16.
    """
    y = x
    if engine == 1:
        y = bf16_value(to_bfloat16(x))
    elif engine == 2:
        y = f16_value(to_float16(x))
    return least if y < least else y


# --- codes ---


class Encoder(NamedTuple):
    """A type of codes in compiled code.

    element: numba's type of a stored code.
    nearest: float32 -> the nearest number of the type, float32; half to even, clipped.
    code:    float32 -> the code of that number.
    value:   a code -> its number, float32.
    stored:  codes in a stored byte, the first in its low bits.
    rounded: lanes that are not negative -> the nearest numbers, half to even, not clipped.
    largest: bits of the largest number.
    """

    element: Any
    nearest: Any
    code: Any
    value: Any
    stored: int = 1
    rounded: Any = None
    largest: Any = None


def _integers(least, largest):
    least, largest = f32(least), f32(largest)

    @helper
    def nearest(x):
        y = np.rint(x)
        y = least if y < least else y
        return largest if y > largest else y

    @helper
    def code(x):
        return i8(i32(nearest(x)))

    @helper
    def value(code):
        return f32(code)

    return Encoder(types.int8, nearest, code, value)


def _floats(mantissa, least, largest, bits):
    """Small floats with a sign, an exponent and `mantissa` bits; subnormal below 2^least.

    A number between two powers of two has steps of 2^-mantissa of the lower one, and below 2^least
    those of 2^least. The power of two that is 2^(23 - mantissa) times as large has the same steps in
    float32, so that a sum with it is rounded to them, half to even.
    """
    shift = i32(23 - mantissa)
    least_power = i32((127 + least) << 23)
    lift = i32((23 - mantissa) << 23)
    largest_bits = i32(np.float32(largest).view(np.int32))
    sign = i32(1 << (bits - 1))
    to_sign = i32(32 - bits)
    magnitudes = sign - i32(1)
    unit = f32(2.0 ** (126 + least))
    nan = i32(0x7F) if bits == 8 else i32(-1)

    @helper
    def clipped(x):
        """Bits of |x|, clipped."""
        found = as_i32(x) & i32(0x7FFFFFFF)
        return largest_bits if found > largest_bits else found

    @helper
    def lifted(found):
        """Bits of the power of two to which |x| is added."""
        power = found & i32(0x7F800000)
        return (least_power if power < least_power else power) + lift

    @helper
    def rounded(x):
        power = bits_plus(bits_most(bits_and(x, i32(0x7F800000)), least_power), lift)
        return (x + power) - power

    @helper
    def nearest(x):
        found = clipped(x)
        power = as_f32(lifted(found))
        magnitude = (as_f32(found) + power) - power
        return as_f32(as_i32(magnitude) | (as_i32(x) & i32(-(2**31))))

    @helper
    def code(x):
        found = clipped(x)
        power = lifted(found)
        steps = as_i32(as_f32(found) + as_f32(power)) - power
        magnitude = ((power - least_power - lift) >> shift) + steps
        return u8(magnitude | ((as_i32(x) >> to_sign) & sign))

    @helper
    def value(code):
        """Its bits, moved to where float32 has them, are the number times a power of two."""
        wide = i32(code)
        magnitude = i32(wide & magnitudes)
        found = i32(as_i32(as_f32(i32(magnitude << shift)) * unit))
        found = i32(0x7FC00000) if magnitude == nan else found
        return as_f32(i32(found | i32(i32(wide & sign) << to_sign)))

    return Encoder(types.uint8, nearest, code, value, 8 // bits, rounded, largest_bits)


ENCODERS = {
    "int4": _integers(-8, 7),
    "int8": _integers(-128, 127),
    "fp8_e4m3": _floats(3, -6, 448.0, 8),
    "fp4_e2m1": _floats(1, 0, 6.0, 4),
}


# --- scales of a few numbers, in the order of their codes ---


class Grid(NamedTuple):
    """A type of scales in compiled code.

    above:   positive float32 -> the code of the least scale that is not below it, or a larger one.
    nearest: the code of the nearest scale.
    """

    above: Any
    nearest: Any


_e4m3_code, _e4m3_value = ENCODERS["fp8_e4m3"].code, ENCODERS["fp8_e4m3"].value


@helper
def _e4m3_above(x):
    code = i32(_e4m3_code(x))
    return code + i32(1) if _e4m3_value(code) < x else code


@helper
def _e4m3_nearest(x):
    return i32(_e4m3_code(x))


@helper
def _e8m0_above(x):
    """2^-127, code 0, is a subnormal float32."""
    bits = as_i32(x)
    if bits < i32(0x800000):
        return i32(bits > i32(0x400000))
    return (bits + i32(0x7FFFFF)) >> i32(23)


GRIDS = {
    "e4m3": Grid(_e4m3_above, _e4m3_nearest),
    "e8m0": Grid(_e8m0_above, _e8m0_above),
}
