"""MXFP4 weights and inputs after a learned transform."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from quantcli.core.numerics import LARGEST_SIDE, NO_STATS, Numerics, Parts, Stats
from quantcli.schemes import flatquant
from quantcli.schemes.arithmetic import fp4, kronecker, mx, rounding, tiles
from quantcli.schemes.base import Bias, Learner, LearningTask
from quantcli.schemes.fp4 import MxFp4Weights
from quantcli.schemes.transformed import SHARED, Transformed

_BLOCKS = (1, 4, 2, 8, 16, 3, 6, 12, 32)  # that `auto` chooses from
_EMAX = 4.0  # the power of two below the largest code


class _FakeQuant(torch.autograd.Function):
    """y = e2m1(x / s) s for constant scales: dy/dx = 1, and 0 where x is over the largest code."""

    @staticmethod
    def forward(ctx: Any, groups: Tensor, scale: Tensor) -> Tensor:
        ratio = groups / scale
        ctx.save_for_backward(ratio.abs() <= fp4.LARGEST)
        return fp4.nearest(ratio).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


def fake_quant(values: Tensor, scale: Tensor) -> Tensor:
    """values [..., k] on the grid of the scales of their groups, [..., k / 32, 1], with gradients."""
    groups = tiles.cut(values, mx.SIDE)
    rounded: Tensor = _FakeQuant.apply(groups, scale)  # type: ignore[no-untyped-call]
    return rounded.flatten(-2)


def input_scale(values: Tensor) -> Tensor:
    """The scales that the kernel gives transformed inputs, float32 [..., k] -> [..., k / 32, 1]: with
    them the largest value of a group is at 4 to 8 steps, and clipped to 6."""
    amax = tiles.cut(values, mx.SIDE).abs().amax(-1, keepdim=True)
    return mx.rounded_down(amax, _EMAX)


class MxFp4Rounding(flatquant.Rounding):
    """Fp4 in groups of 32 with powers of two as scales."""

    clips: ClassVar[bool] = False

    def __init__(self, *, search: bool) -> None:
        """search: as `fp4.quantize` has it, for scales of weights."""
        self._search = search

    def inputs(self, values: Tensor, clip: Tensor) -> Tensor:
        """With the scales of the kernel; it does not clip."""
        return fake_quant(values, input_scale(values.detach()))

    def rows(self, rows: Tensor, clip: Tensor | None) -> Tensor:
        """With the scales that `quantize` will choose."""
        _, scale = fp4.quantize(rows.detach(), None, fp4.MXFP4, search=self._search)
        return fake_quant(rows, scale.unsqueeze(-1))


class MxFp4FlatQuant(Transformed, MxFp4Weights):
    """FlatQuant for MXFP4: inputs x are multiplied by a learned Kronecker product L x R, weights by its
    inverse; both are then fp4, with a power of two as a scale per 32 columns."""

    name: ClassVar[str] = "mxfp4_flatquant"

    blocks: Literal["auto"] | int = Field(
        "auto",
        description="equal blocks on the diagonal of L: so many devices can share the inputs of a "
        "module; auto: as many as the target needs",
    )
    fallback: Literal["mxfp8", "mxfp4", "mxfp4_fp8"] = Field(
        "mxfp8", description="the scheme of modules that the kernel cannot take"
    )

    @field_validator("blocks", mode="before")
    @classmethod
    def _number_of_blocks(cls, value: object) -> object:
        if value != "auto" and (type(value) is not int or not 1 <= value <= LARGEST_SIDE):
            raise ValueError(f"expected auto, or a number of 1 to {LARGEST_SIDE}")
        return value

    @classmethod
    def for_numerics(cls, numerics: Numerics) -> Self | None:
        """With the blocks that they have."""
        scheme = cls(blocks=numerics.blocks)
        return scheme if scheme.numerics == numerics else None

    @property
    def choices(self) -> tuple[Self, ...]:
        """One block first."""
        if self.blocks != "auto":
            return ()
        return tuple(self.model_copy(update={"blocks": blocks}) for blocks in _BLOCKS)

    @property
    def numerics(self) -> Numerics:
        """Fp4 per group of 32 x fp4 per token and group of 32, dynamic, inputs transformed."""
        blocks = 1 if self.blocks == "auto" else self.blocks
        inputs = replace(self.weights, dynamic=True)
        return Numerics(self.weights, inputs, transform="kronecker", blocks=blocks)

    @property
    def unserved(self) -> str:
        """The fallback."""
        return self.fallback

    def taught(self, task: LearningTask, lr: float) -> Learner:
        """Without clips: the kernel has none for fp4."""
        grid = MxFp4Rounding(search=self.searches_scales)
        return flatquant.KroneckerLearner(task, grid, lr, self.alpha, blocks=self.numerics.blocks)

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Of the transformed rows, packed codes uint8 [..., n, k / 2] and weight_scale float32 [..., n,
        k / 32]; left_trans, right_trans, clip_ratio as `constants` has them."""
        parts = super().quantize(self.to_round(rows, constants), engine_dtype, constants)
        return parts | {name: constants[name].to(rows.device) for name in SHARED}

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """The kernel `npu_kronecker_quant` with fp4 codes, then a product of both sides.

        t = bf16(L^T (X R)); of each 32 values the scale is 2^(floor(log2 max |t|) - 2), and the codes
        are the nearest to t / scale, half to even, up to 6. No kernel for fp4 reads `clip_ratio`.
        Sources: ops-nn e5c3fa93, quant/flat_quant/op_kernel/arch35/flat_quant_high_v2.h:176-215 and
        matmul/common/cmct/epilogue/block_epilogue_flat_quant.h:140-173,442-486; vllm-ascend 182b75ea84,
        quantization/methods/w4a4_mxfp4_flatquant.py:113-153.
        """
        read = kronecker.served(x, parts["left_trans"], parts["right_trans"], torch.bfloat16)
        rounded = fake_quant(read, input_scale(read))
        weight = MxFp4Weights.dequantize(self, parts)
        return rounding.add_bias(rounded @ weight.mT, bias, x.dtype)
