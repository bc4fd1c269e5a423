"""Fp8 schemes against independent transcriptions of vLLM's formulas, and what their scales are."""

import bisect
import math

import pytest
import torch

from quantcli.core.errors import InputError
from quantcli.schemes.arithmetic import fp8
from quantcli.schemes.fp8_block import Fp8Block
from quantcli.schemes.fp8_static import Fp8Static
from quantcli.schemes.fp8_tensor import Fp8Tensor
from tests.measured import constants, quantize

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FINITE = CODES.float().nan_to_num(0).unique().tolist()  # ascending
EVEN = set(CODES[::2].float().tolist())
LEAST = 1 / (448 * 512)


def f32(x):
    """Round a Python float to float32."""
    return float(torch.tensor(x, dtype=torch.float64).float())


def e4m3(x):
    """The code nearest to x, the even one of two, and 448 beyond that."""
    x = max(-448.0, min(448.0, x))
    place = bisect.bisect_left(FINITE, x)
    around = FINITE[max(0, place - 1) : place + 1]
    return min(around, key=lambda code: (abs(x - code), code not in EVEN))


def make(scheme, dtype, n=7, k=37):
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(n, k, generator=generator) * 0.05).to(dtype)
    x = torch.randn(4, k, generator=generator).to(dtype)
    x[2] = 0
    bias = torch.randn(n, generator=generator).to(dtype)
    return weight, x, bias, quantize(scheme, weight, dtype, x)


def near(y, expected, dtype):
    # the order of the float32 sum is free: one step of the output's dtype at most
    step = 2**-7 if dtype == torch.bfloat16 else 2**-10
    return float(y) == pytest.approx(expected, rel=step, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_tensor(dtype, with_bias):
    weight, x, bias, parts = make(Fp8Tensor(), dtype)
    y = Fp8Tensor().forward(x, parts, bias if with_bias else None)
    assert y.dtype == dtype
    scale = float(parts["weight_scale"])
    assert scale == f32(float(weight.abs().max()) / 448)
    for m, token in enumerate(x.tolist()):
        token_scale = max(f32(max(map(abs, token)) / 448), f32(LEAST))
        codes = [e4m3(f32(v * f32(1 / token_scale))) for v in token]
        for n, row in enumerate(parts["weight"].float().tolist()):
            total = math.fsum(a * b for a, b in zip(codes, row, strict=True))
            assert near(y[m, n], total * scale * token_scale + with_bias * float(bias[n]), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_static(dtype, with_bias):
    scheme = Fp8Static(observer="minmax")
    _, x, bias, parts = make(scheme, dtype)
    x[3] *= 5  # beyond what the observer saw: codes saturate
    y = scheme.forward(x, parts, bias if with_bias else None)
    assert y.dtype == dtype
    scale, input_scale = float(parts["weight_scale"]), float(parts["input_scale"])
    clipped = 0
    for m, token in enumerate(x.tolist()):
        codes = [e4m3(f32(v * f32(1 / input_scale))) for v in token]
        clipped += sum(abs(code) == 448 for code in codes)
        for n, row in enumerate(parts["weight"].float().tolist()):
            total = math.fsum(a * b for a, b in zip(codes, row, strict=True))
            expected = total * f32(scale * input_scale) + with_bias * float(bias[n])
            assert near(y[m, n], expected, dtype)
    assert clipped > 3


@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_block(with_bias):
    generator = torch.Generator().manual_seed(4)
    weight = (torch.randn(130, 200, generator=generator) * 0.05).bfloat16()
    weight[:128, 128:] *= 40
    x = torch.randn(3, 200, generator=generator).bfloat16()
    x[0, 128:] = 0
    bias = torch.randn(130, generator=generator).bfloat16()
    parts = quantize(Fp8Block(), weight, torch.bfloat16)
    y = Fp8Block().forward(x, parts, bias if with_bias else None)
    scales = parts["weight_scale"]
    assert scales.shape == (2, 2)
    for m, token in enumerate(x.tolist()):
        for n in (0, 5, 127, 128, 129):
            total = 0.0
            for group, columns in enumerate((slice(128), slice(128, 200))):
                scale = max(f32(max(map(abs, token[columns])) / 448), f32(LEAST))
                codes = [e4m3(f32(v / scale)) for v in token[columns]]
                row = parts["weight"][n, columns].float().tolist()
                inner = math.fsum(a * b for a, b in zip(codes, row, strict=True))
                total += inner * scale * float(scales[n // 128, group])
            total = float(torch.tensor(total).bfloat16())  # the bias is added to what was rounded
            assert near(y[m, n], total + with_bias * float(bias[n]), torch.bfloat16)


def test_each_block_has_its_own_scale():
    weight = torch.full((300, 257), 0.5)
    weight[127, 255], weight[128, 256], weight[299, 0] = 3, -7, 1e-3
    weight[256:, 128:256] = 0
    parts = Fp8Block().quantize(weight, torch.float32)
    expected = torch.tensor([[0.5, 3, 0.5], [0.5, 0.5, 7], [0.5, 0, 0.5]]) / 448
    assert float(parts["weight_scale"][2, 1]) > 0
    assert torch.equal(parts["weight_scale"].where(expected > 0, 0), expected)
    assert not parts["weight"][256:, 128:256].float().any()
    back = Fp8Block().dequantize(parts)
    assert float(back[127, 255]) == pytest.approx(3)
    assert float(back[128, 256]) == pytest.approx(-7)


def test_codes_of_a_tensor_survive_the_engines_second_rounding():
    """vLLM dequantizes to float16 and quantizes again: a smaller scale would lose small codes."""
    codes = CODES.float().nan_to_num(0)
    for amax in (0.0, 1e-6, 0.0136, 0.014, 1.0, 100.0, 60000.0):
        scale = fp8.tensor_scale(torch.tensor([amax]), torch.float32)
        again = ((codes * scale).to(torch.float16).float() / scale).to(torch.float8_e4m3fn)
        assert torch.equal(again.float(), codes), amax
    assert float(fp8.tensor_scale(torch.tensor([1.0]), torch.float32)) == f32(1 / 448)
    smaller = 1e-5
    again = ((codes * smaller).to(torch.float16).float() / smaller).to(torch.float8_e4m3fn)
    assert not torch.equal(again.float(), codes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", [Fp8Tensor(), Fp8Static(), Fp8Block()], ids=lambda s: s.name)
def test_nan_and_inf_show_in_the_scale(scheme, value):
    weight = torch.ones(140, 130)
    weight[130, 3] = value
    scale = quantize(scheme, weight, torch.bfloat16, torch.ones(1, 130))["weight_scale"]
    sound = torch.isfinite(scale).flatten().tolist()
    assert sound == ([True, True, False, True] if scheme.name == "fp8_block" else [False])


# -- the scale of inputs ---------------------------------------------------------------------------


def loss(values, scale):
    codes = torch.tensor([e4m3(f32(v * f32(1 / scale))) for v in values.tolist()])
    return float((codes.double() * scale - values.double()).square().sum())


def measured(scheme, x):
    return float(constants(scheme, torch.float32, x, torch.ones(1, 1))["input_scale"])


def test_minmax_represents_the_largest_value():
    x = torch.tensor([[0.25, -3.0, 2.0]])
    assert measured(Fp8Static(observer="minmax"), x) == f32(3 / 448)


def test_percentile_leaves_out_the_largest_values():
    x = torch.linspace(-1, 1, 2001).bfloat16().float().view(1, -1)
    x[0, 0] = -500.0
    scale = measured(Fp8Static(observer="percentile", percentile=99.0), x)
    assert scale == pytest.approx(0.99 / 448, rel=0.01)


def test_mse_finds_the_scale_with_the_least_error():
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(1, 600, generator=generator).bfloat16().float()
    scale, widest = measured(Fp8Static(), x), float(x.abs().max()) / 448
    best = min(loss(x[0], widest * 2 ** (step / 10)) for step in range(-20, 11))
    assert loss(x[0], scale) <= best * 1.02
    assert loss(x[0], scale) < 0.995 * loss(x[0], f32(widest))


def test_mse_does_not_clip_what_is_large():
    x = torch.full((1, 2000), 0.1)
    x[0, 7] = 900.0
    scale = measured(Fp8Static(), x)
    assert 440 < 900 / scale <= 448 or 900 / scale >= 224


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("x", [None, torch.zeros(3, 4)])
def test_inputs_that_were_never_seen_or_zero_get_a_positive_scale(observer, x):
    assert measured(Fp8Static(observer=observer), x) == 2.0**-64


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-30, 0.0123])
def test_scales_that_make_no_sense_are_refused(scale):
    with pytest.raises(InputError, match="is not a scale that bfloat16 can hold"):
        Fp8Static().constants({"input_scale": torch.tensor([scale])}, torch.bfloat16)


def test_a_percentile_needs_its_observer():
    with pytest.raises(ValueError, match="has no effect without `observer: percentile`"):
        Fp8Static(observer="minmax", percentile=99.0)
