"""What a scheme is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from quantcli.numerics import Numerics, Parts


class Scheme(BaseModel, ABC):
    """How numbers are rounded. The fields of a subclass are its options in a recipe.

    A subclass sets `name` (what recipes call it) and is registered by standing in this folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str]

    @property
    @abstractmethod
    def numerics(self) -> Numerics:
        """What the numbers are, for the target."""

    @abstractmethod
    def quantize(self, rows: Tensor, held: torch.dtype) -> Parts:
        """Codes and scales of whole rows.

        rows: [..., n, k] in bfloat16, float16 or float32: a block of the weight, or all of it.
        held: the dtype in which the engine will hold `weight_scale`; codes are chosen against it.

        Returns `weight` [..., n, k] (codes) and `weight_scale` [..., n, 1] (float32, exactly
        representable in `held`). A row with NaN or Inf gets a scale that is not finite. Each row
        depends on itself alone, so blocks may be cut anywhere. Also runs on the meta device.
        """

    def dequantize(self, parts: Parts) -> Tensor:
        """The weight as the kernel sees it, float32 [..., n, k]: codes times scale."""
        return parts["weight"].float() * parts["weight_scale"]

    @abstractmethod
    def forward(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
        """The linear as the engine computes it: x [..., k] -> [..., n], in the dtype of x."""
