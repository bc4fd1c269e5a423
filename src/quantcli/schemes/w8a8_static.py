"""Int8 weights per channel, int8 inputs with one measured scale per module: the fastest int8 scheme."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats, multiplier
from quantcli.schemes.arithmetic import affine, rounding
from quantcli.schemes.arithmetic.observers import (
    Distribution,
    MinMax,
    MovingAverage,
    Observer,
    percentile,
)
from quantcli.schemes.arithmetic.static_int8 import (
    deq_grid,
    honoured,
    least_deq_scale,
    row_parts,
    to_codes,
)
from quantcli.schemes.integer import IntegerWeights, chosen

WEIGHT = Operand("int8", "channel")


class Int8Static(IntegerWeights):
    """Options and arithmetic of static int8 inputs. A subclass says what else is stored."""

    model_config = ConfigDict(serialize_by_alias=True)

    symmetric: bool = Field(False, description="no offset: 127 steps to either side of zero")
    # `observer` in recipes; here that is the name of a method
    chosen_by: Literal["minmax", "moving_average", "percentile", "mse"] = Field(
        "mse", alias="observer", description="how the range of the inputs is chosen"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="for percentile: how much of the inputs lies in the range"
    )
    momentum: float = Field(
        0.9, ge=0, le=1, description="for moving_average: the weight of what was seen before"
    )

    @field_validator("percentile", "momentum")
    @classmethod
    def _has_effect(cls, value: float, info: ValidationInfo) -> float:
        user = {"percentile": "percentile", "momentum": "moving_average"}[str(info.field_name)]
        default = cls.model_fields[str(info.field_name)].default
        if value != default and info.data.get("chosen_by", user) != user:
            raise ValueError(f"has no effect without `observer: {user}`")
        return value

    @classmethod
    def for_numerics(cls, numerics: Numerics) -> Self | None:
        """Symmetric or not, as they are."""
        scheme = cls(symmetric=numerics.input is not None and numerics.input.symmetric)
        return scheme if scheme.numerics == numerics else None

    @property
    def ordered(self) -> bool:
        """The moving average follows the samples one by one."""
        return self.chosen_by == "moving_average"

    @property
    def without_data(self) -> str | None:
        """The same weights, with inputs that are measured while serving."""
        return "w8a8_dynamic"

    @property
    def inputs(self) -> Operand:
        """How inputs are quantized."""
        return Operand("int8", "tensor", symmetric=self.symmetric)

    @property
    def numerics(self) -> Numerics:
        """Int8 per channel x int8 per tensor."""
        return Numerics(WEIGHT, self.inputs)

    def observer(self, engine_dtype: torch.dtype) -> Observer:
        """Measures input_scale, exactly representable in `engine_dtype`, and input_offset."""
        return InputObserver(self, engine_dtype)

    def constants(self, stats: Stats, engine_dtype: torch.dtype) -> Parts:
        """input_scale [1] in dtype `engine_dtype`, input_offset float32 [1].

        The dtype tells `quantize` in what the model will be served. InputError for values that no
        observer of this scheme gives: codes would be made against another scale than the engine's.
        """
        measured, offset = stats["input_scale"].float(), stats["input_offset"].float()
        scale = measured.to(engine_dtype)
        ends = torch.cat([scale.float(), multiplier(scale)])
        sound = bool(((ends > 0) & torch.isfinite(ends)).all())
        if not sound or not torch.equal(scale.float(), measured):
            raise InputError(
                f"input_scale {float(measured)} is not a scale that {str(engine_dtype)[6:]} can hold",
                fix="calibrate again, for the dtype in which the model will be served",
            )
        if not -128 <= float(offset) <= 127 or float(offset) % 1:
            raise InputError(f"input_offset {float(offset)} is not an int8", fix="calibrate again")
        return {"input_scale": scale, "input_offset": offset}

    def forward(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
        """y = f32(sum_k xq wq + quant_bias) * deq_scale, rounded once to x.dtype; the sum is exact.

        x: [..., k]. `bias` is ignored, as it is by the engine: it is in quant_bias. Parts without
        quant_bias are of engines that know weights by weight_scale, and add the bias themselves:

            y = f32(sum_k (xq - input_offset) wq) * input_scale * weight_scale + bias
        """
        codes = to_codes(x, parts["input_scale"], parts["input_offset"])
        weight = parts["weight"].double().mT
        if "quant_bias" not in parts:
            total = ((codes - parts["input_offset"]).double() @ weight).float()
            scale = rounding.per_output(parts["weight_scale"].squeeze(-1)) * parts["input_scale"]
            y = total * scale
            return (y if bias is None else y + rounding.per_output(bias.float())).to(x.dtype)
        total = codes.double() @ weight
        total += rounding.per_output(parts["quant_bias"].double())
        deq = parts["deq_scale"]
        if parts["input_scale"].dtype == torch.float16:
            deq = honoured(deq)
        return (total.float() * rounding.per_output(deq)).to(x.dtype)


class InputObserver(Observer):
    """Measures one module's inputs, and chooses the scale and the offset that represent them."""

    def __init__(self, scheme: Int8Static, engine_dtype: torch.dtype) -> None:
        super().__init__()
        self._scheme = scheme
        self._engine_dtype = engine_dtype
        self._seen: MinMax | Distribution
        if scheme.chosen_by == "minmax":
            self._seen = MinMax()
        elif scheme.chosen_by == "moving_average":
            self._seen = MovingAverage(scheme.momentum)
        else:
            self._seen = Distribution()

    def _measure(self, x: Tensor) -> Any:
        return self._seen._measure(x)

    def _sound(self, measured: Any) -> bool:
        return self._seen._sound(measured)

    def _merge(self, measured: Any, batch: int) -> None:
        self._seen._merge(measured, batch)

    def _merged(self) -> Iterator[tuple[Any, int]]:
        return self._seen._merged()

    def stats(self) -> Stats:
        """input_scale, input_offset, and the extremes input_min and input_max: float32 [1] each.

        The scale is positive also where nothing, or nothing but zeros, was seen.
        """
        scale, offset = self._choose()
        measured = {
            "input_scale": torch.tensor([scale]),
            "input_offset": torch.tensor([offset + 0.0]),
        }  # no -0.0
        return {**measured, **self._seen.stats()}

    def _choose(self) -> tuple[float, float]:
        engine_dtype, symmetric = self._engine_dtype, self._scheme.symmetric
        if isinstance(self._seen, MinMax):
            return affine.of_range(*self._seen.range(), engine_dtype, symmetric=symmetric)
        values, counts = self._seen.values()
        if self._scheme.chosen_by == "mse":
            return affine.of_distribution(values, counts, engine_dtype, symmetric=symmetric)
        inner = percentile(values, counts, self._scheme.percentile)
        if inner == (0.0, 0.0):  # nearly all is 0: such a range would clip all the rest
            inner = percentile(values, counts, 100)
        return affine.of_range(*inner, engine_dtype, symmetric=symmetric)


class W8A8Static(Int8Static):
    """Int8 weights, one scale per output channel; int8 inputs, one scale and offset per module."""

    name: ClassVar[str] = "w8a8_static"

    def quantize(
        self,
        rows: Tensor,
        engine_dtype: torch.dtype,
        constants: Stats = NO_STATS,
        bias: Tensor | None = None,
    ) -> Parts:
        """Codes int8 [..., n, k], weight_scale float32 [..., n, 1], and what `row_parts` adds.

        The engine knows weights by deq_scale alone: that is chosen first, and weight_scale =
        deq_scale * r is what it amounts to, in float32 whatever `engine_dtype` is. No code is clipped;
        |error| <= weight_scale / 2 to nearest. NaN or Inf in the weight or the bias shows in
        weight_scale.
        """
        scale = constants["input_scale"]
        r = multiplier(scale).to(rows.device)
        narrowest = rounding.absmax(rows) / rounding.INT8_BEST / r
        deq = deq_grid(torch.maximum(narrowest, least_deq_scale(r, bias)), scale.dtype, up=True)
        codes = chosen(constants, rounding.to_int8(rows, deq * r))
        return {"weight": codes, "weight_scale": deq * r, **row_parts(codes, deq, bias, constants)}
