"""What is measured of a module's input while samples pass: ranges, distributions, channels.

All but the moving average give the same result in whatever order and batches the samples come, so that
threads may share an observer.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from quantcli.core.numerics import Stats
from quantcli.schemes.arithmetic import rounding

_PATTERNS = 2**16  # of a 16-bit number
_BLOCK = 2**18  # elements that are looked at together, so that copies of them stay in the cache


class Observer(ABC):
    """Measures the input of one module, or of siblings that share it. Threads may share it.

    tokens: rows seen. finite: no batch had NaN or Inf; one that has is counted and not measured.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.finite = True
        self._lock = threading.Lock()

    def update(self, x: Tensor, batch: int) -> None:
        """Look at inputs [tokens, k], without padding. `batch` is their place in the data, from 0."""
        if len(x) == 0:
            return
        measured = self._measure(x)
        with self._lock:
            self.tokens += len(x)
            if self._sound(measured):
                self._merge(measured, batch)
            else:
                self.finite = False

    def absorb(self, other: Self) -> None:
        """Take what another observer of the same kind has seen as seen here, too."""
        with self._lock:
            self.tokens += other.tokens
            self.finite &= other.finite
            for measured, batch in other._merged():
                self._merge(measured, batch)

    @abstractmethod
    def _measure(self, x: Tensor) -> Any:
        """A small summary of [tokens, k], on the CPU; runs outside of the lock."""

    @abstractmethod
    def _sound(self, measured: Any) -> bool:
        """Whether what was summed up had neither NaN nor Inf."""

    @abstractmethod
    def _merge(self, measured: Any, batch: int) -> None:
        """Add a summary."""

    @abstractmethod
    def _merged(self) -> Iterator[tuple[Any, int]]:
        """All that was added, as (summary, batch)."""

    @abstractmethod
    def stats(self) -> Stats:
        """What was measured. Zeros where nothing was seen."""


class MinMax(Observer):
    """The extremes, and the range to represent, which is as wide. Both include 0."""

    def __init__(self) -> None:
        super().__init__()
        self._low = self._high = 0.0

    def _measure(self, x: Tensor) -> tuple[float, float]:
        low, high = x.aminmax()  # NaN comes through
        return float(low), float(high)

    def _sound(self, measured: tuple[float, float]) -> bool:
        return all(map(math.isfinite, measured))

    def _merge(self, measured: tuple[float, float], batch: int) -> None:
        self._low, self._high = min(self._low, measured[0]), max(self._high, measured[1])

    def _merged(self) -> Iterator[tuple[tuple[float, float], int]]:
        yield (self._low, self._high), 0

    def extremes(self) -> tuple[float, float]:
        """Lowest and highest of all that was seen and 0."""
        return self._low, self._high

    def range(self) -> tuple[float, float]:
        """Lowest <= 0 and highest >= 0 value to represent."""
        return self.extremes()

    def stats(self) -> Stats:
        """input_min and input_max, the extremes: float32 [1]."""
        low, high = self.extremes()
        return {"input_min": torch.tensor([low]), "input_max": torch.tensor([high])}


class MovingAverage(MinMax):
    """Extremes of each batch, averaged exponentially in the order of the data; the first begins."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self._momentum = momentum
        self._batches: dict[int, tuple[float, float]] = {}

    def _merge(self, measured: tuple[float, float], batch: int) -> None:
        super()._merge(measured, batch)
        low, high = self._batches.get(batch, (0.0, 0.0))
        self._batches[batch] = min(low, measured[0]), max(high, measured[1])

    def _merged(self) -> Iterator[tuple[tuple[float, float], int]]:
        return ((measured, batch) for batch, measured in self._batches.items())

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
        self._counts = np.zeros(_PATTERNS, dtype=np.int64)  # by bit pattern
        self._dtype: torch.dtype | None = None

    def _measure(self, x: Tensor) -> tuple[np.ndarray, torch.dtype]:
        dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
        if x.device.type != "cpu":
            patterns = x.to(dtype).contiguous().view(torch.int16).flatten().int() & (_PATTERNS - 1)
            return torch.bincount(patterns, minlength=_PATTERNS).cpu().numpy(), dtype
        counts = np.zeros(_PATTERNS, dtype=np.int64)
        for rows in _blocks(x):
            numbers = rows.to(dtype).contiguous().view(torch.int16).numpy()
            counts += np.bincount(numbers.view(np.uint16).ravel(), minlength=_PATTERNS)
        return counts, dtype

    def _sound(self, measured: tuple[np.ndarray, torch.dtype]) -> bool:
        counts, dtype = measured
        infinity = int(torch.tensor(math.inf, dtype=dtype).view(torch.int16))
        # Without its sign, a float orders like the integer it is stored as; NaN stands above Inf.
        return not counts.reshape(2, -1)[:, infinity:].any()

    def _merge(self, measured: tuple[np.ndarray, torch.dtype], batch: int) -> None:
        counts, dtype = measured
        assert self._dtype in {None, dtype}, "the dtype of a module's inputs has changed"
        self._counts += counts
        self._dtype = dtype

    def _merged(self) -> Iterator[tuple[tuple[np.ndarray, torch.dtype], int]]:
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


class ChannelAmax(Observer):
    """max |x| of each channel: `channel_amax` float32 [k]."""

    def __init__(self) -> None:
        super().__init__()
        self._amax = torch.zeros(1)

    def _measure(self, x: Tensor) -> Tensor:
        blocks = _blocks(x) if x.device.type == "cpu" else [x]
        return torch.cat([rounding.absmax(rows, dim=0) for rows in blocks]).amax(0).cpu()

    def _sound(self, measured: Tensor) -> bool:
        return bool(torch.isfinite(measured).all())

    def _merge(self, measured: Tensor, batch: int) -> None:
        self._amax = torch.maximum(self._amax, measured)

    def _merged(self) -> Iterator[tuple[Tensor, int]]:
        yield self._amax, 0

    def stats(self) -> Stats:
        """channel_amax, float32 [k]."""
        return {"channel_amax": self._amax}


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """[tokens, k] in runs of rows."""
    step = max(1, _BLOCK // max(1, x.shape[1]))
    return (x[start : start + step] for start in range(0, len(x), step))
