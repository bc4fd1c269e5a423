"""A running server next to both models: figures of its log-probabilities on the same windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantcli.calibration.replay.served import token_log_probs
from quantcli.calibration.text.dataset import Batch
from quantcli.core.errors import InputError
from quantcli.verification.on_text.endpoint import Answer, Endpoint
from quantcli.verification.on_text.figures import Windows, own
from quantcli.verification.on_text.reports import ServedReport, WindowReport

_LEAST_REST = 1e-9  # of a probability that a server leaves to all other tokens


class Engine:
    """The answers of a server, and figures as batches come."""

    def __init__(
        self, endpoint: Endpoint, answers: Sequence[Answer], vocabulary: int | None = None
    ) -> None:
        """answers: to all windows, in their order. vocabulary: tokens of the model, if config.json says
        how many. InputError for a candidate that is not one of them."""
        self._endpoint = endpoint
        self._answers = iter(answers)
        named = [each.candidates for each in answers]
        self._by_id = all(candidates is not None for candidates in named)
        self._least = min((len(some) for each in named for some in each or ()), default=0)
        self._covered: list[float] = []
        self._windows, self._replayed = Windows(), Windows()
        if vocabulary is not None and self._by_id:
            for answer in answers:
                self._check(answer, vocabulary)

    def add(self, expected: Tensor, actual: Tensor, batch: Batch, text: int) -> None:
        """Logits [batch, length, vocabulary] of the other model, and of the checkpoint as it is
        replayed. text: the number of the batch's text."""
        for row in range(len(expected)):
            answer = next(self._answers)
            one = Batch(batch.input_ids[row : row + 1], None)
            served = torch.tensor(answer.scores, dtype=torch.float64)
            kl = agreed = replayed = largest = None
            if self._by_id:
                p = expected[row, :-1].float().log_softmax(-1).double()
                first = torch.tensor([some[0][0] for some in answer.candidates or ()])
                self._check(answer, p.shape[-1])
                agreed = float((p.argmax(-1) == first).double().mean())
                replayed = float((actual[row, :-1].argmax(-1) == first).double().mean())
                each = torch.stack(
                    [self._kl(*pair) for pair in zip(p, answer.candidates or (), strict=True)]
                )
                kl, largest = float(each.mean()), float(each.max())
            for windows, logits, top, divergence in (
                (self._windows, expected, agreed, kl),
                (self._replayed, actual, replayed, None),
            ):
                base = token_log_probs(logits[row : row + 1], one)[0].double()
                report = WindowReport(
                    text=text,
                    reference=_perplexity(base),
                    checkpoint=_perplexity(served),
                    kl=divergence,
                    top1_agreement=top,
                    mean_abs_logprob_change=float((served - base).abs().mean()),
                )
                windows.add(report, len(served), largest or 0.0)

    def _check(self, answer: Answer, vocabulary: int) -> None:
        """InputError for a candidate that is not a token of the model."""
        largest = max(token for some in answer.candidates or () for token, _ in some)
        if largest >= vocabulary:
            what = f"the server names token {largest}, and the model has {vocabulary}"
            fix = "serve a checkpoint of the same model"
            raise InputError(what, where=self._endpoint.where, fix=fix)

    def _kl(self, p: Tensor, candidates: Sequence[tuple[int, float]]) -> Tensor:
        """A lower bound of the KL divergence of a prediction, by the log sum inequality: all tokens but
        the candidates count as one. p: log-probabilities of the other model, float64 [vocabulary]."""
        ids = torch.tensor([token for token, _ in candidates])
        q = torch.tensor([score for _, score in candidates], dtype=torch.float64)
        own_p = p[ids]
        covered = own_p.exp().sum()
        self._covered.append(float(covered))
        rest = (1 - covered).clamp_min(0)
        others = (1 - q.exp().sum()).clamp_min(_LEAST_REST)
        total = (own_p.exp() * (own_p - q)).sum()
        if float(rest) > 0:
            total = total + rest * (rest / others).log()
        return total.clamp_min(0)

    def report(self, names: Sequence[tuple[str, str]]) -> ServedReport:
        """All figures. names: name and sha256 (hex) of each text."""
        covered = round(math.fsum(self._covered) / len(self._covered), 6) if self._covered else None
        return ServedReport(
            **own(self._windows.figures()),
            url=self._endpoint.url,
            model=self._endpoint.model,
            candidates=self._least if self._by_id else None,
            covered=covered,
            replay=self._replayed.figures(),
            texts=self._windows.by_text(names),
        )


def _perplexity(scores: Tensor) -> float:
    return math.exp(min(-float(scores.mean()), 700.0))  # JSON has no infinity
