"""Clipping as a trace sees it: the ends of what codes reach."""

import math

import pytest
import torch

from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.verification.on_text.trace import _cut, input_limits

MEASURED = {
    "w8a8_static": {"input_scale": torch.tensor([0.03125]), "input_offset": torch.tensor([-7.0])},
    "fp8_static": {"input_scale": torch.tensor([0.015625])},
    "nvfp4": {"input_global_scale": torch.tensor([1 / 512.0])},
}
FREE = ("w8a8_dynamic", "fp8_dynamic", "w4a16")


def quantized(name, rows, measured=None):
    """A scheme, and the parts that it makes of a weight."""
    scheme = discover(Scheme)[name]()
    stats = scheme.constants(measured or {}, torch.float32)
    stats |= {"column_amax": rows.abs().amax(0), "weight_amax": rows.abs().max()}
    return scheme, scheme.quantize(rows, torch.float32, stats)


def weight(n=16, k=128):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", MEASURED)
def test_inputs_beyond_the_limits_are_as_those_at_them(name):
    scheme, parts = quantized(name, weight(), MEASURED[name])
    x = 3 * torch.randn(64, 128, generator=torch.Generator().manual_seed(6))
    low, high = input_limits(scheme, parts, x)
    assert low < 0 < high
    beyond = torch.where(x.abs() > 3, x.sign() * 1000, x)
    at = beyond.clamp(low, high)
    torch.testing.assert_close(scheme.forward(beyond, parts), scheme.forward(at, parts))
    within = x.clamp(low / 2, high / 2)
    assert not torch.equal(scheme.forward(within, parts), scheme.forward(within / 2, parts))


@pytest.mark.parametrize("name", FREE)
def test_inputs_that_are_measured_while_serving_are_not_clipped(name):
    scheme, parts = quantized(name, weight())
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(6)) * 100
    low, high = input_limits(scheme, parts, x)
    assert torch.equal(x.clamp(low, high), x)
    assert name != "w4a16" or (low, high) == (-math.inf, math.inf)


def test_scales_rounded_down_are_not_guessed_at():
    scheme, parts = quantized("mxfp4", weight())
    assert input_limits(scheme, parts, torch.ones(1, 128)) is None


@pytest.mark.parametrize("name", ["w4a16", "mxfp4", "fp8_dynamic", "w8a8_static"])
def test_a_weight_without_what_codes_do_not_reach_has_the_same_codes(name):
    rows = weight()
    rows[3, 5], rows[4, 9] = 9.0, -7.0
    scheme, parts = quantized(name, rows, MEASURED.get(name))
    cut = _cut(scheme, parts, rows)
    stored = scheme.dequantize(parts)
    clipped = cut != rows
    lost = float((cut - rows).abs().max())
    assert (lost > 0.5) == (name in {"w4a16", "mxfp4"})  # whose scales cut outliers off
    assert bool((stored[clipped].abs() <= cut[clipped].abs() + 1e-6).all())
    assert float((stored - cut).abs().max()) <= float((stored - rows).abs().max())
    assert clipped.sum() < 0.05 * rows.numel()
