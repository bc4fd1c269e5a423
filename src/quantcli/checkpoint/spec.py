"""Name, dtype and shape: all that a header says about a tensor. Imports no torch until asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantcli.core.errors import MachineError

if TYPE_CHECKING:
    import torch

# safetensors dtype -> (bits an element takes, name of the torch dtype)
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, "float4_e2m1fn_x2"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "F32": (32, "float32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
}
FLOATS = frozenset({"BF16", "F16", "F32"})  # what a float checkpoint keeps its weights in
FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # as config.json spells them


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a safetensors header. `dtype` is the safetensors name, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int = field(init=False, repr=False, compare=False)  # of the whole tensor

    def __post_init__(self) -> None:
        # asked for a million times while a large model is planned
        object.__setattr__(self, "nbytes", math.prod(self.shape) * DTYPES[self.dtype][0] // 8)

    def named(self, name: str) -> TensorSpec:
        """The same under another name; a third of the time that making one takes."""
        spec = object.__new__(TensorSpec)
        put = object.__setattr__
        put(spec, "name", name)
        put(spec, "dtype", self.dtype)
        put(spec, "shape", self.shape)
        put(spec, "nbytes", self.nbytes)
        return spec

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> float:
        """Bytes an element takes (0.5 for 4-bit types)."""
        return DTYPES[self.dtype][0] / 8

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, that is of one index of the first dimension."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; MachineError where this torch has none."""
    import torch

    kind = getattr(torch, DTYPES[dtype][1], None)
    if kind is None:
        raise MachineError(
            f"torch {torch.__version__} cannot hold {dtype}", fix="install a newer torch"
        )
    assert isinstance(kind, torch.dtype)
    return kind


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype; torch's own for one that files cannot have."""
    name = str(dtype).removeprefix("torch.")
    return next((key for key, (_, torch_name) in DTYPES.items() if torch_name == name), name)
