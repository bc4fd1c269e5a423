"""Products for learning: those of float32 within the rounding of bfloat16, with their gradients."""

import pytest
import torch

from quantcli.schemes import half


@pytest.mark.parametrize("faster", [False, True])
def test_products_and_gradients_are_those_of_float32(monkeypatch, faster):
    monkeypatch.setattr(half, "is_faster", lambda kind: faster)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 64, generator=generator).requires_grad_()
    weight = torch.randn(24, 64, generator=generator).requires_grad_()
    toward = torch.randn(2, 5, 24, generator=generator)
    leaves = [x, weight]
    y = half.product(x, weight)
    ours = [y.detach(), *torch.autograd.grad((y * toward).sum(), leaves)]
    y = x @ weight.T
    theirs = [y.detach(), *torch.autograd.grad((y * toward).sum(), leaves)]
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        error = (mine - exact).square().sum() / exact.square().sum()
        assert error < 2.0**-16
        assert bool(error > 2.0**-40) == faster


def test_a_weight_without_gradients_gets_none():
    x, weight = torch.ones(3, 8, requires_grad=True), torch.ones(4, 8)
    half.product(x, weight).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 8), 4.0))
    assert weight.grad is None


def test_hidden_instructions_are_not_used(monkeypatch):
    half.is_faster.cache_clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    try:
        assert not half.is_faster("cpu")
    finally:
        half.is_faster.cache_clear()
