"""`forward` against an independent transcription of the engine's formulas, element by element."""

import math

import pytest
import torch

from quantcli.registry import discover
from quantcli.schemes.base import Scheme


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
    held = torch.float32 if name.startswith("fp8") else dtype
    return scheme, scheme.quantize(weight, held), x, bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_w8a8_dynamic(dtype, with_bias):
    scheme, parts, x, bias = make("w8a8_dynamic", dtype)
    y = scheme.forward(x, parts, bias if with_bias else None)
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
            if with_bias:
                value = f32(value + float(bias[n]))
            assert float(y[m, n]) == rounded(value, dtype), (m, n)


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


@pytest.mark.parametrize("name", sorted(discover(Scheme)))
def test_outputs_are_close_to_the_float_linear(name):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(64, 256, generator=generator) * 0.03).bfloat16()
    x = torch.randn(32, 256, generator=generator).bfloat16()
    scheme = discover(Scheme)[name]()
    y = scheme.forward(x, scheme.quantize(weight, torch.bfloat16)).double()
    exact = x.double() @ weight.double().T
    sqnr = 10 * math.log10(float((exact**2).sum() / ((y - exact) ** 2).sum()))
    assert sqnr > {"w8a8_dynamic": 38, "w8a16": 42, "fp8_dynamic": 28}[name]


@pytest.mark.parametrize("name", sorted(discover(Scheme)))
def test_zero_rows_and_outliers(name):
    weight = torch.zeros(3, 8, dtype=torch.bfloat16)
    weight[1, 3] = 1e4
    weight[2] = 1e-3
    parts = discover(Scheme)[name]().quantize(weight, torch.bfloat16)
    assert not parts["weight"][0].float().any()
    assert float(parts["weight"][1].float().abs().max()) == pytest.approx(
        127 if parts["weight"].dtype == torch.int8 else 448, rel=0.07
    )
    back = discover(Scheme)[name]().dequantize(parts)
    assert float(back[1, 3]) == pytest.approx(1e4, rel=0.005 if "fp8" not in name else 0.07)
    assert float(back[2, 0]) == pytest.approx(1e-3, rel=0.005 if "fp8" not in name else 0.07)
