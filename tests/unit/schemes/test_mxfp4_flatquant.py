"""The arithmetic of mxfp4_flatquant: the kernel's roundings, blocks of devices, what is learned."""

import math

import numpy as np
import pytest
import torch

from quantcli.core.errors import InputError
from quantcli.core.numerics import decompose
from quantcli.schemes import flatquant
from quantcli.schemes.base import LearningTask
from quantcli.schemes.mxfp4 import MxFp4
from quantcli.schemes.mxfp4_flatquant import MxFp4FlatQuant, MxFp4Rounding, fake_quant, input_scale
from tests.unit.schemes.test_flatquant import draw, rounded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def make_stats(k, held, blocks=1, seed=0, spread=0.3):
    left, right = decompose(k, blocks)
    sides = [spread * draw(left // blocks, left // blocks, seed=seed + i) for i in range(blocks)]
    return {
        "left_trans": torch.block_diag(*(torch.eye(len(s)) + s for s in sides)).to(held),
        "right_trans": (torch.eye(right) + spread * draw(right, right, seed=seed + 99)).to(held),
        "clip_ratio": torch.ones(1),
    }


def make_parts(weight, held, blocks=1):
    scheme = MxFp4FlatQuant(blocks=blocks)
    return scheme.quantize(
        weight, F32, scheme.constants(make_stats(weight.shape[1], held, blocks), held)
    )


def nearest(value):
    """The number of e2m1, half to even places, written as a search."""
    place = min(range(8), key=lambda i: (abs(abs(value) - NUMBERS[i]), i % 2))
    return math.copysign(NUMBERS[place], value)


def transcribed(x, parts, held):
    """One token at a time, from the sources of the kernel."""
    left, right = (parts[name].double().numpy() for name in ("left_trans", "right_trans"))
    packed, scale = parts["weight"].numpy(), parts["weight_scale"].double().numpy()
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    weight = np.where(codes > 7, -1.0, 1.0) * NUMBERS[codes & 7] * scale.repeat(32, 1)
    out = []
    for token in x.double().numpy():
        first = rounded((token.reshape(len(left), len(right)) @ right).astype(np.float32), held)
        second = rounded((left.T @ first).astype(np.float32), BF16).reshape(-1, 32)
        for group in second:
            largest = np.abs(group).max()
            if largest:
                step = 2.0 ** max(math.floor(math.log2(largest)) - 2, -127)
                group[:] = [nearest(value / step) * step for value in group]
        out.append(rounded((weight @ second.reshape(-1)).astype(np.float32), x.dtype))
    return np.stack(out)


@pytest.mark.parametrize("held", [BF16, F16])
@pytest.mark.parametrize(("k", "blocks"), [(64, 1), (256, 4), (1536, 1), (1536, 4)])
def test_forward_is_the_kernel(held, k, blocks):
    """Float32 sums in another order may differ in the last bit, which rounding can make one code."""
    parts = make_parts(draw(24, k, seed=3) / k**0.5, held, blocks)
    x = draw(20, k, seed=4)
    x[:, 5] *= 20
    x[7] = 0
    x[8, 32:] = 0
    x = x.to(held)
    y = MxFp4FlatQuant(blocks=blocks).forward(x, parts).double().numpy()
    expected = transcribed(x, parts, held)
    assert (y == expected).mean() > 0.95
    assert np.abs(y - expected).max() <= 0.05 * np.abs(expected).max()
    assert not y[7].any()


def test_the_engine_takes_any_clip_ratio_alike():
    parts = make_parts(draw(8, 64), BF16)
    x = draw(5, 64, seed=1).to(BF16)
    scheme = MxFp4FlatQuant()
    other = parts | {"clip_ratio": torch.tensor([0.5])}
    assert torch.equal(scheme.forward(x, parts), scheme.forward(x, other))
    with pytest.raises(InputError, match="clip_ratio"):
        scheme.constants(make_stats(64, BF16) | {"clip_ratio": torch.tensor([4.0])}, BF16)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_devices_with_their_blocks_compute_the_whole(devices):
    """Each has a slice of inputs, codes and scales, and its own part of the diagonal."""
    k, blocks = 512, 4
    parts = make_parts(draw(12, k, seed=6) / 20, BF16, blocks)
    x = draw(9, k, seed=7).to(BF16)
    scheme = MxFp4FlatQuant(blocks=blocks)
    whole = scheme.forward(x.float(), {**parts})
    side, width = len(parts["left_trans"]) // devices, k // devices
    total = torch.zeros_like(whole)
    for rank in range(devices):
        own = slice(rank * side, (rank + 1) * side)
        mine = {
            "left_trans": parts["left_trans"][own, own],
            "right_trans": parts["right_trans"],
            "weight": parts["weight"][:, rank * width // 2 : (rank + 1) * width // 2],
            "weight_scale": parts["weight_scale"][:, rank * width // 32 : (rank + 1) * width // 32],
        }
        total += scheme.forward(x[:, rank * width : (rank + 1) * width].float(), mine)
    assert torch.allclose(total, whole, rtol=0, atol=2e-2 * float(whole.abs().max()))
    assert (total - whole).abs().median() < 1e-5 * float(whole.abs().max())


def test_transformed_products_are_the_same_before_rounding():
    scheme, stats = MxFp4FlatQuant(blocks=4), make_stats(256, BF16, 4)
    constants = scheme.constants(stats, BF16)
    weight, x = draw(5, 256, seed=1), draw(7, 256, seed=2)
    made, read = scheme.to_round(weight, constants), scheme.as_read(x, constants)
    error = (read.double() @ made.double().mT - x.double() @ weight.double().mT).abs().max()
    assert error < 2e-4


def test_weights_are_those_of_mxfp4_on_transformed_rows():
    scheme, weight = MxFp4FlatQuant(), draw(16, 128, seed=5)
    constants = scheme.constants(make_stats(128, BF16, spread=0.05), BF16)
    parts = scheme.quantize(weight, F32, constants)
    plain = MxFp4().quantize(scheme.to_round(weight, constants), F32)
    assert parts["weight"].shape == (16, 64)
    for name in ("weight", "weight_scale"):
        assert torch.equal(parts[name], plain[name])
    back = scheme.dequantize(parts)
    assert 0.005 < float((back - weight).square().sum() / weight.square().sum()) < 0.03
    some = scheme.quantize(weight[3:9], F32, constants)
    assert torch.equal(some["weight"], parts["weight"][3:9])


def test_blocks_are_in_the_numerics():
    auto = MxFp4FlatQuant()
    assert [scheme.blocks for scheme in auto.choices][:2] == [1, 4]
    assert {scheme.numerics.blocks for scheme in auto.choices} == {
        scheme.blocks for scheme in auto.choices
    }
    four = MxFp4FlatQuant(blocks=4)
    assert four.choices == ()
    assert MxFp4FlatQuant.for_numerics(four.numerics) == four
    assert MxFp4FlatQuant.for_numerics(MxFp4().numerics) is None
    assert "in 4 blocks" in str(four.numerics)
    assert four.blank(256, BF16)["left_trans"].shape == (32, 32)


def test_gradients_stop_where_codes_end():
    values = torch.tensor([[7.9, -6.5, 6.0, 0.3, *[0.0] * 28]], requires_grad=True)
    scale = input_scale(values.detach())
    assert scale.flatten().tolist() == [1.0]
    rounded_values = fake_quant(values, scale)
    assert rounded_values[0, :4].tolist() == [6.0, -6.0, 6.0, 0.5]
    rounded_values.sum().backward()
    assert values.grad[0, :4].tolist() == [0.0, 0.0, 1.0, 1.0]


def lesson(blocks, **more):
    weight, x = draw(24, 256, seed=11) / 16, draw(96, 256, seed=12)
    x[:, [3, 77, 201]] *= 30
    task = LearningTask(
        {"w": weight}, x.abs().amax(0), "not at all", BF16, torch.Generator().manual_seed(5)
    )
    learner = flatquant.KroneckerLearner(
        task, MxFp4Rounding(search=True), 1e-2, 0.3, blocks=blocks, **more
    )
    return weight, x, learner


def loss_of(learner, weight, x):
    expected = x @ weight.mT
    error = learner.linear("w", x, None).detach() - expected
    return float(error.square().sum() / expected.square().sum())


@pytest.mark.parametrize("blocks", [1, 4])
def test_the_first_transform_is_a_rotation_in_blocks(blocks):
    _, _, learner = lesson(blocks)
    stats = learner.stats("w")
    assert learner.condition == pytest.approx(1)
    assert stats["clip_ratio"].tolist() == [1.0]
    assert stats["left_trans"].shape == (decompose(256, blocks)[0],) * 2
    left = stats["left_trans"].float()
    assert torch.allclose(left @ left.mT, torch.eye(len(left)), atol=0.02)
    place = torch.arange(len(left)) // (len(left) // blocks)
    outside = place.unsqueeze(1) != place
    assert not left[outside].any()
    assert (left[~outside] != 0).float().mean() > 0.99
    if blocks > 1:  # each has its own
        side = len(left) // blocks
        assert not torch.equal(left[:side, :side], left[side : 2 * side, side : 2 * side])


@pytest.mark.parametrize("blocks", [1, 4])
def test_learning_lowers_the_loss(blocks):
    weight, x, learner = lesson(blocks)
    learner.begin()
    before = loss_of(learner, weight, x)
    optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=0.0)
    expected = x @ weight.mT
    for _ in range(40):
        optimizer.zero_grad()
        leaves = learner.begin()
        error = (learner.linear("w", x, None) - expected).square().sum()
        learner.end(list(torch.autograd.grad(error / expected.square().sum(), leaves)))
        optimizer.step()
    learner.begin()
    after = loss_of(learner, weight, x)
    assert after < 0.97 * before
    stats = learner.stats("w")
    scheme = MxFp4FlatQuant(blocks=blocks)
    parts = scheme.quantize(weight, F32, scheme.constants(stats, BF16))
    served = scheme.forward(x, parts)
    ratio = float((served - expected).square().sum() / expected.square().sum())
    assert ratio == pytest.approx(after, rel=0.15)
    place = torch.arange(len(stats["left_trans"])) // (len(stats["left_trans"]) // blocks)
    assert not stats["left_trans"][place.unsqueeze(1) != place].any()


@pytest.mark.parametrize("blocks", [0, -1, 257, True, 2.0, "4", None])
def test_numbers_of_blocks_that_no_input_has(blocks):
    with pytest.raises(ValueError, match="expected auto, or a number of 1 to 256"):
        MxFp4FlatQuant(blocks=blocks)
