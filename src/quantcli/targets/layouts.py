"""The parameters that an engine registers for a quantized module, and the weights they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from quantcli.checkpoint.columns import STRIP_BYTES
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.number_types import CodeRule, ScaleRule
from quantcli.core.numerics import Numerics, Operand

SLICES = -1  # in a shape: 1, or 16 for a bias of slices of k
Sides: TypeAlias = tuple[int, int]  # n and k of the weight
# dtypes of a parameter that loaders copy by value: a wider float is rounded
FLOAT_PARAM = ("F32", "BF16", "F16")
# rules for the numbers of a tensor: see verification/full.py
Values: TypeAlias = (
    CodeRule
    | ScaleRule
    | Literal["bits", "zero", "integer", "finite", "ratio", "divisor", "multiplier"]
)
Blocks: TypeAlias = Mapping[str, Tensor]  # by suffix


@dataclass(frozen=True)
class Param:
    """One parameter of a module, by its suffix.

    dtypes:   safetensors dtypes that the loader copies by value without harm, the registered one first.
    shape:    of the parameter, from n and k.
    values:   the rule for its numbers.
    rows:     rows of the weight for each of its elements along `axis`; 0: the module has it once.
    axis:     the dimension along which rows of the weight lie: 0, or 1 of a matrix.
    part:     the part of a scheme that it holds, if that has another name: "weight_scale".
    required: the engine's memory stays uninitialised if no file holds it.
    shared:   the engine keeps one for all fused siblings; and
    of_experts: also for the gate and up matrices of an expert. It takes one of different values.
    spread:   `dequantize` takes a row that many rows share once for each of them.
    scalar:   one number, which may also be stored without a dimension.
    serving:  the engine casts it to the serving dtype before it computes with it.
    """

    suffix: str
    dtypes: tuple[str, ...]
    shape: Callable[[int, int], tuple[int, ...]]
    values: Values
    rows: int = 1
    axis: int = 0
    part: str = ""
    required: bool = True
    shared: bool = False
    of_experts: bool = False
    spread: bool = False
    scalar: bool = False
    serving: bool = False

    def fits(self, shape: tuple[int, ...], n: int, k: int) -> bool:
        """Whether a stored shape is right for a weight of n x k."""
        expected = self.shape(n, k)
        if self.scalar and not shape:
            return True
        return len(expected) == len(shape) and all(
            size in ((1, 16) if expected_size == SLICES else (expected_size,))
            for expected_size, size in zip(expected, shape, strict=True)
        )


@dataclass(frozen=True)
class Output:
    """A tensor that is written for a module: its place for each row of the weight.

    axis, rows: as those of its `Param`.
    """

    spec: TensorSpec
    axis: int = 0
    rows: int = 1

    def of(self, module: str) -> Output:
        """The same tensor with the name of a module in front of its own."""
        return Output(self.spec.named(f"{module}.{self.spec.name}"), self.axis, self.rows)

    def first(self, row: int) -> int:
        """Its element along `axis` for a row of the weight; row: a multiple of `rows`."""
        return row // self.rows if self.rows else 0


def plain(shape: tuple[int, ...]) -> Sides:
    """The sides of a weight with one code in each stored element."""
    return shape[0], shape[1]


@dataclass(frozen=True)
class Layout:
    """One label of an engine: its parameters, and the weight that they stand for.

    operand:    the type of the codes, and what shares a scale of which type.
    params:     the codes first.
    dequantize: parameters of some rows -> the float weight that the kernel multiplies with, float32
                [rows, k], before any transform of inputs is undone.
    sides:      the shape of stored codes -> n and k of the weight.
    experts:    the engine has it for experts of a mixture, too.
    note:       a note on engines that load it.
    """

    label: str
    operand: Operand
    params: tuple[Param, ...]
    dequantize: Callable[[Blocks], Tensor]
    sides: Callable[[tuple[int, ...]], Sides] = plain
    experts: bool = False
    note: str | None = None

    @property
    def weight(self) -> Param:
        """The codes."""
        return self.params[0]

    @property
    def row_multiple(self) -> int:
        """Rows that share an element of some parameter: blocks of rows begin at multiples of it."""
        return math.lcm(*(param.rows for param in self.params if param.rows))

    @property
    def signed(self) -> bool:
        """Whether scales of either sign are taken."""
        return any(param.values == "signed" for param in self.params)


@dataclass(frozen=True)
class StoredModule:
    """A quantized module as it is on disk.

    tensors:  the registered ones, by suffix.
    shape:    n, k.
    numerics: as the engine computes; None if this tool has no name for them.
    """

    name: str
    layout: Layout
    tensors: Mapping[str, StoredTensor]
    shape: Sides
    serving_dtype: str
    numerics: Numerics | None = None

    @property
    def row_params(self) -> list[Param]:
        """Stored parameters with one value, or one row, per row of the weight."""
        return [p for p in self.layout.params if p.suffix in self.tensors and p.rows]

    @property
    def constants(self) -> list[Param]:
        """Stored parameters that the whole module has once."""
        return [p for p in self.layout.params if p.suffix in self.tensors and not p.rows]

    @property
    def buffer_nbytes(self) -> int:
        """Bytes that a reader of its rows keeps in addition to those that it returns."""
        across = (self.tensors[p.suffix].spec.nbytes for p in self.row_params if p.axis)
        return sum(min(STRIP_BYTES, nbytes) for nbytes in across)

    @property
    def codes(self) -> StoredTensor:
        """The tensor with the codes of the weight."""
        return self.tensors[self.layout.weight.suffix]


def codes_param(operand: Operand) -> Param:
    """Codes as `weight`, as their type is stored."""
    element = operand.element
    shape = lambda n, k: (n, -(-k // element.per_byte))  # noqa: E731
    return Param("weight", (element.dtype,), shape, element.rule)


def code_sides(operand: Operand) -> Callable[[tuple[int, ...]], Sides]:
    """The shape of codes as `weight` -> n and k."""
    per_byte = operand.element.per_byte
    return lambda shape: (shape[0], shape[1] * per_byte)


def row_scale(operand: Operand) -> Param:
    """`weight_scale` of rows or of groups of their columns: [n, 1], or [n, ceil(k / group_size)]."""
    size, kind = operand.group_size, operand.scale_type
    shape = lambda n, k: (n, -(-k // size) if size else 1)  # noqa: E731
    return Param("weight_scale", (kind.stored,) if kind else FLOAT_PARAM, shape, operand.scale_rule)


def module_scale(suffix: str, dtypes: tuple[str, ...] = FLOAT_PARAM, *, shared: bool = False) -> Param:
    """A scale [1] of a whole module."""
    return Param(suffix, dtypes, lambda n, k: (1,), "positive", 0, shared=shared, scalar=True)


def global_scale(suffix: str, values: Values = "positive") -> Param:
    """A scale [1] on top of a module's other scales, of weights or of inputs."""
    one = lambda n, k: (1,)  # noqa: E731
    return Param(suffix, FLOAT_PARAM, one, values, 0, shared=True, of_experts=True, scalar=True)


def block_scale(suffix: str, dtypes: tuple[str, ...], rows: int, columns: int) -> Param:
    """One scale for each rows x columns of the weight: [ceil(n / rows), ceil(k / columns)]."""
    shape = lambda n, k: (-(-n // rows), -(-k // columns))  # noqa: E731
    return Param(suffix, dtypes, shape, "positive", rows, part="weight_scale", spread=True)


def stray_signs(scale: Tensor) -> Tensor:
    """Which of some scales are negative although nearly all others are positive: damage, in any shape.

    Some producers give a row whose largest weight is positive a negative scale, as codes reach one step
    further below zero: half of all rows, so that a share of an eighth is far from chance. Of fewer than
    eight scales none is stray: with both signs among so few, either may be right.
    """
    negative = scale < 0
    frequent = 8 * int(negative.sum()) >= scale.numel()
    return negative & (not frequent)


def static_inputs(numerics: Numerics) -> bool:
    """Whether inputs are quantized with a stored scale."""
    return numerics.input is not None and not numerics.input.dynamic


def own_names(
    tensors: Collection[str], modules: Mapping[str, StoredModule], unchecked: Collection[str] = ()
) -> set[str]:
    """Names of tensors, in which a quantized module counts as its `.weight` and `.bias` alone.

    unchecked: names of more quantized modules, whose parts are not known.
    """
    others = set(unchecked)
    parts = {
        name for name in tensors if name.rpartition(".")[0] in others and not name.endswith(".bias")
    }
    parts |= {
        stored.spec.name
        for module in modules.values()
        for suffix, stored in module.tensors.items()
        if suffix != "bias"
    }
    return (set(tensors) - parts) | {f"{name}.weight" for name in [*modules, *others]}
