"""Laws of rounding, over odd shapes and nasty values."""

import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype, torch_dtype
from quantcli.checkpoint.tensors import tensor_bytes
from quantcli.core.errors import InputError
from quantcli.core.numerics import Module
from quantcli.core.registry import discover
from quantcli.planning.items import dry_run
from quantcli.schemes.arithmetic import clipping, rounding
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target
from tests.measured import constants
from tests.quantized import fp8_number

SOURCES = [torch.bfloat16, torch.float16, torch.float32]
HELD = [torch.bfloat16, torch.float16, torch.float32]
INT8_SCHEMES = ["w8a8_dynamic", "w8a16"]
SIGNED = ["w4a16", "w4a8"]  # schemes whose scales may be negative
STATIC = ["w8a8_mix", "w8a8_static"]
SERVING = [torch.bfloat16, torch.float16]


def of_element(element):
    """The schemes whose weights have codes of a type."""
    schemes = discover(Scheme)
    return {name for name in schemes if schemes[name]().numerics.weight.dtype == element}


# Zeros of both signs, subnormals of each type, one outlier, ordinary weights.
values = st.one_of(
    st.just(0.0),
    st.just(-0.0),
    st.sampled_from([1e-45, -1e-40, 6e-8, -5.9e-8, 1e-6, 1e4, -1e4, 3e-5]),
    st.floats(-1, 1, width=16),
    st.floats(-0.0625, 0.0625, width=32),
)


@st.composite
def weights(draw):
    """A weight [n, k] in a source dtype."""
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 19))
    flat = draw(st.lists(values, min_size=n * k, max_size=n * k))
    return torch.tensor(flat, dtype=torch.float32).view(n, k).to(draw(st.sampled_from(SOURCES)))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(weights(), st.sampled_from(HELD), st.sampled_from(INT8_SCHEMES))
def test_int8_error_is_at_most_half_a_scale(weight, held, name):
    parts = discover(Scheme)[name]().quantize(weight, held)
    codes, scale = parts["weight"], parts["weight_scale"]
    assert torch.equal(scale, scale.to(held).float()), "scale is not what the engine will hold"
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(scale).all())
    assert int(codes.int().abs().max()) <= 127
    error = (codes.double() * scale.double() - weight.double()).abs()
    assert bool((error <= scale.double() / 2 * (1 + 2**-23)).all())


@settings(derandomize=True, max_examples=300, deadline=None)
@given(weights(), st.sampled_from(HELD), st.sampled_from(["w4a4_dynamic", "w4a16", "w4a8"]))
def test_int4_error_is_at_most_half_a_scale_and_clipping_never_loses(weight, held, name):
    errors = {}
    held = torch.float32 if name == "w4a4_dynamic" else held
    for clip in ("none", "mse"):
        scheme = discover(Scheme)[name](clip=clip)
        parts = scheme.quantize(weight, held)
        codes, scale = parts["weight"].double(), parts["weight_scale"].double()
        assert torch.equal(scale, scale.to(held).double()), "scale is not what the engine will hold"
        assert bool((scale != 0 if name in SIGNED else scale > 0).all())
        assert bool(torch.isfinite(scale).all())
        assert bool(((codes >= -8) & (codes <= 7)).all())
        error = codes * scale - weight.double()
        if clip == "none":
            assert bool((error.abs() <= scale.abs() / 2 * (1 + 2**-20)).all())
        errors[clip] = error.square().sum(1)
    assert bool((errors["mse"] <= errors["none"] * (1 + 1e-5) + 1e-80).all())


WIDEST = {"int4": (clipping.INT4, 7.0), "int8": (clipping.INT8, 127.25), "fp8": (clipping.FP8, 448.0)}


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    weights(),
    st.sampled_from(HELD),
    st.sampled_from(sorted(WIDEST)),
    st.lists(st.floats(0, 1, width=32), min_size=19, max_size=19),
    st.booleans(),
)
def test_a_search_never_ends_with_a_larger_error(weight, held, name, weighed, alike):
    codes, limit = WIDEST[name]
    values = weight.float()
    importance = None if alike else torch.tensor(weighed)[: values.shape[1]]
    widest = rounding.channel_scale(weight, limit, held)
    scale = clipping.least_error(values, widest, held, codes, importance)
    assert torch.equal(scale, scale.to(held).float())
    assert bool((scale > 0).all())
    factors = torch.ones(values.shape[1]) if importance is None else importance

    def error(tried):  # as the search adds it
        squares = codes.nearest(values * (1 / tried)).mul_(tried).sub_(values).square_()
        return clipping.total(squares * factors, codes.sums)

    assert bool((error(scale) <= error(widest)).all())


@settings(derandomize=True, max_examples=300, deadline=None)
@given(weights(), st.sampled_from(HELD))
def test_the_largest_weight_of_a_group_is_at_the_least_code_or_nothing_is_clipped(weight, held):
    parts = discover(Scheme)["w4a16"](clip="none").quantize(weight, held)
    steps = weight.double() / parts["weight_scale"].double()
    assert bool(((steps >= -8 - 2**-20) & (steps < 7.5)).all())
    if held == torch.float32:
        normal = weight.float().abs().amax(1) > 1e-30  # scales have a floor
        two_sided = steps.amax(1) > 7.49
        assert bool((parts["weight"].amin(1) == -8)[normal & ~two_sided].all())


@settings(derandomize=True, max_examples=300, deadline=None)
@given(weights(), st.sampled_from(sorted(of_element("fp8_e4m3"))))
def test_fp8_error_is_at_most_half_a_step(weight, name):
    scheme = discover(Scheme)[name]()
    found = constants(scheme, torch.float32, weight, weight)
    parts = scheme.quantize(weight, torch.float32, found)
    codes, scale = parts["weight"].double(), parts["weight_scale"].double()
    assert bool(torch.isfinite(codes).all())
    assert bool((scale > 0).all())
    exact = weight.double() / scale
    # steps of e4m3: 2^-9 below 2^-6, else 2^-3 of the power of two below
    step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2**-6))) - 3)
    assert bool(((codes - exact).abs() <= step / 2 * (1 + 1e-6)).all())


@settings(derandomize=True, max_examples=150, deadline=None)
@given(weights(), st.sampled_from(HELD), st.sampled_from(sorted(discover(Scheme))), st.data())
def test_rows_do_not_know_each_other(weight, held, name, data):
    scheme = discover(Scheme)[name]()
    weight = fitting(scheme, weight)
    found = constants(scheme, torch.bfloat16, weight[:, :3], weight)
    bias = torch.linspace(-3, 40, len(weight))
    whole = scheme.quantize(weight, held, found, bias)
    cut = data.draw(st.integers(0, weight.shape[0] // scheme.row_multiple)) * scheme.row_multiple
    for part, tensor in whole.items():
        blocks = [
            scheme.quantize(weight[rows], held, found, bias[rows])[part]
            for rows in (slice(cut), slice(cut, None))
        ]
        if part in once(scheme):
            assert all(torch.equal(block, tensor) for block in blocks)
            assert part not in found or torch.equal(tensor, found[part])
        else:
            assert torch.equal(torch.cat([b.float() for b in blocks]), tensor.float()), part


@settings(derandomize=True, max_examples=12, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 2),
    st.sampled_from(["fp8_block", "w4a16"]),
    st.integers(0, 99),
)
def test_tiles_do_not_know_each_other(n, k, cut, name, seed):
    """Sizes that are no multiples, rows cut where tiles end, and each tile like one that is alone."""
    scheme = discover(Scheme)[name](**({"clip": "mse"} if name == "w4a16" else {}))
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    whole = scheme.quantize(weight, torch.float32)
    cut = min(n, cut * scheme.row_multiple)
    for part, tensor in whole.items():
        blocks = [
            scheme.quantize(rows, torch.float32)[part].float() for rows in (weight[:cut], weight[cut:])
        ]
        assert torch.equal(torch.cat(blocks), tensor.float()), part
    tall = scheme.row_multiple
    scale = whole["weight_scale"]
    assert scale.shape == (-(-n // tall), -(-k // 128))
    back = scheme.dequantize(whole)
    for r, c in itertools.product(range(0, n, tall), range(0, k, 128)):
        tile = slice(r, r + tall), slice(c, c + 128)
        alone = scheme.quantize(weight[tile], torch.float32)
        assert torch.equal(alone["weight"].float(), whole["weight"][tile].float())
        assert float(alone["weight_scale"]) == float(scale[r // tall, c // 128])
        assert torch.equal(scheme.dequantize(alone), back[tile])


@settings(derandomize=True, max_examples=100, deadline=None)
@given(weights(), st.sampled_from(HELD), st.sampled_from(sorted(discover(Scheme))))
def test_stacked_weights_are_rounded_like_single_ones(weight, held, name):
    scheme = discover(Scheme)[name]()
    weight = fitting(scheme, weight)
    found = constants(scheme, torch.float16, weight, weight)
    bias = torch.linspace(-1, 7, len(weight))
    single = scheme.quantize(weight, held, found, bias)
    stacked = scheme.quantize(torch.stack([weight, weight]), held, found, bias.expand(2, -1))
    for part, tensor in single.items():
        other = stacked[part] if part in once(scheme) else stacked[part][1]
        assert torch.equal(other.float(), tensor.float()), part


def once(scheme):
    """Parts that a module has once and not by row."""
    shared = {"input_scale", "input_offset", "left_trans", "right_trans", "clip_ratio"}
    shared |= {"input_global_scale", "weight_global_scale"}
    return shared | ({"weight_scale"} if scheme.numerics.weight.per == "tensor" else set())


def fitting(scheme, weight):
    """The weight, with a number of columns for which there are transforms where the scheme has them."""
    return weight.repeat(1, 4) if scheme.numerics.transform else weight


def pairs():
    """Every scheme with every target that stores what it makes."""
    for name, target_name in itertools.product(sorted(discover(Scheme)), sorted(discover(Target))):
        with contextlib.suppress(InputError):
            discover(Target)[target_name]().label(discover(Scheme)[name]().numerics)
            yield name, target_name


def refused(target, scheme, weight):
    """By the name of a linear, and, as some types are for experts alone, by that of an expert."""
    names = ("q_proj", "model.layers.0.mlp.experts.0.up_proj")
    modules = [Module(name, tuple(weight.shape), scheme.numerics) for name in names]
    return all(list(target.check([module])) for module in modules)


def specs(packed):
    return tuple(TensorSpec(k, safetensors_dtype(v.dtype), tuple(v.shape)) for k, v in packed.items())


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    weights(),
    st.sampled_from(["BF16", "F16"]),
    st.sampled_from(sorted(pairs())),
    st.booleans(),
)
def test_the_plan_says_what_data_gives_and_unpack_inverts_pack(weight, serving, pair, with_bias):
    name, target_name = pair
    scheme, target = discover(Scheme)[name](), discover(Target)[target_name]()
    held = torch_dtype(target.engine_dtype(scheme.numerics, "weight_scale", serving))
    input_held = torch_dtype(target.engine_dtype(scheme.numerics, "input_scale", serving))
    if refused(target, scheme, weight):  # groups, or words of several codes, that do not divide a row
        weight = weight.repeat(8 if target_name == "gptq" else 1, 128)
        weight = weight[:, :64] if scheme.numerics.transform else weight
        assert not refused(target, scheme, weight)
    found = constants(scheme, input_held, weight, weight)
    bias = torch.linspace(-5, 2, len(weight)) if with_bias else None

    def pack(parts):
        parts = parts | {"weight_scale": parts["weight_scale"].to(held)}
        return target.pack(scheme.numerics, parts, tuple(weight.shape[-2:]))

    parts = scheme.quantize(weight, held, found, bias)
    packed = pack(parts)
    meta = pack(scheme.quantize(weight.to("meta"), held, found, bias.to("meta") if with_bias else None))
    source = TensorSpec("weight", safetensors_dtype(weight.dtype), tuple(weight.shape))
    added = TensorSpec("bias", "F32", (len(weight),)) if with_bias else None
    planned = dry_run(scheme, target, source, serving, added)
    assert tuple(output.spec for output in planned.outputs) == specs(packed) == specs(meta)
    constants_of_module = once(scheme) | {"input_zero_point", "weight_shape", "weight_scale_2", "g_idx"}
    without_rows = {output.spec.name for output in planned.outputs if not output.rows}
    assert without_rows == constants_of_module & packed.keys()
    assert (planned.engine_dtypes.weight_scale, planned.engine_dtypes.input_scale) == (
        safetensors_dtype(held),
        safetensors_dtype(input_held),
    )
    back = target.unpack(scheme.numerics, packed)
    assert {"weight", "weight_scale"} <= back.keys() <= parts.keys()
    assert target_name != "ascend" or back.keys() == parts.keys()  # others add biases themselves
    for part, tensor in back.items():
        assert tensor.dtype == parts[part].dtype, part
        assert torch.equal(tensor.float(), parts[part].float()), part
    assert torch.equal(scheme.dequantize(back), scheme.dequantize(parts))
    again = pack(back)
    assert again.keys() == packed.keys()
    assert all(tensor_bytes(again[key]) == tensor_bytes(packed[key]) for key in packed)


biases = st.one_of(
    st.just(0.0), st.sampled_from([1e-30, -700.0, 6e4, -6e4]), st.floats(-4, 4, width=16)
)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    weights(),
    st.lists(st.floats(-300, 300, width=16), max_size=6),
    st.lists(biases, min_size=5, max_size=5),
    st.sampled_from(SERVING),
    st.sampled_from(STATIC),
    st.booleans(),
)
def test_static_schemes_keep_their_promises(weight, seen, bias, serving, name, symmetric):
    scheme = discover(Scheme)[name](symmetric=symmetric)
    found = constants(scheme, serving, torch.tensor(seen, dtype=torch.float32).view(-1, 1))
    held = torch.float32 if name == "w8a8_static" else serving
    added = torch.tensor(bias[: len(weight)]).to(serving)
    parts = scheme.quantize(weight, held, found, added)
    codes, scale, deq = parts["weight"], parts["weight_scale"], parts["deq_scale"]
    assert all(bool((s > 0).all()) and bool(torch.isfinite(s).all()) for s in (scale, deq))
    assert torch.equal(scale, scale.to(held).float())
    assert int(codes.int().abs().max()) <= 127
    error = (codes.double() * scale.double() - weight.double()).abs()
    assert bool((error <= scale.double() / 2 * (1 + 2**-23)).all())
    # what the engine multiplies with, and what it scales back with, belong together
    r = float((1 / found["input_scale"].float()).to(serving))
    near = 2**-22 if serving == torch.bfloat16 else 2**-11
    assert torch.allclose(deq.double() * r, scale.squeeze(-1).double(), rtol=near, atol=0)
    if serving == torch.float16:
        assert not (deq.view(torch.int32) & 0x1FFF).any()
    offset = int(found["input_offset"])
    assert offset == 0 or not symmetric
    for row, code in enumerate(codes.tolist()):
        exact = round(float(added[row]) / float(deq[row]) - offset * sum(code))
        assert abs(exact) < 2**31
        assert int(parts["quant_bias"][row]) == exact
        # the bias comes out as it went in, to half a step of the sum
        out = (int(parts["quant_bias"][row]) + offset * sum(code)) * float(deq[row])
        assert abs(out - float(added[row])) <= float(deq[row]) / 2 * (1 + 2**-20)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.floats(1e-30, 1e30), st.sampled_from([torch.bfloat16, torch.float32]))
def test_round_up_is_the_next_number_above(value, held):
    exact = torch.tensor([value], dtype=torch.float32)
    up = rounding.round_up(exact, held)
    assert float(up) >= float(exact)
    assert torch.equal(up.to(held).float(), up)
    below = torch.nextafter(up.to(held), torch.zeros(1, dtype=held)).float()
    assert float(below) < float(exact)


EIGHT_BITS = {  # all positive numbers
    torch.float8_e8m0fnu: [2.0**e for e in range(-127, 128)],
    torch.float8_e4m3fn: [v for code in range(1, 127) if (v := fp8_number(code)) > 0],
}


@settings(derandomize=True, max_examples=600, deadline=None)
@given(st.sampled_from(sorted(EIGHT_BITS, key=str)), st.integers(0, 254), st.integers(-2, 2))
def test_round_up_to_eight_bits_is_the_next_number_above(held, place, ulps):
    """Around every number of the type, some float32 below and above it."""
    numbers = EIGHT_BITS[held]
    number = torch.tensor([numbers[place % len(numbers)]])
    exact = (number.view(torch.int32) + ulps).view(torch.float32)
    expected = next((n for n in numbers if n >= float(exact)), math.nan)
    assert str(float(rounding.round_up(exact, held))) == str(expected)


@pytest.mark.parametrize("held", [*HELD, torch.float8_e8m0fnu, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, 3.4e38])
def test_a_scale_that_no_number_holds_is_not_finite(held, value):
    for scale in (
        rounding.scale_of(torch.tensor([value, 1.0]), 1.0, held),
        rounding.round_up(torch.tensor([value, 1.0]), held),
    ):
        assert bool(torch.isfinite(scale[0])) == (held == torch.float32 and value == 3.4e38)
        assert float(scale[1]) == 1.0


@settings(derandomize=True, max_examples=200, deadline=None)
@given(weights())
def test_absmax_is_the_largest_magnitude(weight):
    assert torch.equal(rounding.absmax(weight), weight.float().abs().amax(-1, keepdim=True))


def test_absmax_shows_nan_and_infinity():
    for dtype in SOURCES:
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            rows = torch.ones(2, 3, dtype=dtype)
            rows[1, 2] = bad
            assert torch.isfinite(rounding.absmax(rows)).flatten().tolist() == [True, False]
