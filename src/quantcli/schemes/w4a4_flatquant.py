"""Int4 weights per channel and int4 inputs per token after a learned transform: 4 bits that work."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats, decompose
from quantcli.schemes import flatquant
from quantcli.schemes.arithmetic import kronecker, rounding
from quantcli.schemes.base import Bias, Learner, LearningTask, Schedule
from quantcli.schemes.integer import LARGEST, LEAST, Int4Weights, chosen

SHARED = ("left_trans", "right_trans", "clip_ratio")
_PRESETS = {
    "paper": (Schedule(epochs=15, batch=4), 5e-3),
    "fast": (Schedule(epochs=5, batch=4), 1e-2),
}


class W4A4FlatQuant(Int4Weights):
    """FlatQuant (Sun et al. 2024): inputs x are multiplied by a learned Kronecker product L x R, which
    spreads outliers over all channels, and weights by its inverse; both are then int4."""

    name: ClassVar[str] = "w4a4_flatquant"
    row_stats: ClassVar[frozenset[str]] = frozenset({"weight_clip", "codes"})

    weight_rounding: Literal["nearest", "gptq"] = Field(
        "gptq", description="how transformed weights are rounded once the transforms are learned"
    )
    clip: Literal["learned", "mse", "none"] = Field(  # type: ignore[assignment]  # one more than others
        "learned",
        description="largest weight of a row: learned with the rest, or as other int4 schemes",
    )
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
    fallback: Literal["w8a8_dynamic", "w4a4_dynamic"] = Field(
        "w8a8_dynamic", description="the scheme of modules that the kernel cannot take"
    )

    @property
    def numerics(self) -> Numerics:
        """Int4 per channel x int4 per token, dynamic, inputs transformed."""
        token = Operand("int4", "token", dynamic=True)
        return Numerics(Operand("int4", "channel"), token, transform="kronecker")

    @property
    def without_data(self) -> str:
        """The fallback."""
        return self.fallback

    @property
    def when_calibrating(self) -> Self:
        """As it is: it always calibrates."""
        return self

    @property
    def unserved(self) -> str:
        """The fallback."""
        return self.fallback

    @property
    def schedule(self) -> Schedule:
        """The preset, with the options that the recipe sets."""
        preset = _PRESETS[self.preset][0]
        return Schedule(self.epochs or preset.epochs, self.batch or preset.batch)

    def learner(self, task: LearningTask) -> Learner:
        """One transform for all matrices."""
        if not self.scale_channels:
            task = replace(task, scalable="not at all")
        lr = self.lr or _PRESETS[self.preset][1]
        return flatquant.KroneckerLearner(task, lr, self.alpha, clips_rows=self.clip == "learned")

    def blank(self, k: int, engine_dtype: torch.dtype) -> Stats:
        """left_trans [l, l] and right_trans [r, r] in `engine_dtype`, clip_ratio float32 [1]; by row,
        if the options ask for them, codes int8 [0, k] and weight_clip float32 [0, 1]."""
        left, right = decompose(k)
        stats = {
            **super().blank(k, engine_dtype),
            "left_trans": torch.eye(left, dtype=engine_dtype),
            "right_trans": torch.eye(right, dtype=engine_dtype),
            "clip_ratio": torch.ones(1),
        }
        if self.clip == "learned":
            stats["weight_clip"] = torch.ones(0, 1)
        return stats

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

    def to_round(self, rows: Tensor, constants: Stats) -> Tensor:
        """The transformed weight [..., n, k], in float32."""
        inverses = (constants[name].to(rows.device) for name in ("left_inverse", "right_inverse"))
        return kronecker.undo(rows, *inverses)

    def as_read(self, x: Tensor, constants: Stats) -> Tensor:
        """Transformed inputs [..., k], in float32: L^T X R."""
        left, right = (constants[name].to(x.device) for name in ("left_trans", "right_trans"))
        return kronecker.undo(x, left.double().mT, right.double().mT)

    def as_rounded(self, x: Tensor, constants: Stats) -> Tensor:
        """Transformed inputs [..., k] in 4 bits, in float32."""
        left, right, clip = (constants[name].to(x.device) for name in SHARED)
        codes, scale = flatquant.quantize_tokens(kronecker.served(x, left, right), clip)
        return codes * scale

    def dequantize(self, parts: Parts) -> Tensor:
        """The weight that the product amounts to, its transform undone: float32 [..., n, k]."""
        return kronecker.redo(super().dequantize(parts), parts["left_trans"], parts["right_trans"])

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """The kernel `npu_kronecker_quant`, then an int4 product, with all their roundings.

        t = f16(L^T (X R)), m = max |t| of a token, token_scale = m clip_ratio / 7 and
        xq = clamp(rint(f16(t ((7 / clip_ratio) / m))), -8, 7);
        y = (f32(sum_k xq wq) * weight_scale) * token_scale, cast to x.dtype, then + bias. The sum is
        exact in float32, below 2^24 for the widest matrix that the kernel takes.
        """
        codes, token_scale = flatquant.quantize_tokens(
            kronecker.served(x, parts["left_trans"], parts["right_trans"]), parts["clip_ratio"]
        )
        total = codes @ parts["weight"].float().mT
        y = total * rounding.per_output(parts["weight_scale"].squeeze(-1)) * token_scale
        y = y.to(x.dtype)
        return y if bias is None else y + rounding.per_output(bias.to(x.dtype))
