"""The engine's arithmetic for modules of plans, and the shares of weights and inputs in its error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from quantcli.calibration.replay.engine import Arithmetic, Quantizer
from quantcli.checkpoint.spec import torch_dtype
from quantcli.core.errors import InputError
from quantcli.core.numerics import Parts
from quantcli.planning.block import Surveys, read_calibrated
from quantcli.planning.plan import Quantize
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target

Only: TypeAlias = Literal["weights", "inputs"] | None  # what is quantized; None: both


def quantizer_of(items: Mapping[str, Quantize], target: Target, only: Only = None) -> Quantizer:
    """The engine's arithmetic for the items of plans, by module; all other modules are float.

    only: what of them is quantized; see `check_only`.
    """
    surveys = Surveys()

    def quantize(module: str, rows: Tensor, bias: Tensor | None) -> tuple[Arithmetic, Parts] | None:
        item = items.get(module)
        if item is None:
            return None
        scheme, calibrated = item.scheme, read_calibrated(item, surveys)
        row_stats = {name: read(0, item.height) for name, read in calibrated.row_stats.items()}
        constants = {**calibrated.constants, **row_stats}
        engine_dtype = torch_dtype(item.engine_dtypes.weight_scale)
        parts = scheme.quantize(rows, engine_dtype, constants, bias)
        parts |= target.engine_parts(scheme.numerics)
        if only is None:
            return scheme, parts
        return (_Weights(scheme) if only == "weights" else _Inputs(scheme, rows)), parts

    return quantize


def check_only(items: Iterable[Quantize], only: Only) -> None:
    """InputError for a scheme that transforms weights, of which neither side can be left out."""
    for item in items:
        if only is not None and item.scheme.numerics.transform:
            raise InputError(
                f"`{item.scheme.name}` transforms weights and inputs together",
                where=f"`{item.module}`",
                fix=f"leave --only {only} out, or the scheme",
            )


class _Weights:
    """Quantized weights, float inputs."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def forward(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
        """x [..., k] -> [..., n]."""
        return F.linear(x, self._scheme.dequantize(parts).to(x.dtype), bias)


class _Inputs:
    """Float outputs, and the error that quantized inputs add to those of quantized weights."""

    def __init__(self, scheme: Scheme, weight: Tensor) -> None:
        self._scheme, self._weight = scheme, weight

    def forward(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
        """x [..., k] -> [..., n]."""
        both = self._scheme.forward(x, parts, bias)
        weights = F.linear(x, self._scheme.dequantize(parts).to(x.dtype), bias)
        return F.linear(x, self._weight.to(x.dtype), bias) + (both - weights)
