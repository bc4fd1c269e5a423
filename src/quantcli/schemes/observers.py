"""What is measured of a module's input while samples pass: ranges, distributions, channels.

All but the moving average give the same result in whatever order and batches the samples come, so that
threads may share an observer.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from quantcli.numerics import Stats

_PATTERNS = 2**16


class Observer(ABC):
    """Measures the input of one module, or of siblings that share it. Threads may share it."""

    def __init__(self) -> None:
        self.tokens = 0  # rows seen
        self._lock = threading.Lock()

    def update(self, x: Tensor, batch: int) -> None:
        """Look at inputs [tokens, k], without padding. `batch` is their place in the data, from 0."""
        if len(x) == 0:
            return
        measured = self._measure(x)
        with self._lock:
            self.tokens += len(x)
            self._merge(measured, batch)

    @abstractmethod
    def _measure(self, x: Tensor) -> Any:
        """A small summary of [tokens, k], on the CPU; runs outside of the lock."""

    @abstractmethod
    def _merge(self, measured: Any, batch: int) -> None:
        """Add a summary."""

    @abstractmethod
    def stats(self) -> Stats:
        """What was measured. Zeros where nothing was seen."""


class RangeObserver(Observer):
    """An observer whose result is one range for the whole tensor; it always includes 0."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """Lowest <= 0 and highest >= 0 value to represent."""

    def stats(self) -> Stats:
        """input_min and input_max, float32 [1]."""
        low, high = self.range()
        return {"input_min": torch.tensor([low]), "input_max": torch.tensor([high])}


class MinMax(RangeObserver):
    """The extremes."""

    def __init__(self) -> None:
        super().__init__()
        self._low = self._high = 0.0

    def _measure(self, x: Tensor) -> tuple[float, float]:
        low, high = x.aminmax()
        return float(low), float(high)

    def _merge(self, measured: tuple[float, float], batch: int) -> None:
        self._low, self._high = min(self._low, measured[0]), max(self._high, measured[1])

    def range(self) -> tuple[float, float]:
        """The extremes of all that was seen, and 0."""
        return self._low, self._high


class MovingAverage(RangeObserver):
    """Extremes of each batch, averaged exponentially in the order of the data; the first begins."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self._momentum = momentum
        self._batches: dict[int, tuple[float, float]] = {}

    def _measure(self, x: Tensor) -> tuple[float, float]:
        low, high = x.aminmax()
        return min(0.0, float(low)), max(0.0, float(high))

    def _merge(self, measured: tuple[float, float], batch: int) -> None:
        low, high = self._batches.get(batch, measured)
        self._batches[batch] = min(low, measured[0]), max(high, measured[1])

    def range(self) -> tuple[float, float]:
        """The average over batches: new = momentum * old + (1 - momentum) * batch."""
        low = high = 0.0
        for place, batch in enumerate(sorted(self._batches)):
            keep = self._momentum if place else 0.0
            low = keep * low + (1 - keep) * self._batches[batch][0]
            high = keep * high + (1 - keep) * self._batches[batch][1]
        return low, high


class Distribution(Observer):
    """How often each value occurs: exact for 16-bit inputs, 64 K counters whatever is seen.

    Float32 inputs are counted as their nearest bfloat16, within 2^-9 of the value.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts = torch.zeros(_PATTERNS, dtype=torch.int64)
        self._dtype = torch.bfloat16

    def _measure(self, x: Tensor) -> tuple[Tensor, torch.dtype]:
        if x.dtype == torch.float32:
            x = x.bfloat16()
        patterns = x.contiguous().view(torch.int16).flatten().to(torch.int32) + _PATTERNS // 2
        return torch.bincount(patterns, minlength=_PATTERNS).cpu(), x.dtype

    def _merge(self, measured: tuple[Tensor, torch.dtype], batch: int) -> None:
        self._counts += measured[0]
        self._dtype = measured[1]

    def values(self) -> tuple[Tensor, Tensor]:
        """The values that occurred, ascending float32 [v], and how often, int64 [v]."""
        patterns = torch.arange(-_PATTERNS // 2, _PATTERNS // 2, dtype=torch.int32).to(torch.int16)
        seen = self._counts > 0
        values, order = patterns[seen].view(self._dtype).float().sort()
        return values, self._counts[seen][order]

    def stats(self) -> Stats:
        """input_min and input_max, float32 [1]."""
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


class ChannelAmax(Observer):
    """max |x| of each channel: `channel_amax` float32 [k]."""

    def __init__(self) -> None:
        super().__init__()
        self._amax = torch.zeros(1)

    def _measure(self, x: Tensor) -> Tensor:
        low, high = x.aminmax(dim=0)
        return torch.maximum(-low, high).float().cpu()

    def _merge(self, measured: Tensor, batch: int) -> None:
        self._amax = torch.maximum(self._amax, measured)

    def stats(self) -> Stats:
        """channel_amax, float32 [k]."""
        return {"channel_amax": self._amax}
