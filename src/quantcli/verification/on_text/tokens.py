"""The tokens of a text whose log-probability moved most, in context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantcli.verification.on_text.reports import TokenReport

_MOST = 20  # tokens to report
_BEFORE, _AFTER = 24, 8  # tokens of context
_CHARACTERS = 160  # of the token, and of the text on each side of it
_PARTS = 4  # texts for each token: see `_parts`

Texts = Callable[[Sequence[Sequence[int]]], list[str]]


def moved_tokens(
    windows: Sequence[Sequence[int]],
    scores: Sequence[tuple[Tensor, Tensor]],
    texts: Texts,
) -> list[TokenReport]:
    """The tokens whose log-probability moved most, largest change first.

    windows: token ids. scores: log-probabilities [length - 1] of all tokens of a window but its first,
    by the other model and by the checkpoint. texts: of several sequences of token ids.
    """
    found = []
    for number, (expected, actual) in enumerate(scores):
        change = actual.double() - expected.double()
        order = torch.sort(change.abs(), descending=True, stable=True).indices[:_MOST]
        found += [(-abs(float(change[place])), number, place + 1) for place in order.tolist()]
    places = [(number, position) for _, number, position in sorted(found)[:_MOST]]
    pieces = iter(texts([part for number, at in places for part in _parts(windows[number], at)]))
    return [
        _report(number, position, scores[number], [next(pieces) for _ in range(_PARTS)])
        for number, position in places
    ]


def _parts(ids: Sequence[int], position: int) -> tuple[Sequence[int], ...]:
    """The tokens before one, these and itself, itself, and those after it."""
    begin = max(0, position - _BEFORE)
    after = ids[position + 1 : position + 1 + _AFTER]
    return ids[begin:position], ids[begin : position + 1], ids[position : position + 1], after


def _report(
    number: int, position: int, scores: tuple[Tensor, Tensor], parts: Sequence[str]
) -> TokenReport:
    expected, actual = (float(score[position - 1]) for score in scores)
    before, until, token, after = parts
    # some tokenizers write a token without its space if nothing is in front of it
    fits = until.startswith(before) and len(until) > len(before)
    return TokenReport(
        window=number,
        position=position,
        token=(until[len(before) :] if fits else token)[:_CHARACTERS],
        before=before[-_CHARACTERS:],
        after=after[:_CHARACTERS],
        reference=round(math.exp(expected), 6),
        checkpoint=round(math.exp(actual), 6),
        change=round(actual - expected, 4),
    )
