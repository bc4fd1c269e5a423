"""Two runs on the same windows: differences of pairs, and what a verdict says."""

import copy

import numpy as np
import pytest

from quantcli.verification.on_text.paired import check_not_worse, compare_runs


def run(kl, *, texts=("a",), sha256="0", energy=4.0):
    """A run whose windows have these divergences; texts take turns."""
    windows = [
        {"text": n * len(texts) // len(kl), "reference": 10.0, "checkpoint": 10.0 * (1 + value),
         "kl": value, "top1_agreement": 0.9, "mean_abs_logprob_change": 2 * value, "energy": energy,
         "error": value, "peir": value}
        for n, value in enumerate(kl)
    ]  # fmt: skip
    named = [{"text": text, "sha256": f"{sha256}{n}"} for n, text in enumerate(texts)]
    return {"tokens": 31 * len(kl), "windows": windows, "texts": named}


def figures(comparison):
    return {figure["key"]: figure for figure in comparison["figures"]}


def test_pairs_show_what_windows_hide():
    """Windows differ far more among each other than the checkpoints on each of them."""
    rng = np.random.default_rng(3)
    base = rng.uniform(0.01, 1.0, 40)
    better = compare_runs(run(base), run(base - rng.uniform(0.001, 0.003, 40)))
    kl = figures(better)["kl"]
    assert kl["better"] is True
    assert -0.003 < kl["interval"][0] < kl["change"] < kl["interval"][1] < -0.001
    assert kl["change"] == pytest.approx(kl["now"] - kl["before"], abs=2e-6)
    assert figures(better)["top1_agreement"]["better"] is None
    assert better["verdict"].startswith("better in perplexity ratio, mean KL divergence")
    assert better["verdict"].endswith("; no difference is seen in same first choice")
    ppl = figures(better)["ppl"]
    assert ppl["change"] == pytest.approx(ppl["now"] / ppl["before"] - 1, abs=1e-6)


def test_noise_is_not_a_difference():
    rng = np.random.default_rng(4)
    base = rng.uniform(0.1, 1.0, 40)
    noise = rng.normal(0, 0.01, 40)
    same = compare_runs(run(base), run(base + noise - noise.mean()))
    assert figures(same)["kl"]["better"] is None
    assert not check_not_worse(same, "x")
    assert compare_runs(run([0.1]), run([0.2]))["verdict"].startswith("no interval")


def test_few_windows_decide_nothing():
    """Five changes have one sign by chance too often."""
    base = np.array([0.1, 0.3, 0.2, 0.5, 0.4, 0.6])
    few, enough = (compare_runs(run(base[:n]), run(base[:n] + 0.01)) for n in (5, 6))
    assert figures(few)["kl"]["interval"][0] > 0
    assert {figure["better"] for figure in few["figures"]} == {None}
    assert few["verdict"] == "5 windows decide nothing: 6 or more are needed"
    assert figures(enough)["kl"]["better"] is False
    assert "worse in" in enough["verdict"]


def test_other_windows_are_not_compared():
    one = run([0.1, 0.2, 0.3])
    for other in (
        run([0.1, 0.2]),
        run([0.1, 0.2, 0.3], sha256="1"),
        run([0.1, 0.2, 0.3], energy=5.0),
        run([0.1, 0.2, 0.3], texts=("a", "b")),
        {},
    ):
        assert compare_runs(one, other) is None
    (finding,) = check_not_worse(None, "x")
    assert "differ in their texts or their reference" in finding.what


def test_worse_on_one_text_is_an_error_of_that_text():
    before = run([0.1, 0.2, 0.3] * 4, texts=("a", "b"))
    now = copy.deepcopy(before)
    for window in now["windows"][6:]:
        window["kl"] += 0.001
    for window in now["windows"][:6]:
        window["kl"] -= 0.002
    comparison = compare_runs(before, now)
    assert [figures(text)["kl"]["better"] for text in comparison["texts"]] == [True, False]
    (finding,) = check_not_worse(comparison, "x")
    assert finding.what.endswith("on `b`")
    assert finding.where == "x"
