"""Int8 inputs with one scale and one offset per module, measured beforehand: what its schemes share.

The engine's arithmetic (`npu_quantize`, then `npu_quant_matmul`), with r = multiplier(input_scale):

    xq = clamp(rint(f32(x) r + input_offset), -128, 127)
    y  = f32(sum_k xq wq + quant_bias) * deq_scale

So x ~ (xq - input_offset) / r, and with a weight ~ wq * weight_scale

    deq_scale  = weight_scale / r
    quant_bias = rint(bias / deq_scale - input_offset * sum_k wq)

All of it from 1 / r and not from input_scale, which differs in bfloat16 by up to 0.4 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.numerics import Numerics, Operand, Parts, Stats, multiplier
from quantcli.schemes import affine, rounding
from quantcli.schemes.integer import IntegerWeights
from quantcli.schemes.observers import Distribution, MinMax, MovingAverage, Observer, percentile

WEIGHT = Operand("int8", "channel")
# quant_bias is int32. What the bias adds stays below 2^30; what the offset adds is at most
# 128 * 127 * 65535, just below 2^30, for the 65535 columns that the engine's matmul takes.
_BIAS_STEPS = 2.0**30
_TINY = torch.finfo(torch.float32).tiny
# With float16 the hardware honours the top 19 bits of deq_scale: sign, exponent, 10 of the mantissa.
_IGNORED_BITS = 13
# With bfloat16 it honours all. Where deq_scale is all that says the weight's scale, its last bits stay
# zero: its product with r, of 8 bits, is then exact in float32, and weight_scale tells deq_scale.
_SPARE_BITS = 8


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

    def observer(self, held: torch.dtype) -> Observer:
        """Measures input_scale, exactly representable in `held`, and input_offset."""
        return InputObserver(self, held)

    def constants(self, stats: Stats, held: torch.dtype) -> Parts:
        """input_scale [1] in dtype `held`, input_offset float32 [1].

        The dtype tells `quantize` in what the model will be served. InputError for values that no
        observer of this scheme gives: codes would be made against another scale than the engine's.
        """
        measured, offset = stats["input_scale"].float(), stats["input_offset"].float()
        scale = measured.to(held)
        ends = torch.cat([scale.float(), multiplier(scale)])
        sound = bool(((ends > 0) & torch.isfinite(ends)).all())
        if not sound or not torch.equal(scale.float(), measured):
            raise InputError(
                f"input_scale {float(measured)} is no scale that {str(held)[6:]} holds",
                fix="calibrate again, for the dtype in which the model will be served",
            )
        if not -128 <= float(offset) <= 127 or float(offset) % 1:
            raise InputError(f"input_offset {float(offset)} is no int8", fix="calibrate again")
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
            deq = _honoured(deq)
        return (total.float() * rounding.per_output(deq)).to(x.dtype)


class InputObserver(Observer):
    """Measures one module's inputs, and chooses the scale and the offset that represent them."""

    def __init__(self, scheme: Int8Static, held: torch.dtype) -> None:
        super().__init__()
        self._scheme = scheme
        self._held = held
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
        held, symmetric = self._held, self._scheme.symmetric
        if isinstance(self._seen, MinMax):
            return affine.of_range(*self._seen.range(), held, symmetric=symmetric)
        values, counts = self._seen.values()
        if self._scheme.chosen_by == "mse":
            return affine.of_distribution(values, counts, held, symmetric=symmetric)
        inner = percentile(values, counts, self._scheme.percentile)
        if inner == (0.0, 0.0):  # nearly all is 0: such a range would clip all the rest
            inner = percentile(values, counts, 100)
        return affine.of_range(*inner, held, symmetric=symmetric)


def to_codes(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Inputs as the engine quantizes them: x [..., k] in any float dtype -> codes as float32 [..., k].

    scale: [1] in the serving dtype; offset: float32 [1]. Multiply and add are rounded one by one.
    """
    return (x.float() * multiplier(scale) + offset).round_().clamp_(-128, 127)


def least_deq_scale(r: Tensor, bias: Tensor | None) -> Tensor:
    """The smallest deq_scale that a row may have: float32 [..., n, 1], or [1] without a bias.

    |bias| / deq_scale fits quant_bias, and neither deq_scale nor deq_scale * r is below the smallest
    normal number: for a row of zeros, and for one that is tiny beside its bias. Others never meet it.
    NaN and Inf in a bias come through.
    """
    least = _TINY * (1 / r).clamp_min(1)
    if bias is None:
        return least
    return torch.maximum(least, bias.float().abs().unsqueeze(-1) / _BIAS_STEPS)


def deq_grid(value: Tensor, serving: torch.dtype, *, up: bool) -> Tensor:
    """deq_scale as the hardware honours it: the nearest such float32.

    With `up` none below `value`, and with bfloat16 one of 16 bits, whose product with r is exact.
    value: positive float32; NaN and Inf come through.
    """
    left = _IGNORED_BITS if serving == torch.float16 else _SPARE_BITS
    if serving == torch.float32 or (serving == torch.bfloat16 and not up):
        return value
    bits = value.view(torch.int32)
    add = 2**left - 1 if up else 2 ** (left - 1)
    return torch.where(torch.isfinite(value), _cut(bits + add, left), value)


def _honoured(deq: Tensor) -> Tensor:
    """Without the bits that the hardware ignores: the mask 0xFFFFE000."""
    return _cut(deq.view(torch.int32), _IGNORED_BITS)


def _cut(bits: Tensor, left: int) -> Tensor:
    kept: Tensor = bits & -(2**left)
    return kept.view(torch.float32)


def row_parts(codes: Tensor, deq: Tensor, bias: Tensor | None, constants: Stats) -> Parts:
    """What the static matmul needs beside the codes, and the constants.

    codes: int8 [..., n, k], at most 65535 columns; deq: float32 [..., n, 1]; bias: [..., n]. Returns
    deq_scale float32 [..., n], quant_bias int32 [..., n] (from an exact sum, in float64), input_scale,
    input_offset.
    """
    deq = deq.squeeze(-1)
    offset = constants["input_offset"].to(codes.device).double()
    total = -offset * codes.sum(-1, dtype=torch.int32).double()
    if bias is not None:
        total = total + bias.double() / deq.double()
    shared = {name: tensor.to(codes.device) for name, tensor in constants.items()}
    return {"deq_scale": deq, "quant_bias": total.round().to(torch.int32), **shared}
