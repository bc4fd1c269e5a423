"""MXFP8 against exact arithmetic: exponents as rational numbers, codes and products in float64."""

import math
from fractions import Fraction

import pytest
import torch

from quantcli.schemes.mxfp8 import Mxfp8
from tests.quantized import FP8

FINITE = torch.tensor(sorted({float(v) for v in FP8 if math.isfinite(v)}), dtype=torch.float64)


def exponent(amax):
    """The least e in -127..127 with amax <= 448 * 2^e."""
    value = Fraction(float(amax))
    return next((e for e in range(-127, 127) if value <= 448 * Fraction(2) ** e), 127)


def nearest(values):
    """The nearest number of e4m3, of two the one with an even code: float64."""
    clamped = values.double().clamp(-448, 448).contiguous()
    place = torch.searchsorted(FINITE, clamped).clamp(1, len(FINITE) - 1)
    low, high = FINITE[place - 1], FINITE[place]
    even = torch.tensor([not code & 1 for code in range(256)])
    codes = {float(v): bool(even[c]) for c, v in enumerate(FP8) if math.isfinite(v)}
    ties = torch.tensor([codes[float(v)] for v in high.flatten()]).view(high.shape)
    below, above = clamped - low, high - clamped
    return torch.where((above < below) | ((above == below) & ties), high, low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exponents_are_exact(dtype):
    """Around 448 times every power of two from 2^-126 on, where one bit of a logarithm decides."""
    limits = torch.tensor([1.75 * 2.0**e for e in range(-118, 128)]).to(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    limits = limits[torch.isfinite(limits) & (limits > 0)]
    near = torch.cat([(limits.view(integer) + step).view(dtype) for step in (-1, 0, 1)])
    rows = torch.zeros(len(near), 32, dtype=dtype)
    rows[:, 7] = -near
    parts = Mxfp8().quantize(rows, torch.float8_e8m0fnu)
    expected = [exponent(value) for value in near.float()]
    assert len(set(expected)) > (200 if dtype != torch.float16 else 25)
    assert parts["weight_scale"].flatten().tolist() == [2.0**e for e in expected]
    assert float(parts["weight"].float().abs().max()) <= 448
    scaled = rows.double() / torch.tensor([2.0**e for e in expected], dtype=torch.float64)[:, None]
    assert torch.equal(parts["weight"].double(), nearest(scaled))


def test_groups_of_zeros_and_of_the_smallest_numbers():
    rows = torch.zeros(2, 64)
    rows[1, 40] = 2.0**-149
    parts = Mxfp8().quantize(rows, torch.float8_e8m0fnu)
    assert parts["weight_scale"].tolist() == [[2.0**-127] * 2] * 2
    assert not parts["weight"].view(torch.uint8).any()
    assert not torch.signbit(parts["weight"].float()).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_group_with_nan_or_inf_has_a_scale_that_is_not_finite(value):
    rows = torch.ones(2, 64)
    rows[1, 33] = value
    scale = Mxfp8().quantize(rows, torch.float8_e8m0fnu)["weight_scale"]
    assert torch.isfinite(scale).tolist() == [[True, True], [True, False]]


def relative_error(rows, scale):
    groups = rows.view(len(rows), -1, 32) / scale
    back = (groups.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).view(rows.shape)
    return float((back - rows).norm() / rows.norm())


def test_less_error_than_with_exponents_rounded_down():
    """Which clip: 0.0265 instead of 0.0293 of normal weights."""
    rows = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    scheme = Mxfp8()
    parts = scheme.quantize(rows, torch.float8_e8m0fnu)
    ours = float((scheme.dequantize(parts) - rows).norm() / rows.norm())
    amax = rows.view(512, -1, 32).abs().amax(-1, keepdim=True)
    down = torch.exp2(torch.frexp(amax).exponent.float() - 9)
    assert ours == pytest.approx(relative_error(rows, parts["weight_scale"].unsqueeze(-1)), rel=1e-6)
    assert ours == pytest.approx(0.0265, abs=2e-4)
    assert relative_error(rows, down) == pytest.approx(0.0293, abs=2e-4)


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [96, 80])
def test_the_product_is_the_engines(k, dtype, down):
    """Inputs: the exponent of vLLM is rounded up, that of vLLM-Ascend down, which clips to 448."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(5, k, generator=draw).to(dtype)
    bias = torch.randn(5, generator=draw).to(dtype)
    x = torch.randn(7, k, generator=draw).to(dtype)
    x[2] = 0
    x[3, :32] = 1.9375  # clipped to 1.75 if rounded down
    parts = Mxfp8().quantize(weight, torch.float8_e8m0fnu)
    if down:
        parts["input_scale_alg"] = torch.zeros(1, dtype=torch.int64)
    rounded = torch.zeros(7, k, dtype=torch.float64)
    for row, column in ((r, c) for r in range(7) for c in range(0, k, 32)):
        group = x[row, column : column + 32].double()
        amax = float(group.abs().max())
        e = exponent(amax)
        if down:
            e = max(-127, math.frexp(amax)[1] - 1 - 8) if amax else -127
        rounded[row, column : column + 32] = nearest(group / 2.0**e) * 2.0**e
    assert bool((rounded[3, :32] == (1.75 if down else 2.0)).all())
    scale = parts["weight_scale"].double().repeat_interleave(32, 1)[:, :k]
    expected = rounded @ (parts["weight"].double() * scale).T + bias.double()
    y = Mxfp8().forward(x, parts, bias)
    assert y.dtype == dtype
    step = 2**-8 if dtype == torch.bfloat16 else 2**-20
    assert torch.allclose(y.double(), expected, rtol=step, atol=1e-5)
