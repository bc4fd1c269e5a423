"""Inputs of a layer's matrices, without padding: counted, and shown to observers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.replay.taps import Listener, Matrices, Matrix, Tap
from quantcli.calibration.text.dataset import Batch


class Looker(Protocol):
    """Anything that is shown inputs, such as an observer."""

    def update(self, x: Tensor, batch: int) -> None:
        """x: [tokens, k], no padding. batch: its place in the data."""


class Watch:
    """The observers of a layer's matrices, and the number of tokens of each matrix."""

    def __init__(
        self, lookers: Mapping[Matrix, Sequence[Looker]], engine: Listener | None = None
    ) -> None:
        """engine: computes the multiplications, after inputs were shown; None: the layer does."""
        self.engine = engine
        self.tokens: Counter[Matrix] = Counter()
        self._lookers = lookers
        self._lock = threading.Lock()

    def count(self, tokens: Counter[Matrix]) -> None:
        """Add the tokens of one batch."""
        with self._lock:
            self.tokens.update(tokens)

    def show(self, matrix: Matrix, x: Tensor, batch: int) -> None:
        """x: [tokens, k], no padding."""
        for looker in self._lookers.get(matrix, ()):
            looker.update(x, batch)


class _BatchWatch:
    """The listener of one batch, on the thread that runs it."""

    def __init__(self, watch: Watch, number: int, batch: Batch) -> None:
        self.flow: Flow | None = None  # if there is padding: knows which token a row is
        self.tokens: Counter[Matrix] = Counter()
        self._watch = watch
        self._number = number
        self._mask = batch.mask

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor | None:
        rows = x.reshape(-1, x.shape[-1])
        if self._mask is not None and self.flow is not None:
            tokens = self.flow.rows_of(x)
            if tokens is not None:
                rows = rows[self._mask.flatten()[tokens.cpu()].to(rows.device)]
        self.tokens[matrix] += len(rows)
        self._watch.show(matrix, rows, self._number)
        engine = self._watch.engine
        return None if engine is None else engine.linear(matrix, x, bias)


@contextmanager
def watched(watch: Watch, matrices: Matrices, number: int, batch: Batch) -> Iterator[None]:
    """Within it `watch` sees the matrix multiplications of a batch's forward on this thread."""
    listener = _BatchWatch(watch, number, batch)
    if batch.mask is None:
        tap = Tap(matrices, listener)
    else:
        tap = listener.flow = Flow(matrices, listener, batch.input_ids.numel())
    with tap:
        yield
    watch.count(listener.tokens)


@contextmanager
def layer_watched(name: str, layer: nn.Module, batches: Sequence[Batch]) -> Iterator[None]:
    """Around all batches: norms are followed if a batch has padding."""
    if any(batch.mask is not None for batch in batches):
        with norms_followed(name, layer):
            yield
    else:
        yield
