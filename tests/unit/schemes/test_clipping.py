"""Scales with the least squared error, weighed by columns: by hand, and the order of sums."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcli.core.number_types import ELEMENTS
from quantcli.schemes.arithmetic import clipping, rounding, tiles
from quantcli.schemes.arithmetic.clipping import (
    FP8,
    INT4,
    INT8,
    by_columns,
    facing_down,
    in_groups,
    least_error,
    total,
    widest_signed,
)
from quantcli.schemes.fp8_block import Fp8Block
from quantcli.schemes.fp8_dynamic import Fp8Dynamic
from quantcli.schemes.w4a4_dynamic import W4A4Dynamic
from quantcli.schemes.w4a16 import W4A16
from quantcli.schemes.w8a8_dynamic import W8A8Dynamic

F32 = torch.float32
ROOT = Path(__file__).parents[3]


def widest_of(values, dtype):
    return rounding.scale_of(rounding.absmax(values), 7.0, dtype)


def searched(values, dtype, importance=None):
    return least_error(values, widest_of(values, dtype), dtype, INT4, importance)


# by hand


def test_a_column_with_huge_inputs_is_what_the_scale_is_for():
    """Weights 1 and 7 at scale 1 have no error. With 0.4 in a column of huge inputs, its error counts:
    scale 0.4 and its multiples hold it, and 7 is cut off as far as it is worth it."""
    rows = torch.tensor([[7.0, 0.4, 0.0, 0.0]])
    square = torch.tensor([1.0, 1e6, 1.0, 1.0])
    none = W4A4Dynamic(clip="none").quantize(rows, F32)
    assert (none["weight"].tolist(), none["weight_scale"].tolist()) == ([[7, 0, 0, 0]], [[1.0]])
    parts = W4A4Dynamic(clip="inputs").quantize(rows, F32, {"input_square": square})
    columns = W4A4Dynamic(clip="columns").quantize(rows, F32, {"column_amax": rows.abs().amax(0)})
    assert columns["weight_scale"].tolist() == [[1.0]]
    # 0.46, the narrowest of the grids, holds 0.4 best: s = sum(h w q) / sum(h q^2) = 0.4 to 4 digits
    assert parts["weight"].tolist() == [[7, 1, 0, 0]]
    best = (7 * 7 + 1e6 * 0.4) / (7 * 7 + 1e6)
    assert float(parts["weight_scale"]) == pytest.approx(best, rel=1e-6)

    def error(found):
        left = found["weight"].double() * found["weight_scale"].double() - rows.double()
        return float((left.square() * square).sum())

    assert error(none) == pytest.approx(1e6 * 0.4**2)
    assert error(parts) == pytest.approx(square[0] * (7 - 7 * best) ** 2 + 1e6 * (0.4 - best) ** 2)
    assert error(parts) < 1e-3 * error(none)


@pytest.mark.parametrize("scheme", [W8A8Dynamic, Fp8Dynamic, Fp8Block, W4A16])
def test_inputs_lower_the_weighted_error(scheme):
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(128, 256, generator=generator)
    square = torch.randn(256, generator=generator).square() ** 4
    errors = {}
    for clip in ("none", "inputs"):
        made = scheme(clip=clip)
        found = made.quantize(rows, F32, {"input_square": square})
        left = made.dequantize(found).double() - rows.double()
        errors[clip] = float((left.square() * square.double()).sum())
    assert errors["inputs"] < 0.995 * errors["none"]


def test_fp8_clips_to_its_largest_number():
    rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    square = torch.where(rows.abs().amax(0) > 3, 1e-9, 1.0)
    parts = Fp8Dynamic(clip="inputs").quantize(rows, F32, {"input_square": square})
    clipped = rows.abs() / parts["weight_scale"] > 464  # what would round to 480, or to NaN
    assert int(clipped.sum()) >= 5
    assert bool((parts["weight"].float().abs()[clipped] == 448).all())


def test_columns_count_by_the_fourth_power_of_their_largest_weight():
    amax = torch.tensor([4.0, 2.0, 1.0, 0.0])
    assert by_columns(amax).tolist() == [1.0, 1 / 16, 1 / 256, 0.0]
    assert by_columns(torch.zeros(2)).tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(by_columns(torch.tensor([3e38, 1e-38]))).all())


def test_importance_is_relative_to_the_largest_of_a_group():
    square = torch.tensor([4.0, 1.0, 0.0, 0.0, 5.0])
    assert in_groups(square, 2).tolist() == [[1.0, 0.25], [1.0, 1.0], [1.0, 0.0]]
    assert torch.equal(in_groups(square, None), square / 5)


def test_a_group_faces_down_from_its_largest_value():
    values = torch.tensor([[-3.0, 2.0], [3.0, -2.0], [2.0, -2.0], [0.0, 0.0]])
    sign, above = facing_down(values)
    assert sign.flatten().tolist() == [1.0, -1.0, 1.0, 1.0]
    assert above.flatten().tolist() == [2.0, 2.0, 2.0, 0.0]
    widest = widest_signed(rounding.absmax(values), above, F32).flatten().tolist()
    assert widest[:2] == [3 / 8, 3 / 8]
    assert widest[2] == pytest.approx(2 / (7 + 63 / 128))
    assert widest[3] > 0


@pytest.mark.parametrize("codes", [INT4, INT8, FP8])
def test_a_row_of_zeros_keeps_the_widest_scale(codes):
    zeros, widest = torch.zeros(1, 32), torch.full((1, 1), 0.5)
    assert torch.equal(least_error(zeros, widest, F32, codes, None), widest)


# next to an exhaustive search


def exhaustive(values, importance, widest, dtype):
    """The least squared error of each row over shares of the widest scale, refined: float64."""
    least = torch.full(widest.shape, torch.inf, dtype=torch.float64)
    for step in range(34):
        scale = (widest * (0.44 + 0.02 * step)).to(dtype).double()
        for _ in range(3):
            codes = (values / scale).round().clamp(-8, 7)
            error = ((codes * scale - values).square() * importance).sum(-1, keepdim=True)
            least = torch.minimum(least, error)
            square = (importance * codes * codes).sum(-1, keepdim=True)
            best = (importance * codes * values).sum(-1, keepdim=True) / square
            scale = torch.where((square > 0) & (best > 0), best, scale).to(dtype).double()
    return least


def trained():
    for file in sorted((ROOT / "examples" / "tiny-qwen3").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.endswith("q_proj.weight"):
                yield tensor


def drawn(kind):
    generator = torch.Generator().manual_seed(8)
    normal = torch.randn(4, 128, 1024, generator=generator)
    heavy = normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t, 3 degrees of freedom
    return [(normal[0] if kind == "normal" else heavy).mul(0.02).bfloat16()]


@pytest.mark.parametrize("clip", ["columns", "mse"])
@pytest.mark.parametrize("kind", ["normal", "heavy", "trained"])
def test_the_error_is_that_of_an_exhaustive_search(kind, clip):
    found = least = 0.0
    dtype = torch.bfloat16
    for weight in trained() if kind == "trained" else drawn(kind):
        groups = tiles.cut(weight, 128)
        sign, above = facing_down(groups)
        widest = widest_signed(rounding.absmax(groups), above, dtype)
        importance = torch.ones(128)
        if clip == "columns":
            importance = in_groups(by_columns(rounding.absmax(weight, 0).squeeze(0)), 128)
        scale = least_error(groups, widest, dtype, INT4, importance, sign).double()
        values, weights = (groups.float() * sign).double(), importance.double()
        codes = (values / scale).round().clamp(-8, 7)
        found += float(((codes * scale - values).square() * weights).sum())
        least += float(exhaustive(values, weights, widest.double(), dtype).sum())
    assert found <= 1.001 * least


# the order of sums


@pytest.fixture(scope="module")
def rows():
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_go_to_sixteen_lanes_and_then_in_halves(dtype):
    """One after the other in Python: also for rows that do not fill the lanes."""
    generator = torch.Generator().manual_seed(1)
    for k in (1, 7, 16, 17, 300):
        values = torch.randn(3, k, generator=generator).square()
        found = total(values, dtype)
        one = torch.zeros((), dtype=dtype)
        for row, each in zip(values.to(dtype), found, strict=True):
            lanes = [sum(row[lane::16], one) for lane in range(16)]
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [lanes[i] + lanes[half + i] for i in range(half)]
            assert float(lanes[0]) == float(each)


def test_the_order_of_columns_may_choose_another_scale(rows):
    """So the order is part of what a scale is: this fails if sums are exact or ordered otherwise."""
    order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))
    usual, other = (searched(each.contiguous(), F32) for each in (rows, rows[:, order]))
    assert not torch.equal(usual, other)
    assert torch.allclose(usual, other, rtol=0.2)


def test_columns_that_count_more_choose_another_scale(rows):
    square = torch.where(torch.arange(512) < 8, 1e4, 1.0)
    weighed, usual = searched(rows, F32, square), searched(rows, F32)
    assert not torch.equal(weighed, usual)

    def error(scale):
        codes = (rows * (1 / scale)).round().clamp(-8, 7)
        return ((codes * scale - rows).square() * square).sum(1)

    assert bool((error(weighed) <= error(usual)).all())


@pytest.mark.parametrize("codes", [INT4, clipping.INT8])
def test_a_group_reaches_half_a_code_further(codes):
    """Of equal extremes the positive one decides the scale, and is still the largest code."""
    element = ELEMENTS[codes.element]
    reach = torch.tensor([[element.largest + 63 / 128]])
    scale = widest_signed(reach, reach, F32, element)
    assert scale.tolist() == [[1.0]]
    assert codes.codes(reach, scale).tolist() == [[element.largest]]
    assert widest_signed(reach, reach / 2, F32, element).item() == float(reach) / -element.least
