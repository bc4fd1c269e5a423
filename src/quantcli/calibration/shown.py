"""Inputs of layers that are not the outputs of float layers: `calibration.inputs`.

`quantized`: outputs of the quantized layers before, with the engine's arithmetic.

`running`: as in the reference producer. There an input widens its module's range and is quantized with
that range at once, sample by sample, in the model's own dtype. So a range depends on the order of the
samples and on every rounding before it: the same ranges take the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from quantcli.calibration.policy import Policy
from quantcli.calibration.replay.engine import Arithmetic, Quantizer
from quantcli.core.exact import exact
from quantcli.core.numerics import NO_STATS, Parts, Stats

# a module -> what its scheme needs to know of its whole weight, as `LoadedLayer.whole` finds it
Whole = Callable[[str], Stats]


def quantized(policy: Policy, stats: Mapping[str, Stats], whole: Whole) -> Quantizer:
    """The engine's arithmetic, with the statistics of each module."""

    def quantize(module: str, rows: Tensor, bias: Tensor | None) -> tuple[Arithmetic, Parts] | None:
        module_policy = policy.quantized.get(module)
        module_stats = stats.get(module, NO_STATS)
        if module_policy is None or (not module_stats and policy.measures(module)):
            return None  # float, or no token reaches it
        scheme = policy.scheme_with(module, module_stats)
        row_stats = {name: tensor for name, tensor in module_stats.items() if name in scheme.row_stats}
        constants = scheme.constants(module_stats, module_policy.input_dtype)
        constants = {**constants, **row_stats, **whole(module)}
        device, rows = rows.device, exact(rows)
        constants = {name: tensor.to(rows.device) for name, tensor in constants.items()}
        bias = None if bias is None else exact(bias)
        parts = scheme.quantize(rows, module_policy.weight_dtype, constants, bias)
        return scheme, {name: part.to(device) for name, part in parts.items()}

    return quantize


def running(policy: Policy, whole: Whole) -> Quantizer:
    """Simulated, with the ranges so far; the engine's arithmetic if a scheme needs no data."""
    without_data = quantized(policy, {}, whole)

    def quantize(module: str, rows: Tensor, bias: Tensor | None) -> tuple[Arithmetic, Parts] | None:
        if policy.observer(module) is None:
            return without_data(module, rows, bias)
        return RunningLinear(), {"weight": rows}

    return quantize


class RunningLinear:
    """A linear with int8 weights and inputs, simulated in the dtype of the model.

    With D = rounding to that dtype, for a weight [n, k] and inputs between `low` and `high` so far:

        s = D(D(high / 255) - D(low / 255))     o = rint(D(-low / s)) - 128
        x' = D(D(clamp(rint(D(D(x / s) + o)), -128, 127) - o) * s)

    and rows of the weight likewise, with s = D(amax / 127) and no offset.
    """

    def __init__(self) -> None:
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._weight: Tensor | None = None

    def forward(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
        """x: [..., k] -> [..., n]; `parts` holds the float `weight`. For one thread."""
        if self._weight is None:
            self._weight = _rounded(parts["weight"])
        if x.numel():
            zero = x.new_zeros(())
            self._low = torch.minimum(zero if self._low is None else self._low, x.min())
            self._high = torch.maximum(zero if self._high is None else self._high, x.max())
            x = _quantized(x, self._low, self._high)
        return F.linear(x, self._weight, bias)


def _quantized(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale = high / 255 - low / 255
    if not float(scale):  # nothing but zeros so far
        return x
    offset = (-low / scale).round() - 128
    return ((x / scale + offset).round().clamp(-128, 127) - offset) * scale


def _rounded(weight: Tensor) -> Tensor:
    step = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(2.0**-23)
    return (weight / step).round().clamp(-128, 127) * step
