"""The vocabulary that schemes and targets share: how a linear is quantized, without its origin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from quantcli.core.number_types import ELEMENTS, SCALES, ElementType, ScaleRule, ScaleType

if TYPE_CHECKING:
    import torch

# Tensors that a scheme makes of one weight, by name: "weight", "weight_scale".
Parts: TypeAlias = "dict[str, torch.Tensor]"
# Tensors that calibration keeps for one module, by name: "input_scale", "input_offset", "left_trans".
Stats: TypeAlias = "Mapping[str, torch.Tensor]"


class Empty(Mapping[str, Any]):
    """A mapping without anything in it, that nobody can change."""

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __reduce__(self) -> str:
        return "EMPTY"


EMPTY = Empty()
NO_STATS: Stats = EMPTY


@dataclass(frozen=True, slots=True)
class Operand:
    """How one side of a matrix multiplication is quantized.

    dtype:     of the codes, by its name in ELEMENTS.
    per:       the values that share a scale: a channel is an output row of a weight, a token a row of
               inputs, a tensor a whole weight or all inputs of a module, a group some columns of a row,
               a block some rows and columns.
    symmetric: without a zero point.
    dynamic:   the engine computes the scale while it serves.
    block:     the rows and columns that share a scale, such as (1, group_size) or (128, 128).
    scale:     type of the scales, by its name in SCALES; None: floats of the engine's choice.
    global_scale: a float32 scale of the whole weight comes on top, `weight_global_scale` [1] among a
               scheme's parts: codes stand for code * weight_scale * weight_global_scale.
    """

    dtype: str
    per: Literal["channel", "token", "tensor", "group", "block"]
    symmetric: bool = True
    dynamic: bool = False
    block: tuple[int, int] | None = None
    scale: str | None = None
    global_scale: bool = False

    def __str__(self) -> str:
        of = " of " + " x ".join(map(str, self.block)) if self.block else ""
        more = (" asymmetric" * (not self.symmetric)) + (" dynamic" * self.dynamic)
        scales = f", {self.scale} scales" if self.scale else ""
        scales += ", a global scale" if self.global_scale else ""
        return f"{self.dtype} per {self.per}{of}{more}{scales}"

    @property
    def element(self) -> ElementType:
        """The type of the codes."""
        return ELEMENTS[self.dtype]

    @property
    def scale_type(self) -> ScaleType | None:
        """The type of the scales; None: floats of the engine's choice."""
        return SCALES[self.scale] if self.scale else None

    @property
    def scale_rule(self) -> ScaleRule:
        """The rule for stored scales."""
        usual = self.element.scales if self.symmetric else "positive"  # zero points need no other sign
        return (self.scale_type and self.scale_type.rule) or usual

    @property
    def group_size(self) -> int | None:
        """Columns of a row that share a scale; None if the operand has no groups."""
        return self.block[1] if self.per == "group" and self.block else None


# Weights of the formats that several engines load; inputs are the same, but dynamic. Sources: OCP
# Microscaling Formats (MX) Specification 1.0, section 5.2; for NVFP4 vllm 0.32.0,
# model_executor/layers/quantization/utils/nvfp4_emulation_utils.py.
MXFP8 = Operand("fp8_e4m3", "group", block=(1, 32), scale="e8m0")
MXFP4 = Operand("fp4_e2m1", "group", block=(1, 32), scale="e8m0")
NVFP4 = Operand("fp4_e2m1", "group", block=(1, 16), scale="e4m3", global_scale=True)


@dataclass(frozen=True, slots=True)
class Numerics:
    """How both sides of a quantized linear are quantized. `input` is None if inputs stay float.

    prefill:   how the engine quantizes inputs during prefill, if that differs from decoding.
    transform: a transform that the engine applies to inputs before it quantizes them; the weight
               contains its inverse.
    blocks:    equal blocks on the diagonal of the left transform, outside of which it is zero: inputs
               can be split between them.
    """

    weight: Operand
    input: Operand | None
    prefill: Operand | None = None
    transform: Literal["kronecker"] | None = None
    blocks: int = 1

    def __str__(self) -> str:
        inputs = str(self.input) if self.input else "float inputs"
        more = f" ({self.prefill} in prefill)" if self.prefill else ""
        blocks = f" in {self.blocks} blocks" if self.blocks > 1 else ""
        transform = f", inputs transformed ({self.transform}{blocks})" if self.transform else ""
        return f"{self.weight} x {inputs}{more}{transform}"


@dataclass(frozen=True, slots=True)
class Module:
    """A module with a `.weight`, as a target sees it. `numerics` is None if it stays float.

    measured: a description of how its input is measured. Siblings that share the result, such as one
              input_scale, must have the same.
    biased:   whether it has a `.bias`.
    """

    name: str  # without ".weight"
    shape: tuple[int, ...]  # of the weight: [out_features, in_features] for a linear
    numerics: Numerics | None
    measured: str = ""
    biased: bool = False


@dataclass(frozen=True, slots=True)
class Cache:
    """How the cache of keys and values is quantized: symmetric, by scales that the checkpoint holds.

    dtype: of the codes, by its name in ELEMENTS.
    per:   the keys of a layer that share a scale, and likewise the values: all of them, those of a
           head, or those of a channel of a head.
    """

    dtype: str
    per: Literal["tensor", "head", "channel"]

    def __str__(self) -> str:
        return f"{self.dtype} per {self.per}"

    @property
    def element(self) -> ElementType:
        """The type of the codes."""
        return ELEMENTS[self.dtype]


# By their names in recipes.
CACHES: Mapping[str, Cache] = {
    "fp8": Cache("fp8_e4m3", "tensor"),
    "fp8_per_head": Cache("fp8_e4m3", "head"),
    "c8": Cache("int8", "channel"),
}
# `c8` of latents, which attention makes keys and values from: one scale for a layer.
LATENTS = Cache("int8", "tensor")


def multiplier(input_scale: torch.Tensor) -> torch.Tensor:
    """The factor of inputs in the engine: 1 / input_scale, rounded to the dtype of the scale.

    input_scale: [1] in the engine dtype. Returns float32 [1]. The step of quantized inputs is exactly
    1 / multiplier, which in bfloat16 can differ from input_scale by up to 0.4 %. Source: vllm-ascend
    182b75ea84, quantization/methods/w8a8_static.py:122-141.
    """
    return (1 / input_scale.float()).to(input_scale.dtype).float()


# Of a Kronecker transform. Source: ops-nn e5c3fa93, quant/flat_quant/op_host/flat_quant_tiling.cpp:369.
LARGEST_SIDE = 256


def decompose(k: int, blocks: int = 1) -> tuple[int, int]:
    """The sides (L, R) of Kronecker transforms for k = L R inputs, as the engine computes them.

    Of one block: L = a - b and R = a + b for the smallest a >= sqrt(k) with a^2 - k = b^2 (Fermat's
    factorization). The search ends for every k: a = (k + 1) / 2 is a solution for odd k, a = k / 4 + 1
    for multiples of 4. k = 2 mod 4 has no solution: (0, 0).
    Of more blocks: R is that of k / blocks inputs, and L = k / R; (256, k / 256) if L were over 256.
    (0, 0) if k does not split into blocks and sides; a side over 256 is one that the engine refuses.

    Sources: get_decompose_dim in vllm-ascend 182b75ea84, quantization/methods/w4a4_flatquant.py:39-50
    and w4a4_mxfp4_flatquant.py:34-63,90-103.
    """
    if k % blocks or k // blocks % 4 == 2:
        return 0, 0
    left, right = _fermat(k // blocks)
    if left * blocks <= LARGEST_SIDE or blocks == 1 or right > LARGEST_SIDE:
        return left * blocks, right
    if k % LARGEST_SIDE or LARGEST_SIDE % blocks:
        return 0, 0
    return LARGEST_SIDE, k // LARGEST_SIDE


def _fermat(k: int) -> tuple[int, int]:
    a = math.isqrt(k - 1) + 1 if k > 1 else 1
    while math.isqrt(a * a - k) ** 2 != a * a - k:
        a += 1
    b = math.isqrt(a * a - k)
    return a - b, a + b
