"""Figures of a run on text: intervals, and the tokens that moved most."""

import math

import numpy as np
import pytest
import torch

from quantcli.calibration.text.dataset import Batch
from quantcli.verification.on_text import metrics
from quantcli.verification.on_text.figures import Predictions
from quantcli.verification.on_text.tokens import moved_tokens

WORDS = ["zero", " one", " two", " three"]


def texts(sequences):
    return ["".join(WORDS[token] for token in ids).removeprefix(" ") for ids in sequences]


def interval(windows, texts=None):
    values = {"kl": np.array([float(window.mean()) for window in windows])}
    return metrics.interval(metrics.KL.value, values, texts or [0] * len(windows))


def test_an_interval_holds_the_mean_and_shrinks_with_more_windows():
    torch.manual_seed(1)
    few = [torch.randn(50) + 3 for _ in range(8)]
    many = [torch.randn(50) + 3 for _ in range(200)]
    spans = []
    for windows in (few, many):
        low, high = interval(windows)
        assert low < float(torch.cat(windows).mean()) < high
        spans.append(high - low)
    assert spans[1] < spans[0] / 2
    # two standard errors to each side
    errors = torch.stack(many).mean(1).std() / math.sqrt(len(many))
    assert spans[1] == pytest.approx(float(3.92 * errors), rel=0.1)
    assert interval(few[:1]) is None
    assert interval(few) == interval(few)


def test_an_interval_over_two_texts_leaves_out_how_the_texts_differ():
    torch.manual_seed(1)
    near, far = ([torch.randn(50) + mean for _ in range(40)] for mean in (0, 30))
    own = interval(near)
    both = interval(near + far, [0] * 40 + [1] * 40)
    assert both[1] - both[0] < own[1] - own[0]
    assert interval(near + far[:1], [0] * 40 + [1]) is None


def test_tokens_that_moved_most_come_first_with_their_context():
    windows = [[0, 1, 2, 3], [3, 2, 1, 0]]
    expected = torch.tensor([-1.0, -1.0, -1.0])
    scores = [
        (expected, torch.tensor([-1.0, -1.5, -1.25])),
        (expected, torch.tensor([-1.0, 2.0, -1.0])),
    ]
    first, second, third, *rest = moved_tokens(windows, scores, texts)
    assert (first.window, first.position, first.change) == (1, 2, 3.0)
    assert (first.before, first.token, first.after) == ("three two", " one", "zero")
    assert (second.window, second.position, second.change) == (0, 2, -0.5)
    assert (second.reference, second.checkpoint) == (
        pytest.approx(math.exp(-1), abs=1e-6),
        pytest.approx(math.exp(-1.5), abs=1e-6),
    )
    assert third.token == " three"
    assert third.after == ""
    assert [token.change for token in rest] == [0.0, 0.0, 0.0]


def test_the_tokens_are_those_of_the_text():
    """Predictions of token 2 at one place are moved; that place is found, by its window."""
    ids = torch.tensor([[0, 1, 2, 3], [1, 1, 2, 1]])
    expected = torch.zeros(2, 4, 4)
    actual = expected.clone()
    actual[1, 1, 2] -= 4.0  # the logits at place 1 are of the token at place 2
    predictions = Predictions()
    predictions.add(expected, actual, Batch(ids, None))
    run = predictions.windows.report([("a", "0")], [], [], None, lambda: predictions.moved(texts))
    token = run.moved_tokens[0]
    assert (token.window, token.position, token.token) == (1, 2, " two")
    assert token.change == pytest.approx(-4 + math.log(4 / (3 + math.exp(-4))), abs=1e-4)
    assert run.ppl.interval[0] <= run.ppl.ratio <= run.ppl.interval[1]
    assert run.change_interval == [0.0, pytest.approx(abs(token.change) / 3, abs=1e-4)]
