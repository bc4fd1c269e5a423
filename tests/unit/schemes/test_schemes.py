"""`forward` against an independent transcription of the engine's formulas, element by element."""

import math
import struct

import pytest
import torch

from quantcli.core.errors import InputError
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from tests.measured import constants, quantize, weight_dtype

STATIC = ["w8a8_mix", "w8a8_static"]


def f32(x):
    """Round a Python float to float32."""
    return float(torch.tensor(x, dtype=torch.float64).float())


def rounded(x, dtype):
    return float(torch.tensor(x, dtype=torch.float64).float().to(dtype))


def make(name, dtype, k=37, n=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) * 0.05).to(dtype)
    x = torch.randn(5, k, generator=generator).to(dtype)
    x[2] = 0  # a token of zeros
    bias = torch.randn(n, generator=generator).to(dtype)
    scheme = discover(Scheme)[name]()
    return scheme, quantize(scheme, weight, dtype), x, bias


def check_dynamic(y, x, parts, bias):
    """What a node does that quantizes inputs per token."""
    dtype = x.dtype
    assert y.dtype == dtype
    codes = parts["weight"].tolist()
    scales = parts["weight_scale"].flatten().tolist()
    for m, token in enumerate(x.float().tolist()):
        amax = max(map(abs, token))
        multiplier = f32(127 / amax) if amax else 0.0
        quantized = [round(f32(value * multiplier)) for value in token]  # half to even, as rint
        token_scale = f32(amax * f32(1 / 127))
        for n, row in enumerate(codes):
            total = sum(a * b for a, b in zip(quantized, row, strict=True))
            value = f32(f32(f32(total) * scales[n]) * token_scale)
            if bias is not None:
                value = f32(value + float(bias[n]))
            assert float(y[m, n]) == rounded(value, dtype), (m, n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_w8a8_dynamic(dtype, with_bias):
    scheme, parts, x, bias = make("w8a8_dynamic", dtype)
    bias = bias if with_bias else None
    check_dynamic(scheme.forward(x, parts, bias), x, parts, bias)


def make_static(name, dtype, *, symmetric=False, with_bias=True, k=37, n=11, **options):
    generator = torch.Generator().manual_seed(5)
    weight = (torch.randn(n, k, generator=generator) * 0.05).to(dtype)
    weight[4] = 0
    x = (torch.randn(7, k, generator=generator) + 0.8).to(dtype)
    x[2] = 0
    x[3] *= 9  # beyond what the observer saw: codes saturate
    bias = torch.randn(n, generator=generator).to(dtype) if with_bias else None
    scheme = discover(Scheme)[name](symmetric=symmetric, **options)
    seen = torch.cat([x[:3], x[4:]])
    return scheme, weight, x, bias, quantize(scheme, weight, dtype, seen, bias)


def multiplier(parts):
    """The reciprocal of input_scale in the serving dtype."""
    return rounded(f32(1 / float(parts["input_scale"])), parts["input_scale"].dtype)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_static_inputs(name, dtype, with_bias, symmetric):
    scheme, _, x, bias, parts = make_static(name, dtype, symmetric=symmetric, with_bias=with_bias)
    y = scheme.forward(x, parts, torch.full((11,), 99.0))  # a bias given here is not looked at
    assert y.dtype == parts["input_scale"].dtype == dtype
    r, offset = multiplier(parts), float(parts["input_offset"])
    assert (offset == 0) == symmetric
    codes, deq = parts["weight"].tolist(), parts["deq_scale"].tolist()
    clipped = 0
    for m, token in enumerate(x.float().tolist()):
        steps = [round(f32(f32(value * r) + offset)) for value in token]  # half to even, as rint
        quantized = [max(-128, min(127, step)) for step in steps]
        clipped += sum(a != b for a, b in zip(steps, quantized, strict=True))
        for n, row in enumerate(codes):
            total = sum(a * b for a, b in zip(quantized, row, strict=True))
            total += int(parts["quant_bias"][n])
            scale = deq[n]
            if dtype == torch.float16:  # of which the hardware honours 19 bits
                (bits,) = struct.unpack("<I", struct.pack("<f", scale))
                assert not bits & 0x1FFF
            assert float(y[m, n]) == rounded(f32(f32(total) * scale), dtype), (m, n)
    assert clipped > 5
    assert "forward_prefill" not in dir(scheme) or name == "w8a8_mix"
    if name == "w8a8_mix":
        check_dynamic(scheme.forward_prefill(x, parts, bias), x, parts, bias)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_the_static_matmul_is_given(name, dtype, symmetric):
    _, weight, _, bias, parts = make_static(name, dtype, symmetric=symmetric)
    r, offset = multiplier(parts), int(parts["input_offset"])
    for n, row in enumerate(weight.double().tolist()):
        scale, deq = float(parts["weight_scale"][n]), float(parts["deq_scale"][n])
        codes = parts["weight"][n].tolist()
        assert codes == [round(f32(value / scale)) for value in row]
        assert max(map(abs, codes)) == 127 or n == 4
        assert int(parts["quant_bias"][n]) == round(float(bias[n]) / deq - offset * sum(codes))
        if name == "w8a8_static":
            assert scale == f32(deq * r)
            reach = max(map(abs, row)) / scale  # deq_scale is rounded up to its grid
            assert n == 4 or 127.2501 > reach > (127.246 if dtype == torch.bfloat16 else 127.12)
        else:
            assert scale == rounded(scale, dtype)
            assert deq == pytest.approx(scale / r, rel=2**-22 if dtype == torch.bfloat16 else 2**-11)
            assert dtype == torch.bfloat16 or deq != scale / r


def test_the_effective_scale_counts_and_not_the_stored_one():
    # 1 / bfloat16(0.0123) rounds to 81, whose reciprocal is 0.4 % larger
    stats = {"input_scale": torch.tensor([0.0123]).bfloat16().float(), "input_offset": torch.zeros(1)}
    scheme = discover(Scheme)["w8a8_static"]()
    parts = scheme.quantize(
        torch.eye(4, dtype=torch.bfloat16), torch.float32, scheme.constants(stats, torch.bfloat16)
    )
    scales = parts["weight_scale"].flatten()
    assert (scales / parts["deq_scale"]).tolist() == pytest.approx([81.0] * 4, rel=1e-6)
    y = scheme.forward(torch.ones(1, 4), parts)  # 1.0 is code 81: exact
    assert y[0].tolist() == pytest.approx((127 * scales).tolist(), rel=1e-6)


BAD_STATS = [
    (0.0, 0.0, "not a scale that bfloat16 can hold"),
    (-1.0, 0.0, "not a scale that bfloat16 can hold"),
    (math.nan, 0.0, "not a scale that bfloat16 can hold"),
    (math.inf, 0.0, "not a scale that bfloat16 can hold"),
    (1e-40, 0.0, "not a scale that bfloat16 can hold"),
    (0.0123, 0.0, "not a scale that bfloat16 can hold"),  # of another serving dtype
    (0.5, 128.0, "is not an int8"),
    (0.5, 0.5, "is not an int8"),
    (0.5, math.nan, "is not an int8"),
]


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize(("scale", "offset", "word"), BAD_STATS)
def test_stats_that_make_no_sense_are_refused(name, scale, offset, word):
    stats = {"input_scale": torch.tensor([scale]), "input_offset": torch.tensor([offset])}
    with pytest.raises(InputError, match=word):
        discover(Scheme)[name]().constants(stats, torch.bfloat16)


@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_dynamic(with_bias):
    scheme, parts, x, bias = make("fp8_dynamic", torch.bfloat16)
    y = scheme.forward(x, parts, bias if with_bias else None)
    codes = parts["weight"].double().tolist()
    scales = parts["weight_scale"].flatten().tolist()
    for m, token in enumerate(x.float().tolist()):
        amax = max(map(abs, token))
        multiplier = f32(448 / amax) if amax else 0.0
        scaled = torch.tensor([f32(v * multiplier) for v in token]).clamp(-448, 448)
        quantized = scaled.to(torch.float8_e4m3fn).double().tolist()
        token_scale = f32(amax * f32(1 / 448))
        for n, row in enumerate(codes):
            total = math.fsum(a * b for a, b in zip(quantized, row, strict=True))
            value = rounded(f32(f32(f32(total) * scales[n]) * token_scale), torch.bfloat16)
            if with_bias:
                value = rounded(value + float(bias[n]), torch.bfloat16)
            # the order of the float32 sum is free: one step of bfloat16 at most
            assert float(y[m, n]) == pytest.approx(value, rel=2**-7, abs=1e-6)


def test_w8a16_is_a_matmul_with_the_dequantized_weight():
    scheme, parts, x, bias = make("w8a16", torch.bfloat16)
    y = scheme.forward(x, parts, bias)
    weight = (parts["weight"].float() * parts["weight_scale"]).bfloat16().double()
    exact = x.double() @ weight.T + bias.double()
    assert torch.allclose(y.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_w4a4_dynamic(dtype, with_bias):
    """The kernel's product is rounded to float16 whatever x is, and the bias added in x's dtype."""
    scheme, parts, x, bias = make("w4a4_dynamic", dtype, k=40)
    y = scheme.forward(x, parts, bias if with_bias else None)
    assert y.dtype == dtype
    scales = parts["weight_scale"].flatten().tolist()
    for m, token in enumerate(x.float().tolist()):
        amax = max(map(abs, token))
        mul = f32(7 / amax) if amax else 0.0
        codes = [round(f32(value * mul)) for value in token]
        assert max(map(abs, codes), default=0) <= 7
        token_scale = f32(amax * f32(1 / 7))
        for n, row in enumerate(parts["weight"].tolist()):
            total = sum(a * b for a, b in zip(codes, row, strict=True))
            value = rounded(f32(f32(f32(total) * scales[n]) * token_scale), torch.float16)
            value = rounded(value, dtype)
            if with_bias:
                value = rounded(value + float(bias[n]), dtype)
            assert float(y[m, n]) == value, (m, n)


def test_clipping_int4_rows_loses_less():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 256, generator=generator)
    weight[5, 3] = 40  # a row with one huge value: cut off, as it is worth it, or not
    scheme = discover(Scheme)["w4a4_dynamic"]
    errors = {}
    for clip in ("none", "mse"):
        parts = scheme(clip=clip).quantize(weight, torch.float32)
        assert int(parts["weight"].min()) >= -8
        assert int(parts["weight"].max()) <= 7
        errors[clip] = (scheme().dequantize(parts) - weight).double().square().sum(1)
    assert bool((errors["mse"] <= errors["none"] * (1 + 1e-6)).all())
    usual = torch.arange(64) != 5
    gain = errors["none"][usual].sum() / errors["mse"][usual].sum()
    assert float(gain.log10() * 10) > 1.5  # dB
    # no scale of a fine grid is much better
    best = torch.full((64,), math.inf).double()
    for share in torch.linspace(0.2, 1, 400):
        scale = weight.abs().amax(1, keepdim=True) / 7 * share
        back = (weight / scale).round().clamp(-8, 7) * scale
        best = torch.minimum(best, (back - weight).double().square().sum(1))
    assert float((errors["mse"] / best).max()) < 1.02


@pytest.mark.parametrize("name", sorted(discover(Scheme)))
def test_outputs_are_close_to_the_float_linear(name):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(64, 256, generator=generator) * 0.03).bfloat16()
    x = torch.randn(32, 256, generator=generator).bfloat16()
    scheme = discover(Scheme)[name]()
    y = scheme.forward(x, quantize(scheme, weight, torch.bfloat16, x)).double()
    exact = x.double() @ weight.double().T
    sqnr = 10 * math.log10(float((exact**2).sum() / ((y - exact) ** 2).sum()))
    limits = {"w8a8_dynamic": 38, "w8a16": 42, "fp8_dynamic": 28, "w8a8_static": 38, "w8a8_mix": 37,
              "w4a4_dynamic": 14, "fp8_static": 28, "fp8_tensor": 28, "fp8_block": 28, "mxfp8": 28,
              "w4a16": 19, "w4a8": 18, "w4a4_flatquant": 14, "w4a4_hadamard": 14, "nvfp4": 17.5,
              "nvfp4a16": 21, "mxfp4": 15, "mxfp4a16": 18, "mxfp4_fp8": 18,
              "mxfp4_flatquant": 14}  # fmt: skip
    assert sqnr > limits[name]


@pytest.mark.parametrize("name", sorted(name for name in discover(Scheme) if "fp4" not in name))
def test_zero_rows_and_outliers(name):
    """Of four-bit floats: test_fp4.py."""
    weight = torch.zeros(3, 8, dtype=torch.bfloat16)
    weight[1, 3] = 1e4
    weight[2] = 1e-3
    parts = quantize(discover(Scheme)[name](), weight, torch.bfloat16, torch.ones(1, 8))
    assert not parts["weight"][0].float().any()
    largest = 8 if name in {"w4a16", "w4a8"} else 7 if "w4" in name else 448 if "fp8" in name else 127
    if name == "mxfp8":  # 1e4 over the least power of two that clips nothing
        largest = 1e4 / 32
    assert float(parts["weight"][1].float().abs().max()) == pytest.approx(largest, rel=0.07)
    back = discover(Scheme)[name]().dequantize(parts)
    rel = 0.07 if "fp8" in name or "w4" in name else 0.005
    assert float(back[1, 3]) == pytest.approx(float(weight[1, 3]), rel=rel)
    if discover(Scheme)[name]().numerics.weight.per in {"tensor", "block"}:
        assert not back[2].any()  # as small as that beside 1e4
    else:
        assert float(back[2, 0]) == pytest.approx(1e-3, rel=rel)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_of_zeros_still_gives_its_bias(name, dtype):
    bias = torch.tensor([0.0, 1e-3, -700.0, 6e4]).to(dtype)
    scheme = discover(Scheme)[name]()
    weight = torch.zeros(4, 8, dtype=dtype)
    x = torch.linspace(-3, 5, 16).view(2, 8).to(dtype)
    parts = quantize(scheme, weight, dtype, x, bias)
    assert not parts["weight"].any()
    assert bool((parts["weight_scale"] > 0).all())
    assert bool((parts["deq_scale"] > 0).all())
    assert scheme.forward(x, parts).tolist() == [bias.tolist()] * 2


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_and_inf_show_in_the_scale(name, value, where, dtype):
    weight, bias = torch.ones(3, 4, dtype=dtype), torch.ones(3, dtype=dtype)
    {"weight": weight[1], "bias": bias[1:]}[where][0] = value
    parts = quantize(discover(Scheme)[name](), weight, dtype, torch.ones(2, 4), bias)
    assert torch.isfinite(parts["weight_scale"]).flatten().tolist() == [True, False, True]


def test_a_nan_with_all_its_bits_shows_too():
    # rounding up to the grid of 19 bits, it would wrap around to -0
    weight = torch.tensor([[0x7FFFFFFF, 0]], dtype=torch.int32).view(torch.float32)
    assert bool(torch.isnan(weight[0, 0]))
    for name in STATIC:
        parts = quantize(discover(Scheme)[name](), weight, torch.float16, torch.ones(1, 2))
        assert not bool(torch.isfinite(parts["weight_scale"]).any()), name
        assert not bool(torch.isfinite(parts["deq_scale"]).any()), name


def test_an_overflowing_deq_scale_shows_in_the_scale():
    for name in STATIC:
        weight = torch.tensor([[1.0], [3e38]], dtype=torch.bfloat16)
        parts = quantize(discover(Scheme)[name](), weight, torch.bfloat16, torch.tensor([[1e38]]))
        assert torch.isfinite(parts["weight_scale"]).flatten().tolist() == [True, False], name


@pytest.mark.parametrize("name", STATIC)
def test_stacked_weights_compute_like_single_ones(name):
    scheme, weight, x, bias, parts = make_static(name, torch.bfloat16)
    found = constants(scheme, torch.bfloat16, x)
    weights, biases = torch.stack([weight, -weight / 2]), torch.stack([bias, bias * 3])
    held = weight_dtype(scheme, torch.bfloat16)
    stacked = scheme.quantize(weights, held, found, biases)
    for method in ("forward", "forward_prefill")[: 1 + (name == "w8a8_mix")]:
        y = getattr(scheme, method)(torch.stack([x, x]), stacked, biases)
        for e in range(2):
            parts = scheme.quantize(weights[e], held, found, biases[e])
            assert torch.equal(y[e], getattr(scheme, method)(x, parts, biases[e]))
