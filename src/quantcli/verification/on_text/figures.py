"""What both models put out on text, as figures: perplexity, divergence, agreement, their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.calibration.replay.served import token_log_probs
from quantcli.calibration.text.dataset import Batch
from quantcli.core.findings import Finding, failed
from quantcli.verification.on_text import metrics
from quantcli.verification.on_text.metrics import Columns, Metric
from quantcli.verification.on_text.reports import (
    Divergence,
    Figures,
    LayerReport,
    PerplexityRatio,
    RunReport,
    ServedReport,
    TextReport,
    TokenReport,
    TraceReport,
    WindowReport,
)
from quantcli.verification.on_text.tokens import Texts, moved_tokens

FINER = "see which layers are worst, and keep their modules in a finer scheme"


class Windows:
    """The windows of text that both models ran on, one at a time."""

    def __init__(self) -> None:
        self.reports: list[WindowReport] = []
        self._tokens: list[int] = []  # of each window
        self._largest: list[float] = []  # KL of a prediction, of each window

    def add(self, report: WindowReport, tokens: int, largest: float = 0.0) -> None:
        """A window. tokens: how many count. largest: KL divergence of one of its predictions."""
        self.reports.append(report)
        self._tokens.append(tokens)
        self._largest.append(largest)

    def figures(self, text: int | None = None) -> Figures:
        """The figures of one text, by its number; None: of all."""
        places = [n for n, each in enumerate(self.reports) if text in (None, each.text)]
        reports = [self.reports[place] for place in places]
        columns = metrics.columns_of([asdict(report) for report in reports])
        texts = [report.text for report in reports]

        def of(metric: Metric, places: int = 6) -> float | None:
            is_there = all(key in columns for key in metric.needs)
            return round(float(metric.value(columns)), places) if is_there else None

        def span(metric: Metric) -> list[float] | None:
            if of(metric) is None:
                return None
            ends = metrics.interval(metric.value, columns, texts)
            return None if ends is None else [round(end, 6) for end in ends]

        ratio, kl = of(metrics.PERPLEXITY), of(metrics.KL)
        largest = max(self._largest[place] for place in places)
        return Figures(
            tokens=sum(self._tokens[place] for place in places),
            ppl=None
            if ratio is None
            else PerplexityRatio(
                reference=round(_perplexity(columns, "reference"), 4),
                checkpoint=round(_perplexity(columns, "checkpoint"), 4),
                ratio=ratio,
                interval=span(metrics.PERPLEXITY),
            ),
            kl=None if kl is None else Divergence(kl, round(largest, 6), span(metrics.KL)),
            top1_agreement=of(metrics.TOP1),
            top1_interval=span(metrics.TOP1),
            mean_abs_logprob_change=of(metrics.CHANGE),
            change_interval=span(metrics.CHANGE),
            outputs_db=of(metrics.SQNR, 3),
            outputs_interval=span(metrics.SQNR),
            peir=of(metrics.PEIR),
            peir_interval=span(metrics.PEIR),
        )

    def by_text(self, names: Sequence[tuple[str, str]]) -> list[TextReport]:
        """The figures of each text. names: name and sha256 (hex) of each."""
        return [
            TextReport(
                **own(self.figures(number)),
                text=name,
                sha256=sha256,
                windows=sum(each.text == number for each in self.reports),
            )
            for number, (name, sha256) in enumerate(names)
        ]

    def report(
        self,
        names: Sequence[tuple[str, str]],
        layers: list[LayerReport],
        traces: list[TraceReport],
        served: ServedReport | None = None,
        moved: Callable[[], list[TokenReport]] = list,
    ) -> RunReport:
        """All figures, rounded. names: name and sha256 (hex) of each text. served: those of a server.
        moved: gives the tokens that moved most."""
        return RunReport(
            **own(self.figures()),
            windows=[_rounded(report) for report in self.reports],
            layers=layers,
            traces=traces,
            served=served,
            texts=self.by_text(names),
            moved_tokens=moved(),
        )


def own(figures: Figures) -> dict[str, Any]:
    """The fields of figures, for a report that has more."""
    return dict(vars(figures))


def _perplexity(columns: Columns, key: str) -> float:
    return math.exp(min(float(np.log(columns[key]).mean()), 700.0))


def _rounded(report: WindowReport) -> WindowReport:
    """Energies with 9 digits, all else with 9 places."""
    values: dict[str, Any] = {
        key: value if value is None else float(f"{value:.9g}") if key in _ENERGIES else round(value, 9)
        for key, value in asdict(report).items()
    }
    return WindowReport(**values)


_ENERGIES = ("energy", "error")


def outputs_of(expected: Tensor, actual: Tensor) -> dict[str, float]:
    """What a `WindowReport` holds of any outputs of one shape: `energy`, `error`, `peir`."""
    x, difference = expected.float(), actual.float() - expected.float()
    low, high = x.aminmax()
    largest, reach = float(difference.abs().max()), float(high - low)
    return {
        "energy": float(x.square().sum(dtype=torch.float64)),
        "error": float(difference.square().sum(dtype=torch.float64)),
        "peir": largest / reach if reach else float(largest > 0),
    }


class Outputs:
    """What models put out that predict no text: logits of classes, or hidden states."""

    def __init__(self, least: float) -> None:
        """least: SQNR in dB."""
        self.numbers = 0
        self.windows = Windows()
        self._least = least

    def add(self, expected: Tensor, actual: Tensor, batch: Batch, text: int = 0) -> None:
        """Outputs of a batch, of one shape. text: the number of its text."""
        self.numbers += expected.numel()
        for row in range(len(expected)):
            one = outputs_of(expected[row], actual[row])
            report = WindowReport(text, None, None, None, None, None, **one)
            self.windows.add(report, int(batch.input_ids[row].numel()))

    def findings(self, run: RunReport) -> Iterator[Finding]:
        """Errors of texts on which the outputs are far from the other model's."""
        for place, figures in by_text(run):
            if not (sqnr := figures.outputs_db or 0.0) >= self._least:
                what = f"the model puts out {sqnr:.3f} dB on the same text, at least "
                yield failed("outputs", f"{what}{self._least:g} dB are expected", place, FINER)


class Predictions:
    """What models predict, one batch at a time."""

    def __init__(self, ahead: int = 1) -> None:
        """ahead: see `token_log_probs`."""
        self.windows = Windows()
        self._ahead = ahead
        self._ids: list[list[int]] = []  # token ids of each window
        # log-probabilities of the text by both models: one pair of tensors for each window
        self._scores: list[tuple[Tensor, Tensor]] = []

    def add(self, expected: Tensor, actual: Tensor, batch: Batch, text: int = 0) -> None:
        """Logits [batch, length, vocabulary] of both models. text: the number of the batch's text."""
        scores = [token_log_probs(logits, batch, ahead=self._ahead) for logits in (expected, actual)]
        for row in range(len(expected)):  # the vocabulary is large
            p, q = (logits[row].float().log_softmax(-1) for logits in (expected, actual))
            kl = (p.exp() * (p - q)).sum(-1).double()
            agreed = p.argmax(-1) == q.argmax(-1)
            before, after = (score[row].double() for score in scores)
            report = WindowReport(
                text=text,
                reference=math.exp(min(-float(before.mean()), 700.0)),  # JSON has no infinity
                checkpoint=math.exp(min(-float(after.mean()), 700.0)),
                kl=float(kl.mean().clamp_min(0)),
                top1_agreement=float(agreed.double().mean()),
                mean_abs_logprob_change=float((after - before).abs().mean()),
                **outputs_of(expected[row], actual[row]),
            )
            self.windows.add(report, len(before), float(kl.max()))
            self._scores.append((scores[0][row], scores[1][row]))
        self._ids += batch.input_ids.tolist()

    def moved(self, texts: Texts) -> list[TokenReport]:
        """The tokens that moved most. texts: of several sequences of token ids."""
        return moved_tokens(self._ids, self._scores, texts)


def by_text(run: RunReport) -> Iterator[tuple[str | None, Figures]]:
    """The figures of each text with its name; of one text alone, without it."""
    for text in run.texts:
        yield (None if len(run.texts) == 1 else f"`{text.text}`"), text
