"""Exact sums of integer products, in float32 pieces."""

import pytest
import torch

from quantcli.schemes.arithmetic import rounding


@pytest.mark.parametrize(("largest", "bound"), [(2**14, 128), (2**15, 256)])
@pytest.mark.parametrize("past", [-1, 0, 1, 700])
def test_products_are_those_of_float64(largest, bound, past):
    """Around the number of columns that float32 can add; a row at the bound, which fails first."""
    k = 2**24 // largest + past
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(-bound, bound, (3, k), generator=generator).float()
    weight = torch.randint(-largest // bound, largest // bound, (5, k), generator=generator)
    codes[0], weight[0] = -bound, -largest // bound
    weight = weight.to(torch.int8)
    total = rounding.exact_product(codes, weight, largest)
    assert total.dtype == torch.float64
    assert torch.equal(total, codes.double() @ weight.double().T)
    assert float(total[0, 0]) == k * largest


def test_products_of_stacked_weights():
    codes = torch.randint(-128, 128, (2, 3, 2500)).float()
    weight = torch.randint(-128, 128, (2, 4, 2500)).to(torch.int8)
    total = rounding.exact_product(codes, weight, 2**14)
    assert torch.equal(total, codes.double() @ weight.double().mT)
