"""Four-bit floats against exact arithmetic, block by block, and every scale that the format has."""

import math
from fractions import Fraction

import pytest
import torch

from quantcli.core.errors import InputError
from quantcli.core.registry import discover
from quantcli.schemes.arithmetic import fp4
from quantcli.schemes.base import Scheme
from tests.measured import maxima
from tests.quantized import FP8

SCHEMES = discover(Scheme)
NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [float(v) for v in FP8[1:127]]  # positive scales
WEIGHT_ONLY = {"nvfp4a16": 16, "mxfp4a16": 32}


def number(code):
    return -NUMBERS[code & 7] if code & 8 else NUMBERS[code]


def nearest_code(value):
    """Of two equally near numbers the one with an even place. `value`: a fraction or a float."""
    place = min(range(8), key=lambda code: (abs(abs(value) - Fraction(NUMBERS[code])), code & 1))
    return place | (8 if value < 0 else 0)


def codes_of(packed):
    """[n, k / 2] bytes -> [n][k] codes, the low four bits first."""
    return [[c for byte in row for c in (byte & 15, byte >> 4)] for row in packed.tolist()]


def quantized(name, rows, **options):
    scheme = SCHEMES[name](**options)
    parts = scheme.quantize(rows, torch.float32, maxima(scheme, rows))
    return scheme, parts


def weight(n=6, k=64, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(max(n, 4), k, generator=generator) * 0.02
    rows[1] *= torch.randn(k, generator=generator).exp()  # heavy tails
    rows[2, :32] = 0
    rows[3] = 0.03
    return rows[:n].to(dtype)


@pytest.mark.parametrize("name", sorted(WEIGHT_ONLY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["search", "amax"])
def test_every_code_is_the_nearest_for_its_scale(name, dtype, scales):
    rows = weight(dtype=dtype)
    _, parts = quantized(name, rows, scales=scales)
    whole = parts.get("weight_global_scale", torch.ones(1))
    held = (parts["weight_scale"] * whole).repeat_interleave(WEIGHT_ONLY[name], -1)
    quotients = (rows.float() / held).tolist()
    for row, codes in zip(quotients, codes_of(parts["weight"]), strict=True):
        for value, code in zip(row, codes, strict=True):
            assert abs(number(code)) == abs(number(nearest_code(value)))
            assert value == 0 or number(code) == 0 or (number(code) < 0) == (value < 0)


@pytest.mark.parametrize("name", sorted(WEIGHT_ONLY))
def test_halfway_numbers_go_to_the_even_code(name):
    """0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5 and their neighbours, with the largest weight at 6."""
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    up = torch.nextafter(halves, torch.full_like(halves, 9.0))
    down = torch.nextafter(halves, torch.zeros(7))
    rows = torch.stack([halves, up, down, -halves, -up, -down])
    rows = torch.cat([rows, torch.full((6, 32 - 7), 6.0)], 1)
    _, parts = quantized(name, rows * 2.0**-9 * 448, scales="amax")
    found = [[number(code) for code in row[:7]] for row in codes_of(parts["weight"])]
    if name == "mxfp4a16":  # 448 is not a power of two
        _, parts = quantized(name, rows * 2.0**-9, scales="amax")
        found = [[number(code) for code in row[:7]] for row in codes_of(parts["weight"])]
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    above, below = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    assert found[:3] == [even, above, below]
    assert [[-v for v in row] for row in found[3:]] == [even, above, below]


def least(block, candidates):
    """The least squared error of a block over all scales, in float64."""
    values = block.double().abs().unsqueeze(0)
    held = torch.tensor(candidates, dtype=torch.float64).unsqueeze(1)
    grid = torch.tensor(NUMBERS, dtype=torch.float64)
    errors = ((values / held).unsqueeze(-1) - grid).abs().amin(-1) * held
    return float(errors.square().sum(-1).min())


@pytest.mark.parametrize("name", sorted(WEIGHT_ONLY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_other_scale_has_less_error(name, dtype):
    """Of all 126 e4m3 scales, and of all powers of two around."""
    rows, columns = weight(24, 128, seed=3, dtype=dtype), WEIGHT_ONLY[name]
    scheme, parts = quantized(name, rows)
    back = scheme.dequantize(parts).double()
    whole = float(parts.get("weight_global_scale", torch.ones(1)))
    powers = [2.0**e for e in range(-40, 8)]
    candidates = [scale * whole for scale in E4M3] if name == "nvfp4a16" else powers
    gained = 0
    _, usual = quantized(name, rows, scales="amax")
    plain = scheme.dequantize(usual).double()
    for row in range(len(rows)):
        for start in range(0, 128, columns):
            block = row, slice(start, start + columns)
            error = float((back[block] - rows[block].double()).square().sum())
            best = least(rows[block], candidates)
            # between 3 and 3.5, and above 7 times a scale, nothing is tried: worth less than a percent
            assert error <= best * (1.06 if name == "nvfp4a16" else 1 + 1e-5)
            gained += error < float((plain[block] - rows[block].double()).square().sum()) * 0.999
    assert gained > 20


BARS = {  # of normal weights, of Student-t(4)
    ("nvfp4a16", "search"): (0.0815, 0.0830),
    ("nvfp4a16", "amax"): (0.0953, 0.0921),
    ("mxfp4a16", "search"): (0.1117, 0.1282),
    ("mxfp4a16", "amax"): (0.1186, 0.1396),
}


@pytest.mark.parametrize(("name", "scales"), BARS)
def test_error_of_a_whole_weight(name, scales):
    draw = torch.randn(6, 512, 2048, generator=torch.Generator().manual_seed(0))
    for rows, bar in zip(
        (draw[0], draw[1] / draw[2:].square().mean(0).sqrt()), BARS[name, scales], strict=True
    ):
        scheme, parts = quantized(name, rows, scales=scales)
        error = float((scheme.dequantize(parts) - rows).norm() / rows.norm())
        assert bar * 0.96 < error < bar


@pytest.mark.parametrize("name", sorted(WEIGHT_ONLY))
@pytest.mark.parametrize("k", [1, 2, 15, 16, 18, 33, 50, 64])
def test_a_last_group_that_is_not_full(name, k):
    rows = weight(3, 64)[:, :k]
    columns = WEIGHT_ONLY[name]
    _, parts = quantized(name, rows)
    assert parts["weight"].shape == (3, -(-k // 2))
    assert parts["weight_scale"].shape == (3, -(-k // columns))
    filled = torch.cat([rows, torch.zeros(3, -k % columns)], 1)
    _, whole = quantized(name, filled)
    assert torch.equal(parts["weight_scale"], whole["weight_scale"])
    assert torch.equal(parts["weight"], whole["weight"][:, : -(-k // 2)])


@pytest.mark.parametrize("name", sorted(WEIGHT_ONLY))
@pytest.mark.parametrize("scales", ["search", "amax"])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_group_with_nan_or_inf_has_nan_as_scale(name, scales, value):
    rows = weight(3, 64)
    scheme = SCHEMES[name](scales=scales)
    found = maxima(scheme, rows)
    rows[1, 33] = value
    scale = scheme.quantize(rows, torch.float32, found)["weight_scale"]
    expected = torch.ones_like(scale, dtype=torch.bool)
    expected[1, 33 // WEIGHT_ONLY[name]] = False
    assert torch.equal(torch.isfinite(scale), expected)


@pytest.mark.parametrize("scales", ["search", "amax"])
def test_zeros_and_numbers_at_either_end(scales):
    zeros = torch.zeros(2, 64)
    zeros[1] = -0.0
    for name, smallest in (("nvfp4a16", 2.0**-9), ("mxfp4a16", 2.0**-127)):
        scheme, parts = quantized(name, zeros, scales=scales)
        assert bool((parts["weight_scale"] == smallest).all())
        assert not scheme.dequantize(parts).any()
        for factor, dtype in (
            (1.0, torch.bfloat16),
            (2.0**-126, torch.float32),
            (1e-30, torch.float32),
        ):
            rows = torch.linspace(-1, 1, 128).view(2, 64)
            rows = (rows * (torch.finfo(torch.bfloat16).max if factor == 1 else factor)).to(dtype)
            scheme, parts = quantized(name, rows, scales=scales)
            back = scheme.dequantize(parts)
            assert bool(torch.isfinite(back).all())
            assert bool((parts["weight_scale"] > 0).all())
            error = float((back.double() - rows.double()).norm() / rows.double().norm())
            assert error < (0.2 if factor == 1 else 0.13) or (
                name == "nvfp4a16" and factor < 1
            )  # below the least global scale
    _, parts = quantized("nvfp4a16", zeros)
    assert float(parts["weight_global_scale"]) == 2.0**-64


def test_small_blocks_have_subnormal_scales():
    """Next to a weight of 1, blocks of a size that e4m3 holds with ever fewer bits, then not at all."""
    rows = torch.zeros(24, 16)
    rows[0] = 1.0
    for row in range(1, 24):
        rows[row] = 1.5 * 2.0**-row
    scheme, parts = quantized("nvfp4a16", rows)
    scale = parts["weight_scale"].flatten()
    assert float(scale[0]) == 448
    assert float(scale[-1]) < 8 * 2.0**-9
    assert torch.equal(scale.to(torch.float8_e4m3fn).float(), scale)
    back = scheme.dequantize(parts)
    for row in range(1, 24):
        if 1.5 * 2.0**-row > 2.0**-11 * float(parts["weight_global_scale"]):
            assert float(back[row, 3]) == pytest.approx(float(rows[row, 3]), rel=0.34)
        else:
            assert float(back[row, 3]) == 0


def test_a_global_scale_and_its_reciprocal_are_the_same_number():
    """So that a checkpoint with one can become one with the other, and back."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(2000):
        amax = torch.rand(1, generator=generator) * 2.0 ** int(
            torch.randint(-40, 60, (1,), generator=generator)
        )
        scale = fp4.global_scale(amax)
        assert torch.equal(1 / (1 / scale), scale)
        bits = (amax / 2688).view(torch.int32) - scale.view(torch.int32)
        assert abs(int(bits)) <= 1
    assert float(fp4.global_scale(torch.zeros(1))) == 2.0**-64
    assert not torch.isfinite(fp4.global_scale(torch.tensor([math.nan]))).any()


def test_siblings_share_the_global_scale():
    """`weight_amax` is that of all of them, and the block scales are made for it."""
    rows = weight()
    scheme = SCHEMES["nvfp4a16"]()
    alone = scheme.quantize(rows, torch.float32, maxima(scheme, rows))
    shared = scheme.quantize(rows, torch.float32, {"weight_amax": rows.abs().max().view(1) * 9})
    assert float(shared["weight_global_scale"]) == pytest.approx(
        9 * float(alone["weight_global_scale"])
    )
    error = [float((scheme.dequantize(parts) - rows).norm()) for parts in (alone, shared)]
    assert error[1] == pytest.approx(error[0], rel=0.03)
    assert float(shared["weight_scale"].max()) < 100


# --- inputs ---


def reference_nvfp4(x, divisor):
    """One token at a time, in float32, as vLLM's emulation does it."""
    f32 = torch.float32
    out = torch.zeros(x.shape, dtype=f32)
    for t, c in ((t, c) for t in range(len(x)) for c in range(0, x.shape[1], 16)):
        block = x[t, c : c + 16].float()
        scale = divisor * (block.abs().max() * torch.tensor(1 / 6, dtype=f32))
        scale = scale.clamp(max=448).to(torch.float8_e4m3fn).float()
        if float(scale) == 0:
            continue
        factor = 1 / (scale * (1 / divisor))
        codes = [number(nearest_code(float(v))) for v in (block * factor).clamp(-6, 6)]
        out[t, c : c + 16] = torch.tensor(codes) * (scale / divisor)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_nvfp4_is_the_product_of_the_engine(dtype, with_bias):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 64, generator=generator).to(dtype)
    x[1] = 0
    x[2, 16:32] *= 1e-6  # its scale vanishes
    x[3, :16] *= 50  # beyond what was measured: clipped
    rows, bias = weight(7, 64).to(dtype), torch.randn(7, generator=generator).to(dtype)
    scheme = SCHEMES["nvfp4"]()
    observer = scheme.observer(torch.bfloat16)
    observer.update(torch.cat([x[:3], x[4:]]), 0)
    found = scheme.constants(observer.stats(), torch.bfloat16)
    seen = float(torch.cat([x[:3], x[4:]]).abs().max())
    assert float(found["input_global_scale"]) == pytest.approx(seen / 2688, rel=1e-6)
    parts = scheme.quantize(rows, torch.float32, maxima(scheme, rows) | found)
    rounded = reference_nvfp4(x, 1 / found["input_global_scale"])
    assert not rounded[2, 16:32].any()
    assert float(rounded[3, :16].abs().max()) < float(x[3, :16].abs().max()) / 4
    product = rounded.to(dtype).double() @ scheme.dequantize(parts).to(dtype).double().T
    expected = product + bias.double() if with_bias else product
    y = scheme.forward(x, parts, bias if with_bias else None)
    assert y.dtype == dtype
    step = 2**-8 if dtype == torch.bfloat16 else 2**-20
    assert torch.allclose(y.double(), expected, rtol=step, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 2.0**-65])
def test_measured_scales_that_make_no_sense_are_refused(bad):
    with pytest.raises(InputError, match="input_global_scale"):
        SCHEMES["nvfp4"]().constants({"input_global_scale": torch.tensor([bad])}, torch.bfloat16)


def test_a_scale_whose_reciprocal_is_of_another_number_is_refused():
    scales = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    scale = scales[1 / (1 / scales) != scales][:1]
    assert len(scale) == 1
    with pytest.raises(InputError, match="reciprocal"):
        SCHEMES["nvfp4"]().constants({"input_global_scale": scale}, torch.bfloat16)


def test_a_percentile_leaves_out_the_largest_inputs():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    x[0, 0] = 400
    scales = []
    for options in ({}, {"observer": "percentile", "percentile": 99.9}):
        observer = SCHEMES["nvfp4"].model_validate(options).observer(torch.bfloat16)
        observer.update(x, 0)
        scales.append(float(observer.stats()["input_global_scale"]))
    assert scales[0] == pytest.approx(400 / 2688, rel=1e-6)
    assert 2 / 2688 < scales[1] < 5 / 2688


def reference_mxfp4(x, *, down):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, c in ((t, c) for t in range(len(x)) for c in range(0, x.shape[1], 32)):
        block = [Fraction(float(v)) for v in x[t, c : c + 32]]
        amax = max(map(abs, block))
        if not amax:
            continue
        mantissa, exponent = math.frexp(float(amax))  # 0.5 <= mantissa < 1
        e = exponent - 1 + (0 if down else int(mantissa >= 0.875)) - 2
        scale = Fraction(2) ** max(e, -127)
        for j, value in enumerate(block):
            code = nearest_code(value / scale)
            if down:  # halves away from zero
                place = min(
                    range(8), key=lambda i: (abs(abs(value / scale) - Fraction(NUMBERS[i])), -i)
                )
                code = place | (8 if value < 0 else 0)
            out[t, c + j] = float(Fraction(number(code)) * scale)
    return out


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [64, 80])
def test_mxfp4_is_the_product_of_the_engine(k, dtype, down):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, k, generator=generator).to(dtype)
    x[1] = 0
    x[2, :32] = (torch.arange(32) - 16) / 4  # halfway numbers
    x[3, 0], x[4, 0], x[5, 0] = 3.5, 3.484375, 7.96875  # where the exponent changes
    x[6] = 1e-38
    rows = weight(6, 80)[:, :k].to(dtype)
    scheme = SCHEMES["mxfp4"]()
    parts = scheme.quantize(rows, torch.float32)
    if down:
        parts["input_scale_alg"] = torch.zeros(1, dtype=torch.int64)
    product = reference_mxfp4(x, down=down) @ scheme.dequantize(parts).double().T
    y = scheme.forward(x, parts)
    step = 2**-8 if dtype == torch.bfloat16 else 2**-19
    assert torch.allclose(y.double(), product, rtol=step, atol=1e-6)


def test_fp8_inputs_of_three_kinds():
    """Fine scales fit inputs with an outlier better, and each kind is what another scheme computes."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, 256, generator=generator).bfloat16()
    x[:, 7] *= 3000
    rows = weight(8, 256)
    cls = SCHEMES["mxfp4_fp8"]
    assert [scheme.inputs for scheme in cls().choices] == ["mx", "groups", "token"]
    assert cls().numerics == cls(inputs="mx").numerics
    assert cls(inputs="mx").choices == ()
    for inputs in ("mx", "groups", "token"):
        scheme = cls(inputs=inputs)
        assert cls.for_numerics(scheme.numerics) == scheme
        parts = scheme.quantize(rows, torch.float32)
        back = scheme.dequantize(parts)
        y = scheme.forward(x, parts).double()
        if inputs == "mx":
            scales = torch.stack([x[:, c : c + 32].float().abs().amax(1) for c in range(0, 256, 32)], 1)
            scales = torch.exp2(torch.ceil(torch.log2(scales / 448))).repeat_interleave(32, 1)
        elif inputs == "groups":
            scales = torch.stack([x[:, c : c + 128].float().abs().amax(1) for c in (0, 128)], 1)
            scales = (scales / 448).repeat_interleave(128, 1)
        else:
            scales = x.float().abs().amax(1, keepdim=True) / 448
        rounded = (x.float() / scales).to(torch.float8_e4m3fn).double() * scales.double()
        expected = rounded @ back.double().T
        assert float((y - expected).norm() / expected.norm()) < 3e-3
    assert cls.for_numerics(SCHEMES["mxfp8"]().numerics) is None
