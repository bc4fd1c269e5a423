"""Scales with the least squared error, weighed by columns: by hand, and as other CPUs find them."""

import pytest
import torch

from quantcli.schemes.arithmetic import clipping, rounding
from quantcli.schemes.arithmetic.clipping import (
    FP8,
    INT4,
    INT8,
    OTHER_SCALES,
    by_columns,
    facing_down,
    in_groups,
    least_elsewhere,
    least_error,
    widest_int4,
)
from quantcli.schemes.fp8_block import Fp8Block
from quantcli.schemes.fp8_dynamic import Fp8Dynamic
from quantcli.schemes.w4a4_dynamic import W4A4Dynamic
from quantcli.schemes.w4a16 import W4A16
from quantcli.schemes.w8a8_dynamic import W8A8Dynamic

F32 = torch.float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    assert int(clipped.sum()) > 5
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
    down, sign = facing_down(values)
    assert sign.flatten().tolist() == [1.0, -1.0, 1.0, 1.0]
    assert down.tolist() == [[-3.0, 2.0], [-3.0, 2.0], [2.0, -2.0], [0.0, 0.0]]
    widest = widest_int4(down, rounding.absmax(down), F32).flatten().tolist()
    assert widest[:2] == [3 / 8, 3 / 8]
    assert widest[2] == pytest.approx(2 / (7 + 63 / 128))
    assert widest[3] > 0


@pytest.mark.parametrize("codes", [INT4, INT8, FP8])
def test_a_row_of_zeros_keeps_the_widest_scale(codes):
    zeros, widest = torch.zeros(1, 32), torch.full((1, 1), 0.5)
    assert torch.equal(least_error(zeros, widest, F32, codes, None), widest)


# on other CPUs


@pytest.fixture(scope="module")
def rows():
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(0))


def elsewhere(rows, scales, dtype):
    widest, ones = widest_of(rows, dtype), torch.ones(rows.shape[1])
    each = zip(rows, widest, scales, strict=True)
    return [least_elsewhere(row, wide, scale, dtype, INT4, ones) for row, wide, scale in each]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_order_of_sums_is_one_that_may_be(rows, dtype):
    for seed in range(3):
        order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed))
        assert all(elsewhere(rows, searched(rows[:, order].contiguous(), dtype), dtype))
    assert all(elsewhere(rows, searched(rows, dtype), dtype))


@pytest.mark.parametrize("by", [1.001, 0.999, 1 + 16 * OTHER_SCALES])
def test_other_scales_are_not(rows, by):
    # a row may have a choice: what refining gains is less than sums in another order lose
    assert sum(elsewhere(rows, searched(rows, F32) * by, F32)) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [-2, 2])
def test_other_numbers_of_the_dtype_are_not(rows, dtype, steps):
    scales = searched(rows, dtype).to(dtype)
    moved = (scales.view(torch.int16) + steps).view(dtype).float()
    assert not any(elsewhere(rows, moved, dtype))


def test_columns_that_count_more_choose_another_scale(rows):
    square = torch.where(torch.arange(512) < 8, 1e4, 1.0)
    weighed = searched(rows, F32, square)
    assert not torch.equal(weighed, searched(rows, F32))
    for row, widest, scale in zip(rows, widest_of(rows, F32), weighed, strict=True):
        assert least_elsewhere(row, widest, scale, F32, INT4, square)


def test_another_scale_for_a_row_of_zeros():
    zeros, ones = torch.zeros(32), torch.ones(32)
    (scale,) = searched(zeros.view(1, -1), F32)
    assert least_elsewhere(zeros, scale, scale, F32, INT4, ones)
    assert not least_elsewhere(zeros, scale, scale * 2, F32, INT4, ones)
    assert clipping.INT4_REACH == 7 + 63 / 128
