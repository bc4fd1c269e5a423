"""Int4 weights in groups: which codes and scales, and what the engine computes with them."""

import math

import pytest
import torch

from quantcli.schemes.w4a8 import W4A8
from quantcli.schemes.w4a16 import W4A16
from quantcli.schemes.w8a16 import W8A16
from tests.measured import constants

SIZES = [32, 64, 128, "channel"]
F32 = torch.float32


def weight(n=24, k=256, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) * 0.04).to(dtype)


def quantize(scheme, rows, held):
    return scheme.quantize(rows, held, constants(scheme, torch.bfloat16, rows, rows))


def squared_error(scheme, rows, held):
    back = scheme.dequantize(quantize(scheme, rows, held)).double()
    return float((back - rows.double()).square().sum())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("clip", ["columns", "inputs", "mse", "none"])
def test_codes_follow_the_scale_as_it_is_held(size, held, clip):
    rows = weight()
    parts = quantize(W4A16(group_size=size, clip=clip), rows, held)
    width = 256 if size == "channel" else size
    codes, scale = parts["weight"], parts["weight_scale"]
    assert codes.dtype == torch.int8
    assert scale.shape == (24, 256 // width)
    assert torch.equal(scale, scale.to(held).float())
    values = rows.double().view(24, -1, width)
    steps = rows.float().view(24, -1, width) / scale.unsqueeze(-1)
    assert torch.equal(codes, steps.round().clamp(-8, 7).flatten(1).to(torch.int8))
    if clip == "none":
        error = (codes.double().view(24, -1, width) * scale.double().unsqueeze(-1) - values).abs()
        assert bool((error <= scale.double().abs().unsqueeze(-1) / 2 * (1 + 1e-6)).all())


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
def test_the_largest_weight_of_a_group_is_at_the_code_that_reaches_furthest(held):
    rows = weight()
    parts = quantize(W4A16(group_size=32, clip="none"), rows, held)
    groups = rows.float().view(24, 8, 32)
    place = groups.abs().argmax(-1, keepdim=True)
    largest = groups.gather(-1, place)
    codes = parts["weight"].view(24, 8, 32).gather(-1, place)
    opposite = (-groups * largest.sign()).amax(-1, keepdim=True)
    one_sided = opposite / largest.abs() <= 7.45 / 8  # else 8 steps one way cut off the other
    assert bool((codes == -8)[one_sided].all())
    assert bool((codes.abs() >= 7).all())
    assert torch.equal(parts["weight_scale"].unsqueeze(-1)[one_sided] < 0, largest[one_sided] > 0)
    assert 20 < int((largest > 0)[one_sided].sum()) < int(one_sided.sum()) - 20


def test_groups_that_reach_as_far_on_both_sides_lose_nothing():
    """With the largest at -8 the scale of [-8, 8] would be 1 and cut 8 off: it is 8 / 7.4921875."""
    rows = torch.tensor([[-8.0, 8.0, 4.0, *[0.0] * 29], [8.0, -7.0, 3.0, *[0.0] * 29]])
    parts = quantize(W4A16(group_size=32, clip="none"), rows, torch.float32)
    assert parts["weight"][:, :3].tolist() == [[-7, 7, 4], [-8, 7, -3]]
    assert parts["weight_scale"].flatten().tolist() == [pytest.approx(8 / (7 + 63 / 128)), -1.0]


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
def test_the_search_is_near_the_best_scale_of_each_group(held):
    rows = weight(seed=1)
    groups = rows.double().view(24, 2, 128)
    best = torch.full((24, 2), math.inf).double()
    for share in torch.linspace(0.3, 1, 300):
        scale = (groups.abs().amax(-1) / 7 * share).to(held).double().unsqueeze(-1)
        error = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)
        best = torch.minimum(best, error)
    assert squared_error(W4A16(clip="mse"), rows, held) <= float(best.sum()) * 1.01
    assert squared_error(W4A16(clip="none"), rows, held) > 1.02 * float(best.sum())


@pytest.mark.parametrize(("scheme", "gain"), [(W4A16, 0.95), (W4A8, 0.95), (W8A16, 0.99)])
def test_scales_of_both_signs_are_an_option_that_loses_less(scheme, gain):
    rows = weight(seed=3)
    made = {signed: scheme(group_size=64, clip="none", signed=signed) for signed in (True, False)}
    scales = {signed: quantize(each, rows, F32)["weight_scale"] for signed, each in made.items()}
    assert bool((scales[False] > 0).all())
    assert 0.4 < float((scales[True] < 0).float().mean()) < 0.6
    errors = {signed: squared_error(each, rows, F32) for signed, each in made.items()}
    assert errors[True] < gain * errors[False]


@pytest.mark.parametrize("scheme", [W4A8, W8A16])
def test_scales_of_rows_that_ascend_may_get_are_positive(scheme):
    parts = quantize(scheme(group_size="channel"), weight(), torch.bfloat16)
    assert bool((parts["weight_scale"] > 0).all())


def test_zero_points_leave_scales_positive():
    parts = quantize(W4A16(symmetric=False), weight(), torch.bfloat16)
    assert bool((parts["weight_scale"] > 0).all())


def test_smaller_groups_lose_less():
    rows = weight(seed=2)
    errors = [squared_error(W4A16(group_size=size), rows, torch.bfloat16) for size in SIZES]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[-1]


def test_a_group_of_zeros_and_a_smaller_last_group():
    rows = weight(3, 160, dtype=torch.float16)
    rows[1, :32] = 0
    parts = quantize(W4A16(group_size=64), rows, torch.float16)
    assert parts["weight"].shape == (3, 160)
    assert parts["weight_scale"].shape == (3, 3)
    zeros = quantize(W4A16(group_size=32), rows, torch.float16)
    assert float(zeros["weight_scale"][1, 0]) > 0
    assert not zeros["weight"][1, :32].any()
    alone = quantize(W4A16(group_size=64), rows[:, 128:], torch.float16)
    assert torch.equal(parts["weight"][:, 128:], alone["weight"])
    assert torch.equal(parts["weight_scale"][:, 2:], alone["weight_scale"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", ["columns", "mse", "none"])
def test_nan_and_inf_show_in_the_scale_of_their_group(value, clip):
    rows = weight(2)
    rows[1, 200] = value
    scale = W4A16(clip=clip).quantize(rows, torch.bfloat16, {"column_amax": torch.ones(256)})[
        "weight_scale"
    ]
    assert torch.isfinite(scale).tolist() == [[True, True], [True, False]]


def test_w4a16_is_a_matmul_with_the_dequantized_weight():
    rows, bias = weight(), torch.linspace(-1, 1, 24).bfloat16()
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = quantize(W4A16(group_size=32), rows, torch.bfloat16)
    back = torch.empty(24, 256).double()
    for n in range(24):
        for k in range(256):
            product = float(parts["weight"][n, k]) * float(parts["weight_scale"][n, k // 32])
            back[n, k] = float(torch.tensor(product).bfloat16())
    exact = x.double() @ back.T + bias.double()
    y = W4A16(group_size=32).forward(x, parts, bias)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("size", [32, 128, "channel"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_w4a8_computes_as_torchs_own_kernel(size, with_bias):
    """The very operation that vLLM calls on a CPU, with codes packed as vLLM packs them."""
    scheme, rows = W4A8(group_size=size), weight(32)
    parts = quantize(scheme, rows, torch.bfloat16)
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(6))
    x[1], x[2], x[3] = 0, x[2].abs(), -x[3].abs()
    bias = torch.linspace(-1, 1, 32) if with_bias else None
    codes = parts["weight"].add(8)
    nibbles = (codes[:, 1::2] << 4 | codes[:, ::2]).to(torch.uint8)
    width = 256 if size == "channel" else size
    held = torch.float32 if size == "channel" else torch.bfloat16
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(
        nibbles, parts["weight_scale"].to(held), bias, width, 256, 32
    )
    expected = torch.ops.aten._dyn_quant_matmul_4bit(x, packed, width, 256, 32)
    y = scheme.forward(x, parts, bias)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert float((x @ rows.float().T - y).abs().max()) < 0.4 * float(y.abs().max())


def test_w4a8_for_ascend_multiplies_codes_of_tokens_exactly():
    """Token by token: inputs have 127 steps to either side, whatever their extremes."""
    scheme, rows = W4A8(group_size="channel"), weight(32)
    parts = quantize(scheme, rows, torch.bfloat16)
    assert bool((parts["weight_scale"] > 0).all())
    x = torch.randn(5, rows.shape[1], generator=torch.Generator().manual_seed(4)) + 0.5
    y = scheme.forward(x, parts | {"symmetric_inputs": torch.ones(1, dtype=torch.int64)})
    for token, found in zip(x, y, strict=True):
        step = token.abs().max().double() / 127
        codes = (token.double() / step).round()
        exact = (parts["weight"].double() @ codes) * parts["weight_scale"].squeeze(1).double() * step
        assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-6)
    asymmetric = scheme.forward(x, parts)
    assert not torch.allclose(asymmetric, y, rtol=1e-3, atol=1e-4)
