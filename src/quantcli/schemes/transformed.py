"""Schemes whose inputs are transformed (FlatQuant, Sun et al. 2024): what they share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.numerics import Parts, Stats, decompose
from quantcli.schemes.arithmetic import kronecker
from quantcli.schemes.base import Learner, LearningTask, Schedule, Scheme
from quantcli.schemes.by_data import Learned

SHARED = ("left_trans", "right_trans", "clip_ratio")
_PRESETS = {
    "paper": (Schedule(epochs=15, batch=4), 5e-3),
    "fast": (Schedule(epochs=5, batch=4), 1e-2),
}


class Transformed(Scheme):
    """Inputs are multiplied by a learned Kronecker product L x R, weights by its inverse.

    It stands before the class of its weights among the bases of a scheme, which has an option
    `fallback`, too.
    """

    preset: Literal["paper", "fast"] = Field(
        "paper", description="paper: 15 epochs, lr 0.005; fast: 5 epochs, lr 0.01; 4 samples a step"
    )
    epochs: int | None = Field(None, ge=1, le=1000, description="instead of the preset's")
    batch: int | None = Field(
        None, ge=1, le=1024, description="samples a step, instead of the preset's"
    )
    lr: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of the transforms, instead of the preset's; clips learn 10 x as fast",
    )
    alpha: float = Field(
        0.3, ge=0, le=1, description="how much of outlier channels moves into the weights at the start"
    )
    scale_channels: bool = Field(
        True, description="learn a scale per input channel, folded into the norm or matrix before"
    )

    @field_validator("weight_rounding", check_fields=False)
    @classmethod
    def _learns_once(cls, value: object) -> object:
        """Clips and transforms learn already; codes are chosen once they are there."""
        if value == "learned" or isinstance(value, Learned):
            raise ValueError("a scheme that learns a transform takes `nearest` or `gptq`")
        return value

    @property
    @abstractmethod
    def unserved(self) -> str:
        """The fallback: a scheme for modules that the kernel cannot take, and that needs no data."""

    @property
    def without_data(self) -> str:
        """The fallback."""
        return self.unserved

    @property
    def when_calibrating(self) -> Self:
        """As it is: it always calibrates."""
        return self

    @property
    def schedule(self) -> Schedule:
        """The preset, with the options that the recipe sets."""
        preset = _PRESETS[self.preset][0]
        return Schedule(self.epochs or preset.epochs, self.batch or preset.batch)

    def learner(self, task: LearningTask) -> Learner:
        """One transform for all matrices."""
        if not self.scale_channels:
            task = replace(task, scalable="not at all")
        return self.taught(task, self.lr or _PRESETS[self.preset][1])

    @abstractmethod
    def taught(self, task: LearningTask, lr: float) -> Learner:
        """The learner; lr: of the transforms."""

    def blank(self, k: int, engine_dtype: torch.dtype) -> Stats:
        """Also left_trans [l, l] and right_trans [r, r] in `engine_dtype`, clip_ratio float32 [1]."""
        left, right = decompose(k, self.numerics.blocks)
        return {
            **super().blank(k, engine_dtype),
            "left_trans": torch.eye(left, dtype=engine_dtype),
            "right_trans": torch.eye(right, dtype=engine_dtype),
            "clip_ratio": torch.ones(1),
        }

    def constants(self, stats: Stats, engine_dtype: torch.dtype) -> Parts:
        """The transforms in dtype `engine_dtype`, their inverses in float64, clip_ratio float32 [1]."""
        left, right, clip = (stats[name] for name in SHARED)
        if left.dtype != engine_dtype or right.dtype != engine_dtype:
            raise InputError(
                f"transforms are {left.dtype}, not {engine_dtype}",
                fix="calibrate again, for the dtype in which the model will be served",
            )
        if not 0 < float(clip) <= 1:
            raise InputError(f"clip_ratio {float(clip)} is not in (0, 1]", fix="calibrate again")
        return {
            "left_trans": left,
            "right_trans": right,
            "clip_ratio": clip.float(),
            "left_inverse": kronecker.inverse(left, "left_trans"),
            "right_inverse": kronecker.inverse(right, "right_trans"),
        }

    def to_round(self, rows: Tensor, constants: Stats) -> Tensor:
        """The transformed weight [..., n, k], in float32."""
        inverses = (constants[name].to(rows.device) for name in ("left_inverse", "right_inverse"))
        return kronecker.undo(rows, *inverses)

    def as_read(self, x: Tensor, constants: Stats) -> Tensor:
        """Transformed inputs [..., k], in float32: L^T X R."""
        left, right = (constants[name].to(x.device) for name in ("left_trans", "right_trans"))
        return kronecker.redo(x, left.mT, right.mT)

    def dequantize(self, parts: Parts) -> Tensor:
        """The weight that the product amounts to, its transform undone: float32 [..., n, k]."""
        return kronecker.redo(super().dequantize(parts), parts["left_trans"], parts["right_trans"])
