"""Numbers of a type of codes: the nearest of them, and how they are stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quantcli.core.codes import code_values
from quantcli.core.number_types import ElementType
from quantcli.schemes.arithmetic import fp4

# of types that are not integers
_NEAREST: dict[str, Callable[[Tensor], Tensor]] = {"fp4_e2m1": fp4.nearest}


def nearest(values: Tensor, element: ElementType) -> Tensor:
    """The nearest numbers of a type, half to even, clipped: float32, in the shape of `values`, whose
    memory they may take. Integers or e2m1."""
    if element.family == "int":
        return values.round_().clamp_(element.least, element.largest)
    return _NEAREST[element.name](values)


def encode(numbers: Tensor, element: ElementType) -> Tensor:
    """The codes of numbers, float32 [..., k]: int8 [..., k], or uint8 [..., ceil(k / 2)] with two in a
    byte, that of the even column in the low bits."""
    if element.per_byte == 1:
        return numbers.to(torch.int8)
    return fp4.packed(F.pad(numbers, (0, numbers.shape[-1] % element.per_byte)))


def decode(codes: Tensor, element: ElementType, k: int) -> Tensor:
    """The inverse: the numbers of k columns, float32 [..., k]."""
    return code_values(codes, element)[..., :k]
