"""Scales of int4 with the least squared error, as CPUs find them that add in another order."""

import pytest
import torch

from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.integer import LARGEST, OTHER_SCALES, least_elsewhere, least_error


def searched(values, dtype):
    widest = rounding.scale_of(rounding.absmax(values), LARGEST, dtype)
    return least_error(values, widest, dtype)


@pytest.fixture(scope="module")
def rows():
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_order_of_sums_is_one_that_may_be(rows, dtype):
    usual = searched(rows, dtype)
    for seed in range(3):
        order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed))
        other = searched(rows[:, order].contiguous(), dtype)
        assert all(least_elsewhere(row, scale, dtype) for row, scale in zip(rows, other, strict=True))
    assert all(least_elsewhere(row, scale, dtype) for row, scale in zip(rows, usual, strict=True))


@pytest.mark.parametrize("by", [1.001, 0.999, 1 + 16 * OTHER_SCALES])
def test_other_scales_are_not(rows, by):
    for row, scale in zip(rows, searched(rows, torch.float32) * by, strict=True):
        assert not least_elsewhere(row, scale, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [-2, 2])
def test_other_numbers_of_the_dtype_are_not(rows, dtype, steps):
    scales = searched(rows, dtype).to(dtype)
    moved = (scales.view(torch.int16) + steps).view(dtype).float()
    assert not any(least_elsewhere(row, scale, dtype) for row, scale in zip(rows, moved, strict=True))


def test_a_row_of_zeros():
    zeros = torch.zeros(32)
    (scale,) = searched(zeros.view(1, -1), torch.float32)
    assert least_elsewhere(zeros, scale, torch.float32)
    assert not least_elsewhere(zeros, scale * 2, torch.float32)
