"""Int4 weights and int4 inputs after Hadamard matrices, no data needed: for inputs that no rotation of
the model evens out, such as those of down_proj."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from quantcli.checkpoint.rotation.orthogonal import Hadamard, matrix_of
from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS, Numerics, Parts, Stats, decompose
from quantcli.schemes import flatquant
from quantcli.schemes.arithmetic import kronecker
from quantcli.schemes.base import Bias
from quantcli.schemes.integer import Int4Weights
from quantcli.schemes.w4a4_flatquant import W4A4FlatQuant

_SERVED = W4A4FlatQuant()  # by the same kernel


class W4A4Hadamard(Int4Weights):
    """Inputs x are multiplied by a Kronecker product of two Hadamard matrices with random signs,
    weights by its inverse; both are then int4. Source: QuaRot, Ashkboos et al. 2024.

    Each token's values become sums of all of them, with no outliers. The engine multiplies with both
    matrices, as for FlatQuant.
    """

    name: ClassVar[str] = "w4a4_hadamard"

    clip: Literal["mse", "none"] = Field(  # columns are all alike
        "mse",
        description="largest weights of a row: mse cuts them off where the squared error is least",
    )
    clip_ratio: float = Field(
        1.0, gt=0, le=1, description="share of the range of a token's inputs that is kept"
    )
    fallback: Literal["w8a8_dynamic", "w4a4_dynamic"] = Field(
        "w8a8_dynamic", description="the scheme of modules that the kernel cannot take"
    )

    @property
    def numerics(self) -> Numerics:
        """Int4 per channel x int4 per token, dynamic, inputs transformed."""
        return _SERVED.numerics

    @property
    def unserved(self) -> str:
        """The fallback."""
        return self.fallback

    @property
    def when_calibrating(self) -> Self:
        """As it is: its columns are all alike."""
        return self

    @property
    def needs_column_amax(self) -> bool:
        """No column counts more than another."""
        return False

    def constants(self, stats: Stats, engine_dtype: torch.dtype) -> Parts:
        """`serving`, a tensor without elements in the dtype of the transforms."""
        return {**super().constants(stats, engine_dtype), "serving": torch.empty(0, dtype=engine_dtype)}

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes int8 [..., n, k] in -8..7 and weight_scale float32 [..., n, 1] of the transformed rows;
        left_trans [l, l] and right_trans [r, r] in the serving dtype, clip_ratio float32 [1]."""
        left, right = _transforms(rows.shape[-1], constants["serving"].dtype)
        parts = super().quantize(self.to_round(rows, constants), torch.float32, constants, bias)
        shared = {
            "left_trans": left,
            "right_trans": right,
            "clip_ratio": torch.tensor([self.clip_ratio]),
        }
        return {**parts, **{name: tensor.to(rows.device) for name, tensor in shared.items()}}

    def to_round(self, rows: Tensor, constants: Stats) -> Tensor:
        """The transformed weight [..., n, k], in float32."""
        left, right = _transforms(rows.shape[-1], constants["serving"].dtype)
        inverses = kronecker.inverse(left, "left_trans"), kronecker.inverse(right, "right_trans")
        return kronecker.undo(rows, *inverses)

    def as_read(self, x: Tensor, constants: Stats) -> Tensor:
        """Transformed inputs [..., k], in float32: L^T X R."""
        left, right = _transforms(x.shape[-1], constants["serving"].dtype)
        return kronecker.redo(x, left.mT.to(x.device), right.mT.to(x.device))

    def as_rounded(self, x: Tensor, constants: Stats) -> Tensor:
        """Transformed inputs [..., k] in 4 bits, in float32."""
        left, right = (t.to(x.device) for t in _transforms(x.shape[-1], constants["serving"].dtype))
        clip = torch.tensor([self.clip_ratio], device=x.device)
        codes, scale = flatquant.quantize_tokens(kronecker.served(x, left, right), clip)
        return codes * scale

    def dequantize(self, parts: Parts) -> Tensor:
        """The weight that the product amounts to, its transform undone: float32 [..., n, k]."""
        return _SERVED.dequantize(parts)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """The kernel `npu_kronecker_quant`, then an int4 product: see `W4A4FlatQuant`."""
        return _SERVED.forward(x, parts, bias)


@lru_cache(64)
def _transforms(k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """left_trans and right_trans for k inputs: Hadamard matrices over the root of their sides, rounded
    to `dtype`. InputError for k that the engine does not decompose."""
    sides = decompose(k)
    if not all(sides):
        raise InputError(f"{k} inputs have no decomposition into two sides by the engine's rule")
    left, right = (matrix_of(Hadamard(side, name)) for side, name in zip(sides, "lr", strict=True))
    return left.to(dtype), right.to(dtype)
