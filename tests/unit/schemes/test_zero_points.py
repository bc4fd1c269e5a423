"""Int4 with zero points, against formulas written down once more and a search of every choice."""

import math

import numpy as np
import pytest
import torch

from quantcli.core.codes import pack_columns, unpack_columns
from quantcli.schemes.arithmetic import zero_points
from quantcli.schemes.arithmetic.gptq import Feedback, gptq, squares
from quantcli.schemes.w4a16 import W4A16
from tests.measured import quantize

BF16 = torch.bfloat16


def weight(n=48, k=256, seed=0):
    """Rows whose mean is up to half a sigma, as those of trained models."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator)
    return ((rows + torch.rand(n, 1, generator=generator) - 0.5) * 0.02).bfloat16()


def relative(scheme, rows):
    parts = quantize(scheme, rows, BF16)
    error = scheme.dequantize(parts).double() - rows.double()
    return float(error.norm() / rows.double().norm())


def held(value):
    return float(torch.tensor(value, dtype=torch.float32).to(BF16).float())


@pytest.mark.parametrize("size", [32, "channel"])
def test_without_a_search_the_range_is_that_of_the_group(size):
    """As compressed-tensors computes it: 0 is in the range, the scale is rounded before the rest."""
    rows = weight(6, 64)
    rows[1] = rows[1].abs()  # nothing below 0
    rows[2] = -rows[2].abs() - 0.01
    rows[3] = 0
    scheme = W4A16(group_size=size, symmetric=False, clip="none")
    parts = quantize(scheme, rows, BF16)
    columns = 64 if size == "channel" else size
    for i, row in enumerate(rows.float().numpy()):
        for g, group in enumerate(row.reshape(-1, columns)):
            low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
            scale = held(np.float32(high - low) / np.float32(15))
            scale = scale or 2.0**-126
            zero = min(7, max(-8, round(-8 - low / scale)))
            assert float(parts["weight_scale"][i, g]) == scale
            assert int(parts["weight_zero_point"][i, g]) == zero
            codes = [min(7, max(-8, round(float(w) / scale) + zero)) for w in group]
            start = g * columns
            assert parts["weight"][i, start : start + columns].tolist() == codes
    shifted = parts["weight"][3].int() - parts["weight_zero_point"][3].repeat_interleave(columns)
    assert not shifted.any()
    assert set(parts["weight_zero_point"][1].tolist()) == {-8}
    assert set(parts["weight_zero_point"][2].tolist()) == {7}


def least(rows, importance):
    """The least weighted squared error of each row over all zero points and 200 scales: float64 [n]."""
    values, weights = rows.double().numpy(), importance.double().numpy()
    width = np.maximum(values.max(1), 0) - np.minimum(values.min(1), 0)
    best = np.full(len(values), np.inf)
    for zero in range(-8, 8):
        for share in np.linspace(0.4, 1.3, 200):
            scale = (width / 15 * share)[:, None]
            codes = np.clip(np.rint(values / scale), -8 - zero, 7 - zero)
            best = np.minimum(best, (weights * (codes * scale - values) ** 2).sum(1))
    return best


@pytest.mark.parametrize("columns", [32, 128])
@pytest.mark.parametrize("alike", [True, False])
def test_the_search_is_near_the_best_of_all_scales_and_zero_points(columns, alike):
    rows = weight(64, columns, seed=columns).float()
    generator = torch.Generator().manual_seed(1)
    importance = torch.ones(columns) if alike else torch.rand(columns, generator=generator) ** 2

    def error(of):
        scale, zero = of
        codes = zero_points.codes(rows, scale, zero).double()
        lost = (codes - zero) * scale.double() - rows.double()
        return (lost.square() * importance.double()).sum(1).numpy()

    found = error(zero_points.search(rows, torch.float32, importance))
    whole = error(zero_points.search(rows, torch.float32, None))
    best = least(rows, importance)
    assert bool((found <= whole * (1 + 1e-6)).all())
    assert found.sum() / best.sum() < 1.03
    assert whole.sum() / best.sum() > 1.08


def test_less_error_than_symmetric_codes():
    rows = weight(128, 1024)
    for size, most in ((32, 0.0748), (128, 0.0925)):
        symmetric = relative(W4A16(group_size=size, clip="mse"), rows)
        plain = relative(W4A16(group_size=size, symmetric=False, clip="none"), rows)
        searched = relative(W4A16(group_size=size, symmetric=False, clip="mse"), rows)
        assert searched < most
        assert searched < 0.96 * plain
        assert searched < 0.965 * symmetric
        by_columns = relative(W4A16(group_size=size, symmetric=False), rows)
        assert searched < by_columns < plain * 1.02


def test_the_last_group_may_be_short_and_rows_may_be_stacked():
    rows = weight(5, 72)
    scheme = W4A16(group_size=32, symmetric=False, clip="mse")
    parts = quantize(scheme, rows, torch.float16)
    assert parts["weight_zero_point"].shape == parts["weight_scale"].shape == (5, 3)
    assert parts["weight_zero_point"].dtype == torch.int8
    assert float((scheme.dequantize(parts) - rows.float()).norm() / rows.float().norm()) < 0.1
    stacked = quantize(scheme, torch.stack([rows, rows]), torch.float16)
    for name, part in parts.items():
        assert torch.equal(stacked[name][1], part)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_scale(value):
    rows = weight(3, 64)
    rows[1, 40] = value
    parts = quantize(W4A16(group_size=32, symmetric=False), rows, BF16)
    finite = torch.isfinite(parts["weight_scale"])
    assert not finite[1, 1]
    assert finite.sum() == 5


def test_the_weight_is_multiplied_as_the_engine_does():
    scheme, rows = W4A16(group_size=32, symmetric=False), weight()
    parts = quantize(scheme, rows, BF16)
    x = torch.randn(4, rows.shape[1], generator=torch.Generator().manual_seed(2)).bfloat16()
    shift = parts["weight"].double() - parts["weight_zero_point"].double().repeat_interleave(32, 1)
    exact = shift * parts["weight_scale"].double().repeat_interleave(32, 1)
    expected = x.double() @ exact.to(BF16).double().T
    assert torch.allclose(scheme.forward(x, parts).double(), expected, rtol=2**-7, atol=1e-3)
    assert W4A16.for_numerics(scheme.numerics) == W4A16(group_size=32, symmetric=False)
    assert W4A16.for_numerics(W4A16().numerics).symmetric


def test_gptq_with_zero_points_makes_up_for_errors():
    """Errors of outputs, computed with the float weight and the one that is stored."""
    rows = weight(64, 128).float()
    scheme = W4A16(group_size=32, symmetric=False, clip="mse")
    parts = quantize(scheme, rows, torch.float32)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    hessian = x.T @ x
    step = parts["weight_scale"].repeat_interleave(32, 1)
    zero = parts["weight_zero_point"].repeat_interleave(32, 1)
    feedback = Feedback.of(hessian)
    rounded = gptq(
        rows + zero * step, hessian, step, parts["weight"], scheme.numerics.weight.element, feedback
    )
    assert int(rounded.codes.min()) >= -8
    assert int(rounded.codes.max()) <= 7

    def lost(codes):
        stored = scheme.dequantize({**parts, "weight": codes})
        return ((rows.double() - stored.double()) @ x.double().T).square().sum(1)

    for codes, said in ((rounded.codes, rounded.error), (parts["weight"], rounded.nearest)):
        assert torch.allclose(lost(codes), said, rtol=1e-3)
    signal = (rows.double() @ x.double().T).square().sum(1)
    assert torch.allclose(signal, squares(rows, hessian), rtol=1e-4)
    assert float(rounded.error.sum() / rounded.nearest.sum()) < 0.6


@pytest.mark.parametrize("n", [1, 7, 8, 13, 16])
def test_zero_points_are_packed_along_rows(n):
    """Word w of a column holds rows 8 w to 8 w + 7, the first in the lowest bits, plus 8; rest: 0."""
    values = torch.randint(-8, 8, (n, 3), generator=torch.Generator().manual_seed(n), dtype=torch.int8)
    packed = pack_columns(values, 4)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    for word in range(-(-n // 8)):
        for g in range(3):
            total = 0
            for place, value in enumerate(values[8 * word : 8 * word + 8, g].tolist()):
                total |= (value + 8) << (4 * place)
            assert int(packed[word, g]) & 0xFFFFFFFF == total
    assert packed.shape == (-(-n // 8), 3)
    assert torch.equal(unpack_columns(packed, 4, n), values)
