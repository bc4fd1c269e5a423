"""The arithmetic of w4a4_flatquant: the kernel's roundings, exact inverses, and what is learned."""

import numpy as np
import pytest
import torch

from quantcli.core.errors import InputError
from quantcli.core.numerics import decompose
from quantcli.schemes import flatquant
from quantcli.schemes.arithmetic import kronecker
from quantcli.schemes.base import LearningTask
from quantcli.schemes.w4a4_flatquant import W4A4FlatQuant

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NEAREST = W4A4FlatQuant(weight_rounding="nearest")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_stats(k, n, held, seed=0):
    left, right = decompose(k)
    return {
        "left_trans": (torch.eye(left) + 0.3 * draw(left, left, seed=seed)).to(held),
        "right_trans": (torch.eye(right) + 0.3 * draw(right, right, seed=seed + 1)).to(held),
        "clip_ratio": torch.tensor([0.9]),
        "weight_clip": torch.linspace(0.7, 1, n).unsqueeze(1),
    }


def make_parts(weight, held, seed=0):
    stats = make_stats(weight.shape[1], len(weight), held, seed)
    constants = NEAREST.constants(stats, held)
    return NEAREST.quantize(weight, F32, {**constants, "weight_clip": stats["weight_clip"]})


def rounded(values, dtype):
    """float64 -> the nearest bfloat16 or float16, as float64; written with numpy alone."""
    if dtype == F16:
        return values.astype(np.float16).astype(np.float64)
    bits = values.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return nearest.view(np.float32).astype(np.float64)


def transcribed(x, parts, held, bias=None):
    """One token at a time, from the description of the kernel."""
    left, right = (parts[name].double().numpy() for name in ("left_trans", "right_trans"))
    clip = np.float32(parts["clip_ratio"].item())
    codes = parts["weight"].double().numpy()
    scale = parts["weight_scale"].numpy()[:, 0]
    out = []
    for token in x.double().numpy():
        grid = token.reshape(len(left), len(right))
        first = rounded((grid @ right).astype(np.float32), held)
        second = rounded((left.T @ first).astype(np.float32), F16).reshape(-1)
        largest = np.float32(np.abs(second).max())
        step = largest * clip / np.float32(7)
        factor = np.float32(7) / clip / largest if largest else np.float32(7)
        scaled = (second.astype(np.float32) * factor).astype(np.float16).astype(np.float64)
        xq = np.clip(np.rint(scaled), -8, 7)
        total = (codes @ xq).astype(np.float32)
        y = rounded((total * scale * step).astype(np.float64), x.dtype)
        if bias is not None:
            y = rounded(y + bias.double().numpy(), x.dtype)
        out.append(y)
    return np.stack(out)


@pytest.mark.parametrize("held", [BF16, F16])
@pytest.mark.parametrize("k", [64, 96, 1536])
@pytest.mark.parametrize("biased", [False, True])
def test_forward_is_the_kernel(held, k, biased):
    """Float32 sums of 32 to 48 products, in whatever order, may differ in the last bit, which rounding
    can make one code: nearly all outputs are equal, and none is off by more than such a code."""
    parts = make_parts(draw(24, k, seed=3) / k**0.5, held)
    x = draw(40, k, seed=4)
    x[:, 5] *= 20
    x[7] = 0
    x = x.to(held)
    bias = draw(24, seed=5).to(held) if biased else None
    y = NEAREST.forward(x, parts, bias).double().numpy()
    expected = transcribed(x, parts, held, bias)
    assert (y == expected).mean() > 0.97
    assert np.abs(y - expected).max() <= 0.05 * np.abs(expected).max()
    if not biased:
        assert not y[7].any()


def test_inputs_are_clipped_at_minus_eight_and_seven():
    values = torch.tensor([[8.0, -8.0, 7.9, -7.0, 0.4]])
    codes, scale = flatquant.quantize_tokens(values, torch.tensor([0.8]))
    assert codes.tolist() == [[7, -8, 7, -8, 0]]  # steps of 8 * 0.8 / 7 = 0.914
    assert scale.item() == pytest.approx(8 * 0.8 / 7)


def test_what_float16_cannot_hold_is_infinite():
    left, right = torch.eye(8, dtype=BF16), torch.eye(8, dtype=BF16)
    x = torch.zeros(1, 64)
    x[0, 3] = 70000
    assert kronecker.served(x, left, right)[0, 3] == torch.inf


@pytest.mark.parametrize("held", [BF16, F16])
def test_transformed_products_are_the_same(held):
    """By the inverse of the matrices as they are held: 1e-6, not the 4e-3 of their rounding."""
    stats = make_stats(96, 5, held)
    constants = NEAREST.constants(stats, held)
    weight, x = draw(5, 96, seed=1), draw(7, 96, seed=2)
    made = NEAREST.to_round(weight, constants)
    read = NEAREST.as_read(x, constants)
    error = (read.double() @ made.double().mT - x.double() @ weight.double().mT).abs().max()
    assert error < 2e-5
    again = kronecker.redo(made, stats["left_trans"], stats["right_trans"])
    assert (again - weight).abs().max() < 1e-5


def test_dequantized_weights_are_near():
    """The transform undone, which is a rotation: what is left is the rounding to 4 bits."""
    weight = draw(32, 64, seed=6)
    stats = make_stats(64, 32, BF16)
    stats |= {n: torch.linalg.qr(stats[n].float())[0].to(BF16) for n in ("left_trans", "right_trans")}
    constants = {**NEAREST.constants(stats, BF16), "weight_clip": stats["weight_clip"]}
    back = NEAREST.dequantize(NEAREST.quantize(weight, F32, constants))
    ratio = float((back - weight).square().sum() / weight.square().sum())
    assert 0.005 < ratio < 0.03


def test_blocks_of_rows_may_be_cut_anywhere():
    weight = draw(64, 1536, seed=8).to(BF16)
    stats = make_stats(1536, 64, BF16)
    constants = NEAREST.constants(stats, BF16)
    whole = NEAREST.quantize(weight, F32, {**constants, "weight_clip": stats["weight_clip"]})
    for start, stop in [(0, 1), (1, 20), (20, 64)]:
        mine = {**constants, "weight_clip": stats["weight_clip"][start:stop]}
        some = NEAREST.quantize(weight[start:stop], F32, mine)
        assert torch.equal(some["weight"], whole["weight"][start:stop])
        assert torch.equal(some["weight_scale"], whole["weight_scale"][start:stop])


def test_codes_that_data_chose_are_taken():
    weight = draw(8, 64)
    stats = make_stats(64, 8, BF16)
    constants = {**NEAREST.constants(stats, BF16), "weight_clip": stats["weight_clip"]}
    codes = torch.full((8, 64), 3, dtype=torch.int8)
    nearest = NEAREST.quantize(weight, F32, constants)
    made = NEAREST.quantize(weight, F32, {**constants, "codes": codes})
    assert torch.equal(made["weight"], codes)
    assert torch.equal(made["weight_scale"], nearest["weight_scale"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"left_trans": torch.eye(8)}, "not torch.bfloat16"),
        ({"left_trans": torch.ones(8, 8, dtype=BF16)}, "condition number"),
        ({"right_trans": torch.full((8, 8), torch.nan, dtype=BF16)}, "condition number"),
        ({"clip_ratio": torch.tensor([4.0])}, r"not in \(0, 1\]"),  # a logit
        ({"clip_ratio": torch.tensor([0.0])}, r"not in \(0, 1\]"),
        ({"clip_ratio": torch.tensor([torch.nan])}, r"not in \(0, 1\]"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(change, word):
    with pytest.raises(InputError, match=word):
        NEAREST.constants(make_stats(64, 1, BF16) | change, BF16)


def test_blank_stats_have_the_shapes_of_real_ones():
    found = W4A4FlatQuant().blank(1536, BF16)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in found.items()}
    assert shapes == {
        "left_trans": ((32, 32), BF16),
        "right_trans": ((48, 48), BF16),
        "clip_ratio": ((1,), F32),
        "weight_clip": ((0, 1), F32),
        "codes": ((0, 1536), torch.int8),
    }
    assert "codes" not in NEAREST.blank(64, BF16)
    assert "weight_clip" not in W4A4FlatQuant(clip="mse").blank(64, BF16)


# -- learning ------------------------------------------------------------------------------------


def make_learner(scalable="freely", seed=0, **options):
    weights = {"a": draw(24, 64, seed=1) / 8, "b": draw(12, 64, seed=2) / 8}
    amax = draw(64, seed=3).abs() + 0.5
    amax[9] = 40
    scheme = W4A4FlatQuant(**options)
    generator = torch.Generator().manual_seed(seed)
    return scheme, weights, scheme.learner(LearningTask(weights, amax, scalable, BF16, generator))


def test_straight_through_rounding_has_the_gradients_it_should():
    x = torch.tensor([[0.3, 1.6, -9.0, 20.0]], requires_grad=True)
    scale = torch.tensor([[1.0]], requires_grad=True)
    flatquant.fake_quant(x, scale).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0, 0]]
    assert scale.grad.item() == pytest.approx((0 - 0.3) + (2 - 1.6) - 8 + 7)


def test_gradients_by_way_of_the_leaves_are_those_of_the_whole():
    """Summed over two batches and taken back at once, as if all had been one graph."""
    *_, learner = make_learner()
    leaves = learner.begin()
    xs = [draw(5, 64, seed=7), draw(9, 64, seed=8)]
    parts = [
        torch.autograd.grad(learner.linear("a", x, None).square().sum(), leaves, allow_unused=True)
        for x in xs
    ]
    zero = [torch.zeros_like(leaf) for leaf in leaves]
    summed = [
        sum((g if g is not None else z for g in some), z.clone())
        for z, some in zip(zero, zip(*parts, strict=True), strict=True)
    ]
    learner.end(summed)
    parameters = [p for group in learner.parameters() for p in group["params"]]
    by_leaves = [None if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    learner.begin()
    learner._leaves = learner._graph  # the same computation without the cut
    sum(learner.linear("a", x, None).square().sum() for x in xs).backward()
    for ours, parameter in zip(by_leaves, parameters, strict=True):
        theirs = parameter.grad
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_a_learner_computes_what_its_scheme_will():
    """The simulation of a step and the engine's arithmetic on what comes of it: 1 % apart."""
    scheme, weights, learner = make_learner(weight_rounding="nearest")
    learner.begin()
    x = draw(50, 64, seed=9)
    with torch.no_grad():
        simulated = learner.linear("b", x, None)
    stats = learner.stats("b")
    scale = learner.channel_scale
    constants = {**scheme.constants(stats, BF16), "weight_clip": stats["weight_clip"]}
    parts = scheme.quantize(weights["b"] / scale, F32, constants)
    served = scheme.forward(x * scale, parts)
    exact = x @ weights["b"].T
    apart = float((served - simulated).square().sum() / exact.square().sum())
    lost = float((served - exact).square().sum() / exact.square().sum())
    assert apart < 0.1 * lost
    assert 0.001 < lost < 0.1


def test_siblings_share_all_but_their_rows():
    *_, learner = make_learner()
    a, b = learner.stats("a"), learner.stats("b")
    for name in ("left_trans", "right_trans", "clip_ratio"):
        assert torch.equal(a[name], b[name])
    assert a["weight_clip"].shape == (24, 1)
    assert b["weight_clip"].shape == (12, 1)
    assert a["left_trans"].dtype == BF16
    assert 0 < float(a["clip_ratio"]) <= 1


@pytest.mark.parametrize("scalable", ["freely", "by powers of two", "not at all"])
def test_channel_scales_are_as_free_as_they_may_be(scalable):
    *_, learner = make_learner(scalable)
    scale = learner.channel_scale
    count = len([p for group in learner.parameters() for p in group["params"]])
    if scalable == "not at all":
        assert scale is None
    else:
        assert scale[9] < 0.6 * scale.median()  # the outlier is divided
        powers = torch.equal(scale, scale.log2().round().exp2())
        assert powers == (scalable == "by powers of two")
    assert count == 6 + (scalable == "freely")  # two for each side, clips of inputs and of rows


def test_transforms_begin_as_rotations_and_are_seeded():
    *_, learner = make_learner()
    assert learner.condition == pytest.approx(1)
    left = learner.stats("a")["left_trans"].float()
    assert (left @ left.mT - torch.eye(8)).abs().max() < 0.02
    *_, same = make_learner()
    *_, other = make_learner(seed=1)
    assert torch.equal(same.stats("a")["left_trans"], learner.stats("a")["left_trans"])
    assert not torch.equal(other.stats("a")["left_trans"], learner.stats("a")["left_trans"])


def test_a_runaway_transform_is_stopped():
    *_, learner = make_learner()
    with torch.no_grad():
        learner._left._stretch[0] = 2e4
    leaves = learner.begin()
    with pytest.raises(InputError, match="condition number of"):
        learner.end([torch.zeros_like(leaf) for leaf in leaves])


def test_states_are_copies():
    *_, learner = make_learner()
    before = learner.state()
    with torch.no_grad():
        learner._clip -= 3
    assert float(learner.stats("a")["clip_ratio"]) < 0.8
    learner.restore(before)
    assert float(learner.stats("a")["clip_ratio"]) == pytest.approx(0.982, abs=1e-3)
