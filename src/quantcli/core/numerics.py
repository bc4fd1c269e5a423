"""The words that schemes and targets share: what the numbers are, not who made them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

# "weight", "weight_scale": the tensors that a scheme makes of one weight.
Parts: TypeAlias = "dict[str, torch.Tensor]"
# "input_scale", "input_offset", "left_trans": what was measured or learned for one module.
Stats: TypeAlias = "Mapping[str, torch.Tensor]"
NO_STATS: Stats = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Operand:
    """How one side of a matmul is quantized, in the field's usual words.

    dtype:     what the codes are.
    per:       what shares a scale: a channel is an output row of a weight, a token a row of inputs,
               a tensor all of a weight or all that goes into one module, a group some columns of a
               row, a block some rows and columns.
    symmetric: no zero point.
    dynamic:   the scale is computed while serving.
    block:     rows and columns that share a scale, as (1, group_size) or (128, 128).
    """

    dtype: Literal["int4", "int8", "fp8_e4m3"]
    per: Literal["channel", "token", "tensor", "group", "block"]
    symmetric: bool = True
    dynamic: bool = False
    block: tuple[int, int] | None = None

    def __str__(self) -> str:
        of = " of " + " x ".join(map(str, self.block)) if self.block else ""
        more = (" asymmetric" * (not self.symmetric)) + (" dynamic" * self.dynamic)
        return f"{self.dtype} per {self.per}{of}{more}"


@dataclass(frozen=True, slots=True)
class Numerics:
    """What a quantized linear computes with. `input` is None where inputs stay float.

    prefill:   how the engine quantizes inputs outside of decoding, where that is different.
    transform: what the engine does to inputs before it quantizes them, and was undone in the weight.
    """

    weight: Operand
    input: Operand | None
    prefill: Operand | None = None
    transform: Literal["kronecker"] | None = None

    def __str__(self) -> str:
        inputs = str(self.input) if self.input else "float inputs"
        more = f" ({self.prefill} in prefill)" if self.prefill else ""
        transform = f", inputs transformed ({self.transform})" if self.transform else ""
        return f"{self.weight} x {inputs}{more}{transform}"


@dataclass(frozen=True, slots=True)
class Module:
    """A module with a `.weight`, as a target sees it. `numerics` is None where it stays float.

    measured: how its input is measured, in words; modules that share what is made of it must agree.
    """

    name: str  # without ".weight"
    shape: tuple[int, ...]  # of the weight: [out_features, in_features] for a linear
    numerics: Numerics | None
    measured: str = ""


def multiplier(input_scale: torch.Tensor) -> torch.Tensor:
    """What the engine multiplies inputs with: 1 / input_scale, rounded to the dtype of the scale.

    input_scale: [1] in the dtype in which the engine holds it. Returns float32 [1]. Inputs are thus
    quantized with a step of exactly 1 / multiplier, which bfloat16 makes up to 0.4 % another than
    input_scale.
    """
    return (1 / input_scale.float()).to(input_scale.dtype).float()


def decompose(k: int) -> tuple[int, int]:
    """(L, R), the sides of Kronecker transforms for k = L R inputs, as the engine finds them: a - b and
    a + b for the smallest a >= sqrt k with a^2 - k = b^2.

    Ends for every k: from a = (k + 1) / 2 on an odd k, k / 4 + 1 on a multiple of 4, is an answer.
    (0, 0) for k = 2 mod 4, which has none.
    """
    if k % 4 == 2:
        return 0, 0
    a = math.isqrt(k - 1) + 1 if k > 1 else 1
    while math.isqrt(a * a - k) ** 2 != a * a - k:
        a += 1
    b = math.isqrt(a * a - k)
    return a - b, a + b
