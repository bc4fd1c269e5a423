"""Laws of rounding, over odd shapes and nasty values."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.planner import dry_run
from quantcli.registry import discover
from quantcli.schemes import rounding
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target
from quantcli.tensorspec import TensorSpec, safetensors_dtype, torch_dtype

SOURCES = [torch.bfloat16, torch.float16, torch.float32]
HELD = [torch.bfloat16, torch.float16, torch.float32]
INT8_SCHEMES = ["w8a8_dynamic", "w8a16"]

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
@given(weights())
def test_fp8_error_is_at_most_half_a_step(weight):
    parts = discover(Scheme)["fp8_dynamic"]().quantize(weight, torch.float32)
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
    whole = scheme.quantize(weight, held)
    cut = data.draw(st.integers(0, weight.shape[0]))
    for part, tensor in whole.items():
        blocks = [
            scheme.quantize(rows, held)[part] for rows in (weight[:cut], weight[cut:]) if len(rows)
        ]
        assert torch.equal(torch.cat([b.float() for b in blocks]), tensor.float()), part


@settings(derandomize=True, max_examples=100, deadline=None)
@given(weights(), st.sampled_from(HELD), st.sampled_from(sorted(discover(Scheme))))
def test_stacked_weights_are_rounded_like_single_ones(weight, held, name):
    scheme = discover(Scheme)[name]()
    single, stacked = scheme.quantize(weight, held), scheme.quantize(weight[None], held)
    for part, tensor in single.items():
        assert torch.equal(stacked[part][0].float(), tensor.float())


def specs(packed):
    return tuple(TensorSpec(k, safetensors_dtype(v.dtype), tuple(v.shape)) for k, v in packed.items())


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    weights(),
    st.sampled_from(["BF16", "F16"]),
    st.sampled_from(sorted(discover(Scheme))),
    st.sampled_from(sorted(discover(Target))),
)
def test_the_plan_says_what_data_gives_and_unpack_inverts_pack(weight, serving, name, target_name):
    scheme, target = discover(Scheme)[name](), discover(Target)[target_name]()
    held = torch_dtype(target.held(scheme.numerics, serving))
    parts = scheme.quantize(weight, held)
    packed = target.pack(scheme.numerics, parts)
    meta = target.pack(scheme.numerics, scheme.quantize(weight.to("meta"), held))
    source = TensorSpec("weight", safetensors_dtype(weight.dtype), tuple(weight.shape))
    planned = dry_run(scheme, target, source, safetensors_dtype(held))
    assert planned == specs(packed) == specs(meta)
    back = target.unpack(scheme.numerics, packed)
    assert back.keys() == parts.keys()
    assert all(torch.equal(back[k].float(), parts[k].float()) for k in parts)
    assert torch.equal(scheme.dequantize(back), scheme.dequantize(parts))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.floats(1e-30, 1e30), st.sampled_from([torch.bfloat16, torch.float32]))
def test_round_up_is_the_next_number_above(value, held):
    exact = torch.tensor([value], dtype=torch.float32)
    up = rounding.round_up(exact, held)
    assert float(up) >= float(exact)
    assert torch.equal(up.to(held).float(), up)
    below = torch.nextafter(up.to(held), torch.zeros(1, dtype=held)).float()
    assert float(below) < float(exact)


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
