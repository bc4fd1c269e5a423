"""Weights whose codes may be chosen by data (GPTQ), whatever the type of codes."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from quantcli.core.numerics import Stats
from quantcli.schemes.arithmetic import elements
from quantcli.schemes.base import Scheme


class RoundedWeights(Scheme):
    """The option that schemes with such weights share.

    With `gptq`, codes are chosen while the model is calibrated, against the very scales that `quantize`
    finds; it is then given them as the stat `codes`, in the form of its `weight`, and takes them as
    they are.
    """

    row_stats: ClassVar[frozenset[str]] = frozenset({"codes"})

    weight_rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="gptq: each column of a weight makes up for the errors of those before it, by how "
        "inputs go together; needs calibration data",
    )

    @property
    def rounded_by_data(self) -> bool:
        """If an option says so."""
        return self.weight_rounding == "gptq"

    @property
    def without_inputs(self) -> Self:
        """Also rounded to nearest."""
        return super().without_inputs.model_copy(update={"weight_rounding": "nearest"})

    def blank(self, k: int, engine_dtype: torch.dtype) -> Stats:
        """Also `codes` of no rows, if data chooses them."""
        measured = super().blank(k, engine_dtype)
        codes = {"codes": elements.encode(torch.empty((0, k)), self.numerics.weight.element)}
        return {**measured, **codes} if self.rounded_by_data else measured


def chosen(constants: Stats, nearest: Tensor) -> Tensor:
    """The codes of some rows: the stat `codes`, in dtype and shape of `nearest`, or else `nearest`."""
    codes = constants.get("codes")
    return nearest if codes is None else codes.to(nearest.device)
