"""Int8 weights per channel, int8 inputs with one measured scale per module: the fastest int8 scheme."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.exact import exact
from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats, multiplier
from quantcli.schemes.arithmetic import affine, rounding
from quantcli.schemes.arithmetic.observers import Observer, input_observer
from quantcli.schemes.arithmetic.static_int8 import (
    deq_grid,
    honoured,
    least_deq_scale,
    row_parts,
    to_codes,
)
from quantcli.schemes.base import Bias, check_input_scale, has_effect
from quantcli.schemes.by_data import chosen
from quantcli.schemes.integer import IntegerWeights

WEIGHT = Operand("int8", "channel")


class Int8Static(IntegerWeights):
    """Options and arithmetic of static int8 inputs. A subclass adds the parts that are stored."""

    model_config = ConfigDict(serialize_by_alias=True)
    free_scales: ClassVar[bool] = False  # `deq_scale` goes with it

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

    _has_effect = field_validator("percentile", "momentum")(has_effect)

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

        def of_range(low: float, high: float) -> Stats:
            return _stats(*affine.of_range(low, high, engine_dtype, symmetric=self.symmetric))

        def of_distribution(values: Tensor, counts: Tensor) -> Stats:
            grid = affine.of_distribution(values, counts, engine_dtype, symmetric=self.symmetric)
            return _stats(*grid)

        return input_observer(
            self.chosen_by,
            of_range,
            of_distribution,
            percent=self.percentile,
            momentum=self.momentum,
        )

    def observed(self, engine_dtype: torch.dtype) -> Any:
        """Not the options of weights."""
        return [
            "int8",
            self.model_dump(mode="json", include={"symmetric", "chosen_by", "percentile", "momentum"}),
            str(engine_dtype),
        ]

    def constants(self, stats: Stats, engine_dtype: torch.dtype) -> Parts:
        """input_scale [1] in dtype `engine_dtype`, input_offset float32 [1].

        `quantize` reads the serving dtype from it. InputError for values that no
        observer of this scheme gives: codes would be made against another scale than the engine's.
        """
        scale, offset = stats["input_scale"].to(engine_dtype), stats["input_offset"].float()
        factors = torch.cat([scale.float(), multiplier(scale)])
        sound = bool(((factors > 0) & torch.isfinite(factors)).all())
        check_input_scale(stats["input_scale"], scale, sound=sound)
        if not -128 <= float(offset) <= 127 or float(offset) % 1:
            raise InputError(f"input_offset {float(offset)} is not an int8", fix="calibrate again")
        return {**super().constants(stats, engine_dtype), "input_scale": scale, "input_offset": offset}

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """y = f32(sum_k xq wq + quant_bias) * deq_scale, rounded once to x.dtype; the sum is exact.

        x: [..., k]. `bias` is ignored, as it is by the engine: it is in quant_bias. Parts without
        quant_bias are of engines that know weights by weight_scale, and add the bias themselves:

            y = f32(sum_k (xq - input_offset) wq) * input_scale * weight_scale + bias
        """
        codes = to_codes(x, parts["input_scale"], parts["input_offset"])
        weight = parts["weight"]
        if "quant_bias" not in parts:
            total = rounding.exact_product(codes - parts["input_offset"], weight, 2**15)
            total = total.float().to(x.device)
            scale = rounding.per_output(parts["weight_scale"].squeeze(-1)) * parts["input_scale"]
            return rounding.add_bias(total * scale, bias, x.dtype)
        total = rounding.exact_product(codes, weight, 2**14)
        total += rounding.per_output(exact(parts["quant_bias"]).double())
        deq = parts["deq_scale"]
        if parts["input_scale"].dtype == torch.float16:
            deq = honoured(deq)
        return (total.float().to(x.device) * rounding.per_output(deq)).to(x.dtype)


def _stats(scale: float, offset: float) -> Stats:
    return {
        "input_scale": torch.tensor([scale]),
        "input_offset": torch.tensor([offset + 0.0]),  # no -0.0
    }


class W8A8Static(Int8Static):
    """Int8 weights, one scale per output channel; int8 inputs, one scale and offset per module."""

    name: ClassVar[str] = "w8a8_static"

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes int8 [..., n, k], weight_scale float32 [..., n, 1], and the parts of `row_parts`.

        The engine knows weights by deq_scale alone: that is chosen first, and weight_scale =
        deq_scale * r follows from it, in float32 whatever `engine_dtype` is. Without a clip |error| <=
        weight_scale / 2 to nearest. NaN or Inf in the weight or the bias shows in
        weight_scale.
        """
        scale = constants["input_scale"]
        r = multiplier(scale).to(rows.device)
        narrowest = self.search(rows, torch.float32, constants).scale(torch.float32) / r
        deq = deq_grid(torch.maximum(narrowest, least_deq_scale(r, bias)), scale.dtype, up=True)
        codes = chosen(constants, self.nearest_codes(rows, deq * r))
        return {"weight": codes, "weight_scale": deq * r, **row_parts(codes, deq, bias, constants)}
