"""What both models put out on text, as figures: perplexity, divergence, agreement, their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from quantcli.calibration.replay.served import decibels, token_log_probs
from quantcli.calibration.text.dataset import Batch
from quantcli.core.findings import Finding, failed
from quantcli.verification.on_text.tokens import Texts, moved_tokens
from quantcli.verification.outcome import (
    Divergence,
    LayerReport,
    Perplexity,
    PerplexityRatio,
    RunReport,
)

FINER = "see which layers are worst, and keep their modules in a finer scheme"
_RESAMPLES = 2000  # of the bootstrap


class Outputs:
    """What models put out that predict no text: logits of classes, or hidden states."""

    def __init__(self, least: float) -> None:
        """least: SQNR in dB."""
        self.numbers = 0
        self._least = least
        self._tokens = 0
        self._signal = self._noise = 0.0

    def add(self, expected: Tensor, actual: Tensor, batch: Batch) -> None:
        """Outputs of a batch, of one shape."""
        x = expected.double()
        self.numbers += x.numel()
        self._tokens += batch.input_ids.numel()
        self._signal += float(x.square().sum())
        self._noise += float((actual.double() - x).square().sum())

    @property
    def _sqnr(self) -> float:
        return decibels(self._signal, self._noise)

    def report(self, layers: list[LayerReport]) -> RunReport:
        """Figures of a run without predictions."""
        return RunReport(
            self._tokens, None, None, None, None, [], layers, outputs_db=round(self._sqnr, 3)
        )

    def findings(self) -> Iterator[Finding]:
        """An error if the outputs are far from the other model's."""
        if not self._sqnr >= self._least:
            what = f"the model puts out {self._sqnr:.3f} dB on the same text, at least "
            yield failed("outputs", f"{what}{self._least:g} dB are expected", None, FINER)


class Predictions:
    """What models predict, one batch at a time."""

    def __init__(self, ahead: int = 1) -> None:
        """ahead: see `token_log_probs`."""
        self.tokens = 0
        self._ahead = ahead
        self._windows: list[list[int]] = []  # token ids
        self._expected: list[Tensor] = []  # log-probabilities of the text: one tensor for each window
        self._actual: list[Tensor] = []
        self._kl: list[Tensor] = []  # by window
        self._agreed = 0
        self._predicted = 0

    def add(self, expected: Tensor, actual: Tensor, batch: Batch) -> None:
        """Logits [batch, length, vocabulary] of both models."""
        for row in range(len(expected)):  # the vocabulary is large
            p, q = (logits[row].float().log_softmax(-1) for logits in (expected, actual))
            self._kl.append((p.exp() * (p - q)).sum(-1))
            self._agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            self._predicted += len(p)
        self._windows += batch.input_ids.tolist()
        self._expected += token_log_probs(expected, batch, ahead=self._ahead)
        self._actual += token_log_probs(actual, batch, ahead=self._ahead)
        self.tokens += int(batch.input_ids.numel()) - len(batch.input_ids)

    @property
    def ratio(self) -> float:
        """Perplexity over the other model's."""
        return _perplexity(self._actual) / _perplexity(self._expected)

    @property
    def kl(self) -> float:
        """Mean over all predictions, in nats."""
        return float(torch.cat(self._kl).double().mean().clamp_min(0))

    @property
    def mean_abs_change(self) -> float:
        """Mean absolute change of the log-probabilities of the text."""
        return float((torch.cat(self._actual) - torch.cat(self._expected)).abs().double().mean())

    def report(self, layers: list[LayerReport], texts: Texts) -> RunReport:
        """All figures, rounded. texts: of several sequences of token ids."""
        pairs = list(zip(self._expected, self._actual, strict=True))
        changes = [(actual - expected).abs() for expected, actual in pairs]
        losses = [expected - actual for expected, actual in pairs]
        span = interval(losses)
        ratio_span = None if span is None else [round(math.exp(min(end, 700.0)), 6) for end in span]
        perplexities = _rounded(self._expected, self._actual)
        return RunReport(
            tokens=self.tokens,
            ppl=PerplexityRatio(*perplexities, round(self.ratio, 6), ratio_span),
            kl=Divergence(
                round(self.kl, 6), round(float(torch.cat(self._kl).max()), 6), interval(self._kl)
            ),
            top1_agreement=round(self._agreed / self._predicted, 6),
            mean_abs_logprob_change=round(float(torch.cat(changes).mean()), 6),
            change_interval=interval(changes),
            windows=[Perplexity(*_rounded([expected], [actual])) for expected, actual in pairs],
            layers=layers,
            moved_tokens=moved_tokens(self._windows, pairs, texts),
        )


def interval(windows: Sequence[Tensor]) -> list[float] | None:
    """The 95 % interval of a mean, by a bootstrap over windows of text; None if there is one window.

    windows: the numbers of each. The same windows give the same interval.
    """
    if len(windows) < 2:
        return None
    means = np.array([float(window.double().mean()) for window in windows])
    picks = np.random.default_rng(0).integers(len(means), size=(_RESAMPLES, len(means)))
    low, high = np.quantile(means[picks].mean(1), (0.025, 0.975)).tolist()
    return [round(low, 6), round(high, 6)]


def _rounded(expected: list[Tensor], actual: list[Tensor]) -> tuple[float, float]:
    return round(_perplexity(expected), 4), round(_perplexity(actual), 4)


def _perplexity(scores: list[Tensor]) -> float:
    mean = float(torch.cat(scores).double().mean())
    return math.exp(min(-mean, 700.0))  # JSON has no infinity
