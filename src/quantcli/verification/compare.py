"""How near each quantized weight is to the one it was made from, streamed by blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.targets.layouts import StoredModule
from quantcli.targets.module_rows import ModuleReader

BLOCK_ELEMENTS = 128 * 1024  # float32 blocks of 512 KB: a dozen of them stay in the cache of a core
_SAMPLED = 8  # every eighth block goes into the histogram and the channels' rms
_BINS = 32
_REACH = 4.0  # the histogram's ends, in mean errors
WORST = 5  # rows, and channels, that are named


Open = Callable[[], AbstractContextManager[Rows]]


def opener(source: StoredTensor | StoredModule) -> Open:
    """What opens a float tensor or a quantized module for reading by rows."""
    if isinstance(source, StoredModule):
        return lambda: ModuleReader(source)
    return source.open


@dataclass(frozen=True)
class FittedFactors:
    """By what a weight was multiplied before it was quantized: rows [n], columns [k], float32."""

    rows: Tensor
    columns: Tensor

    @property
    def trivial(self) -> bool:
        """Whether nothing was."""
        return bool((self.rows == 1).all()) and bool((self.columns == 1).all())


@dataclass
class Comparison:
    """Sums over a weight w and what it has become, d: float64."""

    n: int
    k: int
    signal: Tensor  # sum of w^2 of each row
    noise: Tensor  # sum of (d - w)^2 of each row
    energy: float = 0.0  # sum of d^2
    largest: float = 0.0  # max |d - w|
    amax: float = 0.0  # max |w|
    histogram: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    channels: Tensor = field(default_factory=lambda: torch.zeros(0))  # sum of w^2 of some rows

    @property
    def sqnr_db(self) -> float:
        """10 log10 of signal over noise; 200 where there is no noise."""
        return _decibels(float(self.signal.sum()), float(self.noise.sum()))

    @property
    def finite(self) -> bool:
        """Whether all that was summed up is."""
        return math.isfinite(self.energy) and bool(torch.isfinite(self.noise).all())

    @property
    def cosine(self) -> float:
        """Cosine of the angle between w and d."""
        if not self.finite:
            return 0.0
        signal, noise = float(self.signal.sum()), float(self.noise.sum())
        product = (signal + self.energy - noise) / 2
        length = math.sqrt(signal * self.energy)
        return min(1.0, product / length) if length else float(signal == self.energy)

    def to_json(self) -> dict[str, Any]:
        """As the report has it."""
        rows = [(_decibels(float(s), float(e)), i) for i, (s, e) in self._worst()]
        rms = self.channels.sqrt()
        median = float(rms[rms > 0].median()) if bool((rms > 0).any()) else 0.0
        ratios = rms / median if median else rms
        top = ratios.topk(min(WORST, len(ratios)))
        outliers = [
            {"channel": int(channel), "ratio": round(float(ratio), 3)}
            for ratio, channel in zip(*top, strict=True)
            if float(ratio) >= _OUTLIER
        ]
        edges = torch.linspace(-_REACH, _REACH, _BINS + 1).tolist()
        return {
            "shape": [self.n, self.k],
            "sqnr_db": round(self.sqnr_db, 3),
            "cosine": round(self.cosine, 8),
            "max_rel_error": round(self._relative(), 8),
            "worst_rows": [{"row": i, "sqnr_db": round(db, 3)} for db, i in sorted(rows)[:WORST]],
            "outlier_channels": outliers,
            "histogram": {"edges": edges, "counts": self.histogram.tolist()},
        }

    def _relative(self) -> float:
        """max |d - w| over max |w|; JSON knows no infinity."""
        ratio = self.largest / self.amax if self.amax else 0.0
        return ratio if math.isfinite(ratio) else 1e30

    def _worst(self) -> Iterator[tuple[int, tuple[float, float]]]:
        ratio = torch.where(self.signal > 0, self.noise / self.signal, self.noise * math.inf)
        ratio = ratio.nan_to_num(0.0, posinf=math.inf)
        ratio[self.noise <= _NOTHING * self.signal.mean()] = 0  # rows of next to nothing
        for i in ratio.topk(min(WORST, self.n)).indices.tolist():
            yield i, (float(self.signal[i]), float(self.noise[i]))


_NOTHING = 2.0**-40  # of the energy of a row: below float32's own rounding
_OUTLIER = 4.0  # times the median channel


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return 200.0
    if not signal or not math.isfinite(noise):
        return -200.0
    return max(-200.0, min(200.0, 10 * math.log10(signal / noise)))


def compare(
    reference: Open, other: Open, n: int, k: int, factors: FittedFactors | None = None
) -> Comparison:
    """Compare [n, k] weights block by block; `factors` are applied to the reference first.

    Memory: a few blocks of BLOCK_ELEMENTS. The histogram is of errors over the row's mean error.
    """
    found = Comparison(n, k, torch.zeros(n).double(), torch.zeros(n).double())
    found.channels = torch.zeros(k, dtype=torch.float64)
    with reference() as before, other() as after:
        for number, start in enumerate(blocks(n, k)):
            count = rows_of(k)
            w, d = before.weight(start, count).float(), after.weight(start, count).float()
            if factors is not None:
                w *= factors.rows[start : start + count].unsqueeze(1)
                w *= factors.columns
            stop = start + len(w)
            d_energy = torch.linalg.vecdot(d, d)
            found.energy += float(d_energy.double().sum())
            d -= w
            noise = torch.linalg.vecdot(d, d)
            found.signal[start:stop] = torch.linalg.vecdot(w, w).double()
            found.noise[start:stop] = noise.double()
            low, high = d.aminmax()
            found.largest = max(found.largest, -float(low), float(high))
            low, high = w.aminmax()
            found.amax = max(found.amax, -float(low), float(high))
            if number % _SAMPLED == 0:
                found.channels += torch.linalg.vecdot(w, w, dim=0).double()
                d /= (noise / k).sqrt_().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
                found.histogram += torch.histc(d, _BINS, -_REACH, _REACH).long()
    return found


def rows_of(k: int) -> int:
    """Rows of a block: a multiple of 8, see ModuleReader."""
    return max(8, BLOCK_ELEMENTS // max(1, k) // 8 * 8)


def blocks(n: int, k: int) -> range:
    """Where blocks begin."""
    return range(0, n, rows_of(k))
