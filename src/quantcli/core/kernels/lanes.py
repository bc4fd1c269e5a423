"""Eight float32 side by side, as one value in compiled code. Imported only to compile.

LLVM turns loops into such code by itself, but not short ones: these it writes out number by number. On
a CPU with shorter vectors it takes several; the numbers are the same everywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from quantcli.core.kernels import WIDE as COUNT

_compiled: Any = intrinsic  # for callers a function of lanes
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_FLOAT, COUNT), ir.VectorType(_INT, COUNT)


class _Lanes(types.Type):
    """The type of such a value."""

    def __init__(self) -> None:
        super().__init__(name="lanes")


LANES_TYPE = _Lanes()


@register_model(_Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def _spread(builder: Any, scalar: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_INT, 0))
    zeros = ir.Constant(ir.VectorType(_INT, COUNT), None)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def _place(builder: Any, pointer: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), _FLOATS.as_pointer())


@_compiled
def load(typing: Any, pointer: Any, index: Any) -> Any:
    """COUNT numbers from `pointer[index]` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(builder, *arguments), align=4)

    return LANES_TYPE(types.CPointer(types.float32), types.int64), generate


@_compiled
def store(typing: Any, pointer: Any, index: Any, lanes: Any) -> Any:
    """The inverse."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, index, lanes = arguments
        builder.store(lanes, _place(builder, pointer, index), align=4)
        return context.get_dummy_value()

    return types.void(types.CPointer(types.float32), types.int64, LANES_TYPE), generate


@_compiled
def spread(typing: Any, number: Any) -> Any:
    """One number in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _spread(builder, arguments[0], _FLOATS)

    return LANES_TYPE(types.float32), generate


def _arithmetic(symbol: Any, name: str) -> None:
    """An operator of Python: IEEE arithmetic lane by lane."""

    @_compiled
    def compute(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments)

        return LANES_TYPE(LANES_TYPE, LANES_TYPE), generate

    # both without annotations, which numba compares
    overload(symbol)(lambda a, b: (lambda a, b: compute(a, b)) if a == b == LANES_TYPE else None)


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_symbol, _name)


def _on_bits(compute: Callable[[Any, Any, Any], Any]) -> Any:
    """A function of the bits of each lane and of an int32, the same for all."""

    @_compiled
    def on_bits(typing: Any, lanes: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            lanes, number = arguments
            other = _spread(builder, number, _INTS)
            found = compute(builder, builder.bitcast(lanes, _INTS), other)
            return builder.bitcast(found, _FLOATS)

        return LANES_TYPE(LANES_TYPE, types.int32), generate

    return on_bits


def _halved(builder: Any, lanes: Any, choose: Callable[[Any, Any], Any]) -> Any:
    """One number from all lanes: each of the upper half meets one of the lower, until one is left."""
    width = COUNT // 2
    while width:
        upper = [*range(width, 2 * width)] + [0] * (COUNT - width)
        order = ir.Constant(ir.VectorType(_INT, COUNT), upper)
        lanes = choose(lanes, builder.shuffle_vector(lanes, ir.Constant(_FLOATS, ir.Undefined), order))
        width //= 2
    return builder.extract_element(lanes, ir.Constant(_INT, 0))


@_compiled
def largest_bits(typing: Any, lanes: Any) -> Any:
    """The largest int32 among the bits of the lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(_halved(builder, arguments[0], partial(_larger, builder)), _INT)

    return types.int32(LANES_TYPE), generate


@_compiled
def place_of_least_sum(typing: Any, table: Any, start: Any, places: Any, first: Any) -> Any:
    """Of the sums over 16 rows of a table the place of the smallest, of equals the first.

    table: rows of COUNT int16, of which `start` says where the first begins; places[first], ... say
    which rows.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, start, places, first = arguments
        kind = ir.VectorType(ir.IntType(16), COUNT)
        wide = ir.IntType(64)
        total = None
        for j in range(16):
            place = builder.load(builder.gep(places, [builder.add(first, ir.Constant(wide, j))]))
            row = builder.add(start, builder.shl(builder.zext(place, wide), ir.Constant(wide, 3)))
            part = builder.load(builder.bitcast(builder.gep(table, [row]), kind.as_pointer()), align=2)
            total = part if total is None else builder.add(total, part)
        least, width = total, COUNT // 2
        while width:
            upper = [*range(width, 2 * width)] + [0] * (COUNT - width)
            order = ir.Constant(ir.VectorType(_INT, COUNT), upper)
            other = builder.shuffle_vector(least, ir.Constant(kind, ir.Undefined), order)
            least = builder.select(builder.icmp_signed("<", least, other), least, other)
            width //= 2
        least = _spread(builder, builder.extract_element(least, ir.Constant(_INT, 0)), kind)
        equal = builder.bitcast(builder.icmp_signed("==", total, least), ir.IntType(COUNT))
        return builder.cttz(builder.zext(equal, _INT), ir.Constant(ir.IntType(1), 1))

    pointers = types.CPointer(types.int16), types.CPointer(types.uint8)
    return types.int32(pointers[0], types.int64, pointers[1], types.int64), generate


@_compiled
def place_of_least(typing: Any, lanes: Any) -> Any:
    """The place of the smallest number; of equals the first, and 0 if there is NaN among them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def smaller(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered("<", a, b), a, b)

        (lanes,) = arguments
        least = _spread(builder, _halved(builder, lanes, smaller), _FLOATS)
        equal = builder.bitcast(builder.fcmp_ordered("==", lanes, least), ir.IntType(COUNT))
        some = builder.or_(builder.zext(equal, _INT), ir.Constant(_INT, 1 << COUNT))
        place = builder.cttz(some, ir.Constant(ir.IntType(1), 1))
        return builder.and_(place, ir.Constant(_INT, COUNT - 1))

    return types.int32(LANES_TYPE), generate


def _larger(builder: Any, a: Any, b: Any) -> Any:
    one, other = builder.bitcast(a, _INTS), builder.bitcast(b, _INTS)
    found = builder.select(builder.icmp_signed(">", one, other), one, other)
    return builder.bitcast(found, _FLOATS)


@_compiled
def bits_larger(typing: Any, a: Any, b: Any) -> Any:
    """Of each lane the one whose bits are the larger int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _larger(builder, *arguments)

    return LANES_TYPE(LANES_TYPE, LANES_TYPE), generate


bits_and = _on_bits(lambda builder, a, b: builder.and_(a, b))
bits_plus = _on_bits(lambda builder, a, b: builder.add(a, b))
bits_least = _on_bits(lambda builder, a, b: builder.select(builder.icmp_signed("<", a, b), a, b))
bits_most = _on_bits(lambda builder, a, b: builder.select(builder.icmp_signed(">", a, b), a, b))
