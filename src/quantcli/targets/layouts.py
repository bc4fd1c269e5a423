"""What an engine registers for a quantized module, and how stored numbers stand for weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.core.numerics import Numerics

SLICES = -1  # in a shape: 1, or 16 where a bias is of slices of k
# n and k of the weight, and of Kronecker transforms the sides L and R
Sides: TypeAlias = tuple[int, int]
# what the numbers of a tensor must be: see verify.full
Values: TypeAlias = Literal[
    "codes", "int4", "fp8", "exponent", "positive", "bits", "zero", "integer", "finite", "ratio"
]
Blocks: TypeAlias = Mapping[str, Tensor]  # by suffix


@dataclass(frozen=True)
class Param:
    """One parameter of a module, by its suffix.

    dtypes:   safetensors dtypes that the loader takes over by value unharmed, the registered one first.
    shape:    of the parameter, from n and k.
    values:   what its numbers must be.
    rows:     of the weight, that one of its rows stands for; 0: the module has it once.
    required: the engine's memory is uninitialised where the file has none.
    shared:   the engine keeps one for all fused siblings.
    spread:   where one row is for many, `dequantize` takes it once for each of them.
    scalar:   one number, which may also be stored without a dimension.
    """

    suffix: str
    dtypes: tuple[str, ...]
    shape: Callable[[int, int], tuple[int, ...]]
    values: Values
    rows: int = 1
    required: bool = True
    shared: bool = False
    spread: bool = False
    scalar: bool = False

    def fits(self, shape: tuple[int, ...], n: int, k: int) -> bool:
        """Whether a stored shape is right for a weight of n x k."""
        expected = self.shape(n, k)
        if self.scalar and not shape:
            return True
        return len(expected) == len(shape) and all(
            have in ((1, 16) if want == SLICES else (want,))
            for want, have in zip(expected, shape, strict=True)
        )


@dataclass(frozen=True)
class Layout:
    """One label of an engine: its parameters, and what they stand for.

    dequantize: parameters of some rows -> the float weight that the kernel multiplies with, float32
                [rows, k], before any transform of inputs is undone.
    sides:      n and k of a stored weight's shape.
    kind:       the codes' type as text: int8, int4, fp8_e4m3, mxfp8.
    note:       where it loads, if that is not simple.
    """

    label: str
    kind: str
    params: tuple[Param, ...]
    dequantize: Callable[[Blocks], Tensor]
    sides: Callable[[tuple[int, ...]], Sides]
    linear: bool = True
    experts: bool = False
    note: str | None = None

    @property
    def weight(self) -> Param:
        """The codes."""
        return self.params[0]


@dataclass(frozen=True)
class StoredModule:
    """A quantized module as it is on disk.

    tensors:  by suffix; all that begin with the module's name.
    shape:    n, k.
    numerics: what is computed with it; None where that is not known.
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
    def codes(self) -> StoredTensor:
        """The tensor with the codes of the weight."""
        return self.tensors[self.layout.weight.suffix]


def own_names(tensors: Collection[str], modules: Mapping[str, StoredModule]) -> set[str]:
    """Tensors with a meaning of their own: a quantized module counts as its `.weight` and `.bias`."""
    parts = {
        stored.spec.name
        for module in modules.values()
        for suffix, stored in module.tensors.items()
        if suffix != "bias"
    }
    return (set(tensors) - parts) | {f"{name}.weight" for name in modules}
