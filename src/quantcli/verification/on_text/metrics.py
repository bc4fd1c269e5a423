"""Figures over windows of text, and their 95 % intervals by a bootstrap over these windows.

Each window has both models on the same tokens, so that a figure is of pairs. If two checkpoints ran on
the same windows, the difference between them is one of pairs, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantcli.verification.options import LEAST_WINDOWS

Array: TypeAlias = NDArray[np.float64]
Columns: TypeAlias = Mapping[str, Array]  # numbers of windows by name: [..., windows]

_RESAMPLES = 2000
_AT_ONCE = 2**22  # numbers of a bootstrap in memory
_QUIET = -200.0  # dB of error over signal: none


@dataclass(frozen=True)
class Metric:
    """A figure over windows.

    key:      its name in reports; name: for people.
    needs:    keys of a window's report that it is made of.
    value:    of windows, along the last axis.
    more_is_better: whether a larger one is nearer to the other model.
    relative: whether a change of it is a ratio, less 1; else it is a difference.
    """

    key: str
    name: str
    needs: tuple[str, ...]
    value: Callable[[Columns], Array]
    more_is_better: bool = False
    relative: bool = False

    def change(self, before: Columns, now: Columns) -> Array:
        """Of the figure from one checkpoint to another on the same windows."""
        old, new = self.value(before), self.value(now)
        return new / old - 1 if self.relative else new - old


def _mean(key: str) -> Callable[[Columns], Array]:
    return lambda columns: columns[key].mean(-1)


def _ratio(columns: Columns) -> Array:
    losses = np.log(columns["checkpoint"]) - np.log(columns["reference"])
    ratio: Array = np.exp(losses.mean(-1).clip(-700, 700))  # JSON has no infinity
    return ratio


def _sqnr(columns: Columns) -> Array:
    energy, error = columns["energy"].sum(-1), columns["error"].sum(-1)
    share = np.divide(error, energy, out=np.full_like(error, 1e20), where=energy > 0)
    decibels: Array = -10 * np.log10(share.clip(10 ** (_QUIET / 10), 10 ** (-_QUIET / 10)))
    return decibels


PERPLEXITY = Metric("ppl", "perplexity ratio", ("reference", "checkpoint"), _ratio, relative=True)
KL = Metric("kl", "mean KL divergence", ("kl",), _mean("kl"))
CHANGE = Metric(
    "mean_abs_logprob_change",
    "mean change of a log-probability",
    ("mean_abs_logprob_change",),
    _mean("mean_abs_logprob_change"),
)
TOP1 = Metric("top1_agreement", "same first choice", ("top1_agreement",), _mean("top1_agreement"), True)
SQNR = Metric("outputs_db", "SQNR of outputs", ("energy", "error"), _sqnr, True)
PEIR = Metric("peir", "PEIR of outputs", ("peir",), _mean("peir"))
METRICS = (PERPLEXITY, KL, CHANGE, TOP1, SQNR, PEIR)


def columns_of(windows: Sequence[Mapping[str, Any]]) -> Columns:
    """The numbers of windows, by the keys of their reports that all of them have."""
    keys = dict.fromkeys(key for metric in METRICS for key in metric.needs)
    columns = {key: [window.get(key) for window in windows] for key in keys}
    return {
        key: np.array(values, dtype=np.float64)
        for key, values in columns.items()
        if not any(value is None for value in values)
    }


def columns_of_scores(before: Sequence[float], now: Sequence[float]) -> Columns:
    """Scores of the same documents by two models, `before` and `now`."""
    return {"before": np.array(before), "now": np.array(now)}


def interval(
    value: Callable[[Columns], Array], columns: Columns, texts: Sequence[int]
) -> list[float] | None:
    """The 95 % interval of a figure, by a bootstrap over windows; None if a text has one window.

    texts: the text of each window. Windows are drawn within each text, as the texts are given and not
    drawn. The same windows give the same interval.
    """
    places = [np.flatnonzero(np.equal(texts, text)) for text in dict.fromkeys(texts)]
    if not places or min(map(len, places)) < 2:
        return None
    found = [value({key: column[picks] for key, column in columns.items()}) for picks in _picks(places)]
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975)).tolist()
    return [low, high]


def better(ends: list[float] | None, count: int, *, more_is_better: bool) -> bool | None:
    """Whether a change is for the better; None if it is not known.

    ends: the interval of the change. count: of windows, or documents, that it is of.
    """
    if ends is None or count < LEAST_WINDOWS or ends[0] <= 0 <= ends[1]:
        return None
    return (ends[0] > 0) == more_is_better


def _picks(places: Sequence[NDArray[np.intp]]) -> Iterator[NDArray[np.intp]]:
    """Draws of as many windows as each text has: [draws, windows]."""
    generator = np.random.default_rng(0)
    step = max(1, _AT_ONCE // sum(map(len, places)))
    for start in range(0, _RESAMPLES, step):
        draws = min(step, _RESAMPLES - start)
        yield np.concatenate(
            [own[generator.integers(len(own), size=(draws, len(own)))] for own in places], axis=1
        )
