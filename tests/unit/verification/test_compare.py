"""Weights against their originals: figures against plain formulas, factors that were planted."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from quantcli.core.numerics import Operand
from quantcli.verification import compare as module
from quantcli.verification.compare import FLOAT_BOUNDS, LOOSEST, FittedFactors, Pair, bounds_of, compare
from quantcli.verification.edits import Candidate, Edited, candidates, check_layer, choose, fit
from quantcli.verification.outcome import ModuleReport, RowReport


class Rows:
    """A weight in memory, read by rows; `most` is the largest number of rows in one call."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.most = 0

    def weight(self, start, count):
        self.most = max(self.most, count)
        return self.tensor[start : start + count].clone()


def pair_of(reference, ours):
    """Two weights in memory."""

    return Pair(lambda: nullcontext(Rows(reference)), lambda: nullcontext(Rows(ours)), *ours.shape)


def draw(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def rounded(weight, steps=127):
    """Symmetric codes per row, times scale."""
    scale = weight.abs().amax(1, keepdim=True) / steps
    return (weight / scale).round() * scale


@pytest.mark.parametrize("elements", [64, 1000, 10**6])
def test_figures(monkeypatch, elements):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    w = draw(37, 48)
    d = rounded(w)
    found = compare(pair_of(w, d))
    x, y = w.double().numpy(), d.double().numpy()
    noise = ((y - x) ** 2).sum(1)
    sqnr = 10 * math.log10((x**2).sum() / noise.sum())
    assert 38 < sqnr < 46
    assert found.sqnr_db == pytest.approx(sqnr, abs=1e-3)
    cosine = (x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum())
    assert found.cosine == pytest.approx(cosine, abs=1e-7)
    assert found.max_rel_error == pytest.approx(np.abs(y - x).max() / np.abs(x).max(), rel=1e-4)
    rows = 10 * np.log10((x**2).sum(1) / noise)
    assert [worst.row for worst in found.worst_rows] == np.argsort(rows)[:5].tolist()
    assert found.worst_rows[0].sqnr_db == pytest.approx(rows.min(), abs=1e-3)


def test_memory_is_a_block():
    w = draw(4096, 64)
    rows = Rows(w)
    compare(Pair(lambda: nullcontext(rows), lambda: nullcontext(rows), 4096, 64))
    assert rows.most * 64 <= module.BLOCK_ELEMENTS < w.numel()


def test_histogram_is_flat_within_a_step():
    """Rounding errors are uniform: as many in each bin, none beyond sqrt(3) mean errors."""
    w = draw(64, 4096)
    histogram = compare(pair_of(w, rounded(w))).histogram
    assert (len(histogram.edges), histogram.edges[0], histogram.edges[-1]) == (33, -4, 4)
    counts = torch.tensor(histogram.counts)
    assert int(counts.sum()) >= module.BLOCK_ELEMENTS
    inside = counts[10:22]  # -1.5 to 1.5
    assert float(inside.max() / inside.min()) < 1.2
    assert int(counts[:8].sum() + counts[24:].sum()) == 0


def test_a_planted_row_and_channel_are_named():
    w = draw(40, 64)
    w[:, 7] *= 30
    d = rounded(w)
    d[11] *= -1
    found = compare(pair_of(w, d))
    assert found.worst_rows[0] == RowReport(11, pytest.approx(-6.02, abs=0.1))
    assert [outlier.channel for outlier in found.outlier_channels] == [7]
    assert 25 < found.outlier_channels[0].ratio < 36


def test_nothing_lost_and_everything_lost():
    w, zeros = draw(4, 8), torch.zeros(4, 8)
    assert compare(pair_of(w, w)).sqnr_db == 200
    assert compare(pair_of(w, torch.full_like(w, math.nan))).sqnr_db == -200
    assert compare(pair_of(zeros, zeros)).sqnr_db == 200
    assert compare(pair_of(zeros, w)).sqnr_db == -200


def report(sqnr_db=40.0, row_db=10.0, largest=0.01, limit_db=20.0):
    return ModuleReport(
        module="m", label="W8A8", shape=[4, 8], sqnr_db=sqnr_db, cosine=1.0, max_rel_error=largest,
        worst_rows=[RowReport(3, row_db)], outlier_channels=[], histogram=None, limit_db=limit_db,
        edited=None, codes_differ=None, scale_ratio=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("types", "change", "fault"),
    [
        (("int8",), {}, None),
        (("int8",), {"sqnr_db": 19.99}, "SQNR is 19.99 dB, the limit 20.00 dB"),
        (("int8",), {"limit_db": 40.5}, "SQNR is 40.00 dB, the limit 40.50 dB"),
        (("int8",), {"row_db": 2.9}, "SQNR of a row is 2.90 dB, the limit 3.00 dB"),
        (("fp8_e4m3",), {}, "SQNR of a row is 10.00 dB, the limit 12.00 dB"),
        (("int8",), {"largest": 0.2}, "a weight is off by 0.20 of the largest one, the limit is 0.10"),
        (("fp8_e4m3", "e8m0"), {"largest": 0.2}, None),
        (("int4",), {"largest": 2.0}, None),
        ((), {"row_db": -9.0, "largest": 2.0}, None),
    ],
)
def test_faults_by_the_types_of_codes_and_scales(types, change, fault):
    assert bounds(*types).fault(report(**change)) == fault


def bounds(element=None, scale=None):
    return bounds_of(Operand(element, "group", scale=scale)) if element else FLOAT_BOUNDS


def test_bounds_of_all_types_that_are_loaded():
    found = {
        types: (bounds(*types).sqnr_db, bounds(*types).row_db, bounds(*types).largest)
        for types in [("int4",), ("int8",), ("fp8_e4m3",), ("fp8_e4m3", "e8m0"), ("fp4_e2m1", "e8m0")]
    }
    assert found == {
        ("int4",): (6.0, 0.5, math.inf),
        ("int8",): (20.0, 3.0, 0.1),
        ("fp8_e4m3",): (25.0, 12.0, 0.25),
        ("fp8_e4m3", "e8m0"): (22.0, 8.0, 0.25),
        ("fp4_e2m1", "e8m0"): (6.0, 0.5, math.inf),
    }
    assert min(sqnr for sqnr, _, _ in found.values()) == LOOSEST


def powers(count, seed, low=-3, high=4):
    return (
        torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed)).float().exp2()
    )


def test_planted_factors_are_found():
    w, rows, columns = draw(96, 64), powers(96, 1), powers(64, 2)
    known = [Candidate("other", powers(64, 3)), Candidate("norm", columns)]
    pair = pair_of(w, rounded(w * rows.unsqueeze(1) * columns))
    chosen = choose([pair], known)
    assert chosen is known[1]
    factors = fit(pair, chosen)
    assert torch.equal(factors.rows, rows)
    assert compare(pair, factors).sqnr_db > 36
    # without a candidate they are estimated
    assert choose([pair], known[:1]) is None
    guessed = fit(pair, None)
    assert torch.equal(guessed.columns * guessed.rows[0], columns * rows[0])
    assert compare(pair, guessed).sqnr_db > 36


def test_columns_of_one_factor_belong_to_the_candidate():
    """Columns x 2 with rows / 8 for one sibling: rows / 4 would explain that one as well."""
    gate, up, s = draw(32, 64, 4), draw(32, 64, 5), torch.full((64,), 2.0)
    siblings = [pair_of(gate, rounded(gate * 2)), pair_of(up, rounded(up * 2 / 8))]
    assert choose(siblings, [Candidate("norm", s)]).producer == "norm"
    assert choose([pair_of(gate, rounded(gate))], [Candidate("norm", s)]).producer == ""


@pytest.mark.parametrize("offset", [0, 1])
def test_candidates_know_norms_that_add_one(offset):
    before, scale = draw(1, 64).abs()[0] + 0.5, powers(64, 6)
    after = (before + offset) / scale - offset
    found = candidates({"norm.weight": (before, after)})
    assert any(torch.allclose(c.columns, scale, rtol=1e-3) for c in found)


A = "model.layers.0.self_attn"
M = "model.layers.0.mlp"
NORM = "model.layers.0.input_layernorm.weight"


def smoothed(rows=None, columns=None, without=(), producer=NORM):
    """Edits of q, k, v and o as smoothing leaves them, `without` some."""
    s, r = powers(8, 7, 1, 4), powers(8, 8, 1, 4)
    ones = torch.ones(8)
    edits = [
        Edited(f"{A}.q_proj", FittedFactors(ones, s), producer),
        Edited(f"{A}.k_proj", FittedFactors(ones, s), producer),
        Edited(f"{A}.v_proj", FittedFactors(1 / r, s), producer),
        Edited(f"{A}.o_proj", FittedFactors(ones, r), None),
    ]
    return [edit for edit in edits if edit.module not in without]


MERGED = {f"{A}.{name}": "qkv" for name in ("q_proj", "k_proj", "v_proj")} | {f"{A}.o_proj": None}


def said(changed, edits):
    return [(f.what.split(",")[0], f.where) for f in check_layer(changed, edits, MERGED)]


def test_edits_that_cancel_out_pass():
    assert said([NORM], smoothed()) == []


@pytest.mark.parametrize(
    ("changed", "without", "what", "where"),
    [
        ([NORM], [f"{A}.{m}" for m in ("q_proj", "k_proj", "v_proj", "o_proj")], "changed", NORM),
        ([NORM], [f"{A}.o_proj"], "its rows were multiplied", f"{A}.v_proj"),
        ([NORM], [f"{A}.v_proj"], "its columns were multiplied", f"{A}.o_proj"),
    ],
)
def test_edits_that_do_not(changed, without, what, where):
    assert (what, f"`{where}`") in said(changed, smoothed(without=without))


def test_columns_without_a_producer():
    found = said([], smoothed(producer=None))
    assert ("its columns were multiplied", f"`{A}.q_proj`") in found


def test_grouped_heads_repeat_rows():
    rows, columns = powers(4, 9, 1, 4), powers(4, 9, 1, 4).view(2, 1, 2).repeat(1, 3, 1).flatten()
    ones = torch.ones(12)
    edits = [
        Edited(f"{A}.v_proj", FittedFactors(1 / rows, ones), None),
        Edited(f"{A}.o_proj", FittedFactors(ones, columns), None),
    ]
    assert said([], edits) == []


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e18, 1e37])
def test_squares_beyond_float32(size):
    """The figures of a weight do not depend on its size, also where squares overflow or vanish."""
    weight = draw(24, 32)
    expected, scaled = compare(pair_of(weight, rounded(weight))), weight * size
    found = compare(pair_of(scaled, rounded(weight) * size))
    assert found.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-3)
    assert found.cosine == pytest.approx(expected.cosine, rel=1e-6)
    assert found.finite
    ratio = found.channels / expected.channels / size / size
    assert float((ratio - 1).abs().max()) < 1e-3
    assert abs(found.histogram.counts[0] - expected.histogram.counts[0]) <= 2
