"""Int4 weights per channel and int4 inputs per token after a learned transform: 4 bits that work."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Parts, Stats
from quantcli.schemes import flatquant
from quantcli.schemes.arithmetic import kronecker, rounding
from quantcli.schemes.base import Bias, Learner, LearningTask
from quantcli.schemes.by_data import WeightRounding, chosen
from quantcli.schemes.int4_kronecker import Int4Kronecker
from quantcli.schemes.integer import LARGEST, LEAST
from quantcli.schemes.transformed import SHARED, Transformed


class W4A4FlatQuant(Transformed, Int4Kronecker):
    """FlatQuant (Sun et al. 2024): inputs x are multiplied by a learned Kronecker product L x R, which
    spreads outliers over all channels, and weights by its inverse; both are then int4."""

    name: ClassVar[str] = "w4a4_flatquant"
    row_stats: ClassVar[frozenset[str]] = frozenset({"weight_clip", "codes"})
    free_scales: ClassVar[bool] = False  # clips decide them

    weight_rounding: WeightRounding = Field(
        "gptq", description="how transformed weights are rounded once the transforms are learned"
    )
    clip: Literal["learned", "mse", "none"] = Field(  # type: ignore[assignment]  # one more than others
        "learned",
        description="largest weight of a row: learned with the rest, or as other int4 schemes",
    )
    fallback: Literal["w8a8_dynamic", "w4a4_dynamic"] = Field(
        "w8a8_dynamic", description="the scheme of modules that the kernel cannot take"
    )

    @property
    def unserved(self) -> str:
        """The fallback."""
        return self.fallback

    def taught(self, task: LearningTask, lr: float) -> Learner:
        """With clips of inputs, and of rows if the options say so."""
        clips_rows = self.clip == "learned"
        return flatquant.KroneckerLearner(task, flatquant.Int4(), lr, self.alpha, clips_rows=clips_rows)

    def blank(self, k: int, engine_dtype: torch.dtype) -> Stats:
        """Also by row, if options ask for them: codes int8 [0, k], weight_clip float32 [0, 1]."""
        stats = super().blank(k, engine_dtype)
        return {**stats, "weight_clip": torch.ones(0, 1)} if self.clip == "learned" else stats

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes int8 [..., n, k] in -8..7 and weight_scale float32 [..., n, 1] of the transformed rows,
        and left_trans, right_trans, clip_ratio as `constants` has them."""
        transformed = self.to_round(rows, constants)
        if self.clip == "learned":
            amax = rounding.absmax(transformed) * constants["weight_clip"].to(rows.device)
            scale = (amax / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
            codes = (transformed / scale).round_().clamp_(LEAST, LARGEST).to(torch.int8)
        else:
            codes, scale = self.nearest(transformed, engine_dtype, constants)
        shared = {name: constants[name].to(rows.device) for name in SHARED}
        return {"weight": chosen(constants, codes), "weight_scale": scale, **shared}

    def as_rounded(self, x: Tensor, constants: Stats) -> Tensor:
        """Transformed inputs [..., k] in 4 bits, in float32."""
        left, right, clip = (constants[name].to(x.device) for name in SHARED)
        codes, scale = flatquant.quantize_tokens(kronecker.served(x, left, right), clip)
        return codes * scale
