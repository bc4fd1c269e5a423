"""FP8 (e4m3) weights with one scale per weight, fp8 inputs with one measured scale per module."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import fp8, rounding
from quantcli.schemes.arithmetic.observers import Observer, input_observer
from quantcli.schemes.base import Bias, Scheme, check_input_scale, has_effect

_STEPS = 16  # scales tried per power of two
_WIDER, _NARROWER = 1, 4  # powers of two tried on either side of the whole range
_CHUNK = 2**16  # values that are looked at together
# The smallest scale, also of a module whose inputs were all zero: its reciprocal, and its product with
# any scale of a weight, are normal float32 numbers.
_SMALLEST = 2.0**-64


class Fp8Static(Scheme):
    """FP8 e4m3 weights, one scale for all that the engine merges; fp8 inputs, one measured scale."""

    model_config = ConfigDict(serialize_by_alias=True)
    name: ClassVar[str] = "fp8_static"
    needs_weight_amax: ClassVar[bool] = True

    # `observer` in recipes; here that is the name of a method
    chosen_by: Literal["minmax", "percentile", "mse"] = Field(
        "mse", alias="observer", description="how the range of the inputs is chosen"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="for percentile: how much of the inputs lies in the range"
    )

    _has_effect = field_validator("percentile")(has_effect)

    @property
    def without_data(self) -> str | None:
        """The same weights, with inputs that are measured while serving."""
        return "fp8_tensor"

    @property
    def numerics(self) -> Numerics:
        """Fp8 e4m3 per tensor x fp8 e4m3 per tensor."""
        return Numerics(Operand("fp8_e4m3", "tensor"), Operand("fp8_e4m3", "tensor"))

    def observer(self, engine_dtype: torch.dtype) -> Observer:
        """Measures input_scale, exactly representable in `engine_dtype`."""

        def of_range(low: float, high: float) -> Stats:
            return {"input_scale": _of_amax(max(-low, high), engine_dtype)}

        def of_distribution(values: Tensor, counts: Tensor) -> Stats:
            return {"input_scale": _least_error(values, counts, engine_dtype)}

        return input_observer(self.chosen_by, of_range, of_distribution, percent=self.percentile)

    def observed(self, engine_dtype: torch.dtype) -> Any:
        """Not the options of weights."""
        return [
            "fp8_e4m3",
            self.model_dump(mode="json", include={"chosen_by", "percentile"}),
            str(engine_dtype),
        ]

    def constants(self, stats: Stats, engine_dtype: torch.dtype) -> Parts:
        """input_scale [1] in `engine_dtype`. InputError for a value that no observer gives."""
        scale = stats["input_scale"].to(engine_dtype)
        sound = bool(torch.isfinite(scale).all()) and float(scale) >= _SMALLEST
        check_input_scale(stats["input_scale"], scale, sound=sound)
        return {"input_scale": scale}

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes float8_e4m3fn [..., n, k], weight_scale float32 [1] from `weight_amax`, input_scale."""
        scale = fp8.tensor_scale(constants["weight_amax"].to(rows.device), engine_dtype)
        codes = rounding.to_fp8_e4m3(rows, scale)
        input_scale = constants["input_scale"].to(rows.device)
        return {"weight": codes, "weight_scale": scale, "input_scale": input_scale}

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = (sum_k xq wq) * (input_scale * weight_scale) + bias in float32, rounded to x.dtype."""
        codes = fp8.static_codes(x, parts["input_scale"])
        y = codes @ parts["weight"].float().mT
        y = y * (parts["input_scale"].float() * parts["weight_scale"])
        return rounding.add_bias(y, bias, x.dtype)


def _of_amax(amax: float, engine_dtype: torch.dtype) -> Tensor:
    """The scale that clips nothing up to `amax`: float32 [1], representable in `engine_dtype`."""
    scale = rounding.scale_of(torch.tensor([amax]), rounding.FP8_E4M3_MAX, engine_dtype)
    return scale.clamp_min(_SMALLEST)


def _least_error(values: Tensor, counts: Tensor, engine_dtype: torch.dtype) -> Tensor:
    """The scale with the least squared error over all values; ties go to the widest range.

    values: ascending float32 [v]; counts: int64 [v]. Steps of fp8 double at powers of two, so that a
    scale somewhat larger than amax / 448 may fit the values better, as may a smaller one, which clips.
    """
    if not len(values) or not bool(values.any()):
        return _of_amax(0.0, engine_dtype)
    widest = _of_amax(float(values.abs().max()), engine_dtype)
    shares = torch.arange(_WIDER * _STEPS, -_NARROWER * _STEPS - 1, -1) / _STEPS
    scales = (widest * torch.exp2(shares)).to(engine_dtype).float().clamp_min(_SMALLEST)
    losses = torch.zeros(len(scales), dtype=torch.float64)
    for start in range(0, len(values), _CHUNK):
        some = values[start : start + _CHUNK]
        weight = counts[start : start + _CHUNK].double()
        for place, scale in enumerate(scales):
            error = (fp8.static_codes(some, scale) * scale).double() - some.double()
            losses[place] += torch.dot(error.square_(), weight)
    whole = int((shares == 0).nonzero()[0])
    best = int(losses.argmin())  # the first of equals is the widest
    return scales[best if losses[best] < losses[whole] else whole].view(1)
