"""FP8 (e4m3) weights with one scale per weight, fp8 inputs with one measured scale per module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import fp8, rounding
from quantcli.schemes.arithmetic.observers import Distribution, MinMax, Observer, percentile
from quantcli.schemes.base import Scheme

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

    @field_validator("percentile")
    @classmethod
    def _has_effect(cls, value: float, info: ValidationInfo) -> float:
        default = cls.model_fields["percentile"].default
        if value != default and info.data.get("chosen_by", "percentile") != "percentile":
            raise ValueError("has no effect without `observer: percentile`")
        return value

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
        return InputObserver(self, engine_dtype)

    def constants(self, stats: Stats, engine_dtype: torch.dtype) -> Parts:
        """input_scale [1] in `engine_dtype`. InputError for what no observer of this scheme gives."""
        measured = stats["input_scale"].float()
        scale = measured.to(engine_dtype)
        sound = bool(torch.isfinite(scale).all()) and float(scale) >= _SMALLEST
        if not sound or not torch.equal(scale.float(), measured):
            raise InputError(
                f"input_scale {float(measured)} is not a scale that {str(engine_dtype)[6:]} can hold",
                fix="calibrate again, for the dtype in which the model will be served",
            )
        return {"input_scale": scale}

    def quantize(
        self,
        rows: Tensor,
        engine_dtype: torch.dtype,
        constants: Stats = NO_STATS,
        bias: Tensor | None = None,
    ) -> Parts:
        """Codes float8_e4m3fn [..., n, k], weight_scale float32 [1] from `weight_amax`, input_scale."""
        scale = fp8.tensor_scale(constants["weight_amax"].to(rows.device), engine_dtype)
        codes = rounding.to_fp8_e4m3(rows, scale)
        input_scale = constants["input_scale"].to(rows.device)
        return {"weight": codes, "weight_scale": scale, "input_scale": input_scale}

    def forward(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
        """y = (sum_k xq wq) * (input_scale * weight_scale) + bias in float32, rounded to x.dtype."""
        codes = fp8.static_codes(x, parts["input_scale"])
        y = codes @ parts["weight"].float().mT
        y = y * (parts["input_scale"].float() * parts["weight_scale"])
        if bias is not None:
            y = y + rounding.per_output(bias.float())
        return y.to(x.dtype)


class InputObserver(Observer):
    """Measures one module's inputs, and chooses the scale that represents them."""

    def __init__(self, scheme: Fp8Static, engine_dtype: torch.dtype) -> None:
        super().__init__()
        self._scheme = scheme
        self._engine_dtype = engine_dtype
        self._seen: MinMax | Distribution
        self._seen = MinMax() if scheme.chosen_by == "minmax" else Distribution()

    def _measure(self, x: Tensor) -> Any:
        return self._seen._measure(x)

    def _sound(self, measured: Any) -> bool:
        return self._seen._sound(measured)

    def _merge(self, measured: Any, batch: int) -> None:
        self._seen._merge(measured, batch)

    def _merged(self) -> Iterator[tuple[Any, int]]:
        return self._seen._merged()

    def stats(self) -> Stats:
        """input_scale, and the extremes input_min and input_max: float32 [1] each.

        The scale is positive also where nothing, or nothing but zeros, was seen.
        """
        return {"input_scale": self._choose(), **self._seen.stats()}

    def _choose(self) -> Tensor:
        if isinstance(self._seen, MinMax):
            return _of_amax(_largest(self._seen.range()), self._engine_dtype)
        values, counts = self._seen.values()
        if self._scheme.chosen_by == "mse":
            return _least_error(values, counts, self._engine_dtype)
        amax = _largest(percentile(values, counts, self._scheme.percentile))
        if amax == 0:  # nearly all is 0: such a range would clip all the rest
            amax = _largest(percentile(values, counts, 100))
        return _of_amax(amax, self._engine_dtype)


def _largest(ends: tuple[float, float]) -> float:
    return max(-ends[0], ends[1])


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
