"""Weights in integer codes: how they are rounded once their scales are known."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantcli.core.numerics import Parts, Stats
from quantcli.schemes.base import Scheme

_RANGES = {"int4": (-8.0, 7.0), "int8": (-128.0, 127.0)}


class IntegerWeights(Scheme):
    """The option that schemes with integer weights share.

    With `gptq`, codes are chosen while the model is calibrated, against the very scales that `quantize`
    finds; it is then given them as the stat `codes`, int8 [n, k], and takes them as they are.
    """

    row_stats: ClassVar[frozenset[str]] = frozenset({"codes"})

    weight_rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="gptq: each column of a weight makes up for the errors of those before it, by how "
        "inputs go together; needs calibration data",
    )

    @property
    def needs_data(self) -> bool:
        """Also for codes that are chosen by data."""
        return self.weight_rounding == "gptq" or super().needs_data

    @property
    def without_data(self) -> Scheme | str | None:
        """The same, rounded to nearest, where nothing else needs data."""
        nearest = self.model_copy(update={"weight_rounding": "nearest"})
        return nearest if self.needs_data and not nearest.needs_data else super().without_data

    @property
    def code_range(self) -> tuple[float, float]:
        """The least and the largest code."""
        return _RANGES[self.numerics.weight.dtype]

    def blank(self, k: int, held: torch.dtype) -> Stats:
        """Also `codes`, int8 [0, k], where data chooses them."""
        measured = super().blank(k, held)
        if self.weight_rounding == "nearest":
            return measured
        return {**measured, "codes": torch.empty((0, k), dtype=torch.int8)}

    def to_round(self, rows: Tensor, constants: Parts) -> Tensor:
        """The float32 weight [n, k] of which codes times scales are to be near."""
        return rows.float()

    def as_read(self, x: Tensor, constants: Parts) -> Tensor:
        """Inputs [..., k] as the codes meet them, but not quantized; linear in x, in float32."""
        return x.float()

    def as_rounded(self, x: Tensor, constants: Parts) -> Tensor | None:
        """`as_read`, and quantized as the engine does it; None where that counts for nothing, as with 8
        bits and more: inputs lose little then."""
        return None


def chosen(constants: Stats, nearest: Tensor) -> Tensor:
    """The codes of some rows: those that data has chosen, int8 as large as `nearest`, or these."""
    codes = constants.get("codes")
    return nearest if codes is None else codes.to(nearest.device)
