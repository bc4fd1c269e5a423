"""Codes chosen by data are never worse than nearest ones, row by row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.core.number_types import ELEMENTS
from quantcli.schemes.arithmetic.gptq import Feedback, gptq


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 150),
    tokens=st.integers(1, 60),
    rank=st.integers(1, 20),
    bits=st.sampled_from([4, 8]),
    share=st.floats(0.3, 1.0),
    seed=st.integers(0, 2**31),
)
def test_never_worse_than_nearest(n, k, tokens, rank, bits, share, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, k, generator=generator)
    x = torch.randn(tokens, rank, generator=generator) @ mix
    x += 0.1 * torch.randn(tokens, k, generator=generator)
    w = torch.randn(n, k, generator=generator)
    largest = 2.0 ** (bits - 1) - 1
    step = w.abs().amax(1, keepdim=True) * share / largest  # clips some where share < 1
    nearest = (w / step).round().clamp(-largest - 1, largest).to(torch.int8)
    h = x.T @ x
    found = gptq(w, h, step, nearest, ELEMENTS[f"int{bits}"], Feedback.of(h))
    lost = (w - found.codes * step).double() @ x.double().T
    plain = (w - nearest * step).double() @ x.double().T
    allowed = 1e-5 * plain.square().sum(1) + 1e-6 * found.signal
    assert bool((lost.square().sum(1) <= plain.square().sum(1) + allowed).all())
    assert bool((found.codes >= -largest - 1).all() & (found.codes <= largest).all())
