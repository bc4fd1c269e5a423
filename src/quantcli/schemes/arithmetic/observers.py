"""Summaries of a module's input while samples pass (ranges, distributions, channels), and observers.

All but the moving average give the same result in whatever order and batches the samples come, so that
threads may share an observer.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.core.numerics import Stats
from quantcli.core.threads import Locked
from quantcli.schemes.arithmetic import rounding

_PATTERNS = 2**16  # of a 16-bit number
_FEW_TOKENS = 32
_BLOCK = 2**18  # elements that are looked at together, so that copies of them stay in the cache


class Summary(ABC):
    """A summary of a module's inputs. `add` and `added` are called by one thread at a time."""

    @property
    def kind(self) -> Hashable | None:
        """Summaries of one kind are equal after the same inputs, so that one can serve for several.
        None: this one serves for no other."""
        return None

    @abstractmethod
    def of(self, x: Tensor) -> Any | None:
        """A small summary of inputs [tokens, k], on the CPU; None if there is NaN or Inf among them.

        Threads may call it at the same time.
        """

    @abstractmethod
    def add(self, summary: Any, /, batch: int) -> None:
        """Add the summary of some inputs of a batch."""

    @abstractmethod
    def added(self) -> Iterator[tuple[Any, int]]:
        """All that was added, as (summary, batch)."""

    @abstractmethod
    def stats(self) -> Stats:
        """The summary as tensors. Zeros if nothing was added."""


class PlainSummary(Summary):
    """A summary without options: all of one class are of one kind."""

    @property
    def kind(self) -> Hashable:
        """One for each class."""
        return type(self)


class Observer:
    """Observes the input of one module, or of siblings that share it. Threads may share it."""

    def __init__(self, summary: Summary, choose: Callable[[Any], Stats] | None = None) -> None:
        """choose: makes stats of the summary; None: they are the summary's own."""
        self._seen = _Seen(summary)
        self._choose = choose

    @property
    def tokens(self) -> int:
        """Rows seen."""
        return self._seen.tokens

    @property
    def finite(self) -> bool:
        """Whether no batch had NaN or Inf; one that has is counted and not summed up."""
        return self._seen.finite

    @property
    def summary(self) -> Any:
        """The summary of all inputs."""
        return self._seen.summary

    def stats(self) -> Stats:
        """The stats of all inputs that were seen."""
        summary = self._seen.summary
        return summary.stats() if self._choose is None else self._choose(summary)

    def share(self, other: Observer) -> None:
        """From now on see what `other` sees, with one summary for both. Both are of one kind of
        summary and have seen nothing."""
        self._seen = other._seen

    def update(self, x: Tensor, batch: int) -> None:
        """Look at inputs [tokens, k], without padding. `batch` is their place in the data, from 0."""
        if len(x) == 0:
            return
        seen = self._seen
        summary = seen.summary.of(x)
        with seen.lock:
            seen.tokens += len(x)
            if summary is None:
                seen.finite = False
            else:
                seen.summary.add(summary, batch)

    def part(self) -> Observer | None:
        """An observer that sees some of the inputs in another process, and is absorbed then. None if
        this one has seen inputs already."""
        return None if self._seen.tokens else Observer(copy.deepcopy(self.summary))

    def absorb(self, other: Observer) -> None:
        """Count the inputs that another observer of the same kind has seen as seen here, too."""
        seen = self._seen
        with seen.lock:
            seen.tokens += other.tokens
            seen.finite &= other.finite
            for summary, batch in other.summary.added():
                seen.summary.add(summary, batch)


class _Seen(Locked):
    """What an observer has seen."""

    def __init__(self, summary: Summary) -> None:
        super().__init__()
        self.summary = summary
        self.tokens = 0
        self.finite = True


def input_observer(
    chosen_by: str,
    of_range: Callable[[float, float], Stats],
    of_distribution: Callable[[Tensor, Tensor], Stats],
    *,
    percent: float,
    momentum: float = 0.0,
) -> Observer:
    """An observer that chooses how one module's inputs are represented.

    chosen_by: minmax | moving_average | percentile | mse. of_range: stats of the range [low, high],
    which includes 0. of_distribution: those with the least squared error over `values`, `counts`.

    Its stats are these, and the extremes input_min and input_max: float32 [1] each. Scales are
    positive also if nothing, or nothing but zeros, was seen.
    """
    if chosen_by in {"minmax", "moving_average"}:
        ends = MinMax() if chosen_by == "minmax" else MovingAverage(momentum)
        return Observer(ends, lambda seen: {**of_range(*seen.range()), **seen.stats()})

    def choose(distribution: Distribution) -> Stats:
        values, counts = distribution.values()
        if chosen_by == "mse":
            return {**of_distribution(values, counts), **distribution.stats()}
        inner = percentile(values, counts, percent)
        if inner == (0.0, 0.0):  # nearly all is 0: such a range would clip all the rest
            inner = percentile(values, counts, 100)
        return {**of_range(*inner), **distribution.stats()}

    return Observer(Distribution(), choose)


class MinMax(PlainSummary):
    """The extremes, and the range to represent, which is as wide. Both include 0."""

    def __init__(self) -> None:
        self._low = self._high = 0.0

    def of(self, x: Tensor) -> tuple[float, float] | None:
        """Lowest and highest value."""
        low, high = map(float, x.aminmax())  # NaN comes through
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None

    def add(self, ends: tuple[float, float], batch: int) -> None:
        """Widen the range."""
        self._low, self._high = min(self._low, ends[0]), max(self._high, ends[1])

    def added(self) -> Iterator[tuple[tuple[float, float], int]]:
        """The extremes, as if of one batch."""
        yield (self._low, self._high), 0

    def range(self) -> tuple[float, float]:
        """Lowest <= 0 and highest >= 0 value to represent."""
        return self._low, self._high

    def stats(self) -> Stats:
        """input_min and input_max, the extremes: float32 [1]."""
        return {"input_min": torch.tensor([self._low]), "input_max": torch.tensor([self._high])}


class MovingAverage(MinMax):
    """Extremes of each batch, averaged exponentially in the order of the data; the first begins."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self._momentum = momentum
        self._batches: dict[int, tuple[float, float]] = {}

    @property
    def kind(self) -> Hashable:
        """One for each momentum."""
        return type(self), self._momentum

    def add(self, ends: tuple[float, float], batch: int) -> None:
        """Widen the range, and that of the batch."""
        super().add(ends, batch)
        low, high = self._batches.get(batch, (0.0, 0.0))
        self._batches[batch] = min(low, ends[0]), max(high, ends[1])

    def added(self) -> Iterator[tuple[tuple[float, float], int]]:
        """The extremes of each batch."""
        return ((ends, batch) for batch, ends in self._batches.items())

    def range(self) -> tuple[float, float]:
        """The average over batches: new = momentum * old + (1 - momentum) * batch."""
        low = high = 0.0
        for place, batch in enumerate(sorted(self._batches)):
            keep = self._momentum if place else 0.0
            low = keep * low + (1 - keep) * self._batches[batch][0]
            high = keep * high + (1 - keep) * self._batches[batch][1]
        return low, high


class Distribution(PlainSummary):
    """How often each value occurs: exact for 16-bit inputs, 64 K counters whatever is seen.

    Float32 inputs are counted as their nearest bfloat16, within 2^-9 of the value.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_PATTERNS, dtype=np.int64)  # by bit pattern
        self._dtype: torch.dtype | None = None

    def __getstate__(self) -> tuple[np.ndarray, np.ndarray, torch.dtype | None]:
        """The patterns that occurred, and how often: they are few, and go to other processes."""
        patterns = self._counts.nonzero()[0].astype(np.uint16)
        return patterns, self._counts[patterns], self._dtype

    def __setstate__(self, state: tuple[np.ndarray, np.ndarray, torch.dtype | None]) -> None:
        self.__init__()  # type: ignore[misc]
        self._counts[state[0]] = state[1]
        self._dtype = state[2]

    def of(self, x: Tensor) -> tuple[np.ndarray, torch.dtype] | None:
        """How often each bit pattern occurs, int64 [65536], and the dtype that the bits are of."""
        dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
        if x.device.type != "cpu":
            patterns = x.to(dtype).contiguous().view(torch.int16).flatten().int() & (_PATTERNS - 1)
            counts = torch.bincount(patterns, minlength=_PATTERNS).cpu().numpy()
        else:
            counts = np.zeros(_PATTERNS, dtype=np.int64)
            for rows in _blocks(x):
                numbers = rows.to(dtype).contiguous().view(torch.int16).numpy()
                counts += np.bincount(numbers.view(np.uint16).ravel(), minlength=_PATTERNS)
        # Without its sign, a float orders like the integer it is stored as; NaN stands above Inf.
        infinity = int(torch.tensor(math.inf, dtype=dtype).view(torch.int16))
        return None if counts.reshape(2, -1)[:, infinity:].any() else (counts, dtype)

    def add(self, counted: tuple[np.ndarray, torch.dtype], batch: int) -> None:
        """Add the counts."""
        counts, dtype = counted
        assert self._dtype in {None, dtype}, "the dtype of a module's inputs has changed"
        self._counts += counts
        self._dtype = dtype

    def added(self) -> Iterator[tuple[tuple[np.ndarray, torch.dtype], int]]:
        """The counts, as if of one batch."""
        if self._dtype is not None:
            yield (self._counts, self._dtype), 0

    def values(self) -> tuple[Tensor, Tensor]:
        """The values that occurred, ascending float32 [v], and how often, int64 [v]."""
        patterns = self._counts.nonzero()[0]
        numbers = torch.from_numpy(patterns.astype(np.uint16).view(np.int16))
        values, order = numbers.view(self._dtype or torch.bfloat16).float().sort(stable=True)
        return values, torch.from_numpy(self._counts[patterns])[order]

    def stats(self) -> Stats:
        """input_min and input_max, the extremes: float32 [1]. They include 0."""
        values, _ = self.values()
        ends = torch.cat([values, torch.zeros(1)])
        return {"input_min": ends.min().view(1), "input_max": ends.max().view(1)}


def percentile(values: Tensor, counts: Tensor, percent: float) -> tuple[float, float]:
    """The range that leaves out (100 - percent) % of the values, half at each end; includes 0."""
    if not len(values):
        return 0.0, 0.0
    below = counts.cumsum(0).double() / counts.sum()
    outside = (1 - percent / 100) / 2
    low = values[int((below > outside).nonzero()[0])]
    high = values[int((below >= 1 - outside).nonzero()[0])]
    return min(0.0, float(low)), max(0.0, float(high))


class ChannelAmax(PlainSummary):
    """max |x| of each channel: `channel_amax` float32 [k]."""

    def __init__(self) -> None:
        self._amax = torch.zeros(1)

    def of(self, x: Tensor) -> Tensor | None:
        """Float32 [k]."""
        blocks = _blocks(x) if x.device.type == "cpu" else [x]
        amax = torch.cat([rounding.absmax(rows, dim=0) for rows in blocks]).amax(0).cpu()
        return amax if bool(torch.isfinite(amax).all()) else None

    def add(self, amax: Tensor, batch: int) -> None:
        """Take the larger ones."""
        self._amax = torch.maximum(self._amax, amax)

    def added(self) -> Iterator[tuple[Tensor, int]]:
        """The maxima, as if of one batch."""
        yield self._amax, 0

    def stats(self) -> Stats:
        """channel_amax, float32 [k]."""
        return {"channel_amax": self._amax}


class ChannelSquare(PlainSummary):
    """The mean of x^2 of each channel: `input_square` float32 [k], of bfloat16 precision.

    Few tokens tell little of a channel: the mean of all channels counts as much as _FEW_TOKENS tokens.
    Sums are in float64, and rounding hides in which order threads have added them.
    """

    def __init__(self) -> None:
        self._sum = torch.zeros(1, dtype=torch.float64)
        self._tokens = 0

    def of(self, x: Tensor) -> tuple[Tensor, int] | None:
        """The sum of squares, float64 [k], and the number of tokens."""
        sums = torch.stack([rows.float().square().sum(0) for rows in _blocks(x)])
        total = sums.cpu().double().sum(0)
        return (total, len(x)) if bool(torch.isfinite(total).all()) else None

    def add(self, summary: tuple[Tensor, int], batch: int) -> None:
        """Add sums and tokens."""
        self._sum = self._sum + summary[0]
        self._tokens += summary[1]

    def added(self) -> Iterator[tuple[tuple[Tensor, int], int]]:
        """The sums, as if of one batch."""
        yield (self._sum, self._tokens), 0

    def stats(self) -> Stats:
        """input_square, float32 [k]."""
        total = self._sum + _FEW_TOKENS * self._sum.mean() / max(1, self._tokens)
        square = total / (self._tokens + _FEW_TOKENS)
        return {"input_square": square.to(torch.bfloat16).float()}


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """[tokens, k] in runs of rows."""
    step = max(1, _BLOCK // max(1, x.shape[1]))
    return (x[start : start + step] for start in range(0, len(x), step))
