"""Int4 weights per channel and int4 inputs per token, which the engine rotates: needs no data."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantcli.checkpoint.rotation.orthogonal import Hadamard, matrix_of
from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS, Numerics, Parts, Stats, decompose
from quantcli.schemes import flatquant
from quantcli.schemes.arithmetic import kronecker
from quantcli.schemes.base import Bias
from quantcli.schemes.by_data import chosen
from quantcli.schemes.int4_kronecker import Int4Kronecker


class W4A4Hadamard(Int4Kronecker):
    """Inputs are multiplied by a Kronecker product of Hadamard matrices, which spreads each outlier
    over all channels, and weights by its inverse: FlatQuant's transform, with nothing to learn."""

    name: ClassVar[str] = "w4a4_hadamard"

    clip: Literal["mse", "none"] = Field(  # columns are mixed: none counts more than others
        "mse", description="largest weight of a row: mse cuts it off where the squared error is least"
    )
    input_clip: float = Field(
        0.9, gt=0, le=1, description="share of a token's largest input that the codes reach"
    )
    fallback: Literal["w4a4_dynamic", "w8a8_dynamic"] = Field(
        "w4a4_dynamic", description="the scheme of modules that the kernel cannot take"
    )

    @classmethod
    def for_numerics(cls, numerics: Numerics) -> None:
        """None: `w4a4_flatquant` has the same arithmetic, for any transform."""
        return

    @property
    def unserved(self) -> str:
        """The fallback."""
        return self.fallback

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes int8 [..., n, k] in -8..7 and weight_scale float32 [..., n, 1] of the rotated rows;
        left_trans and right_trans, bfloat16; clip_ratio float32 [1]."""
        left, right, _ = _transforms(rows.shape[-1])
        codes, scale = self.nearest(self.to_round(rows, constants), engine_dtype, constants)
        return {
            "weight": chosen(constants, codes),
            "weight_scale": scale,
            "left_trans": left.to(rows.device),
            "right_trans": right.to(rows.device),
            "clip_ratio": torch.full((1,), self.input_clip, device=rows.device),
        }

    def to_round(self, rows: Tensor, constants: Stats) -> Tensor:
        """The rotated weight [..., n, k], in float32."""
        inverses = (inverse.to(rows.device) for inverse in _transforms(rows.shape[-1])[2])
        return kronecker.undo(rows, *inverses)

    def as_read(self, x: Tensor, constants: Stats) -> Tensor:
        """Rotated inputs [..., k], in float32: L^T X R."""
        left, right, _ = _transforms(x.shape[-1])
        return kronecker.redo(x, left.to(x.device).mT, right.to(x.device).mT)

    def as_rounded(self, x: Tensor, constants: Stats) -> Tensor:
        """Rotated inputs [..., k] in 4 bits, in float32."""
        left, right, _ = _transforms(x.shape[-1])
        values = kronecker.served(x, left.to(x.device), right.to(x.device))
        clip = torch.full((1,), self.input_clip, device=x.device)
        codes, scale = flatquant.quantize_tokens(values, clip)
        return codes * scale

    def dequantize(self, parts: Parts) -> Tensor:
        """The weight that the product amounts to, its transform undone: float32 [..., n, k]."""
        return kronecker.redo(super().dequantize(parts), parts["left_trans"], parts["right_trans"])


@lru_cache(64)
def _transforms(k: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """L and R for k inputs, and their inverses in float64. InputError for a k that the engine cannot
    take apart.

    bfloat16: what it rounds entries to, float16 holds as well, so that either serving dtype has these
    numbers.
    """
    sizes = decompose(k)
    if not all(sizes):
        raise InputError(
            f"{k} inputs have no Kronecker transform",
            fix="keep this module float, or in another scheme",
        )
    sides = [
        matrix_of(Hadamard(size, f"w4a4_hadamard {place}")).bfloat16()
        for place, size in enumerate(sizes)
    ]
    inverses = [kronecker.inverse(side, "a Hadamard matrix") for side in sides]
    return sides[0], sides[1], (inverses[0], inverses[1])
