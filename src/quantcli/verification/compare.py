"""How near each quantized weight is to its original, streamed by row blocks; bounds for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.core.number_types import ELEMENTS
from quantcli.core.numerics import Operand
from quantcli.targets.layouts import StoredModule
from quantcli.targets.module_rows import ModuleReader
from quantcli.verification.outcome import ChannelReport, Histogram, ModuleReport, RowReport

BLOCK_ELEMENTS = 128 * 1024  # float32 blocks of 512 KB: a dozen of them stay in the cache of a core
UNLIKE = 3.0  # dB: a lower SQNR is not an error of rounding
_SAMPLED = 8  # every eighth block goes into the histogram and the channels' rms
_BINS = 32
_REACH = 4.0  # the histogram's ends, in mean errors
_LEAST_SUM = 2.0**-100  # of squares in float32, of which none that counts has vanished
_WORST = 5  # rows, and channels, that are named
_NEGLIGIBLE = 2.0**-40  # of the energy of a row: below float32's own rounding
_OUTLIER = 4.0  # times the median channel

Weight: TypeAlias = StoredTensor | StoredModule
Open: TypeAlias = Callable[[], AbstractContextManager[Rows]]


@dataclass(frozen=True)
class Bounds:
    """The least that a sound conversion of any weight keeps, whatever the model.

    sqnr_db: SQNR of the whole weight; normal numbers have 40 with int8, 31 with fp8, 14 with int4.
    row_db:  SQNR of the worst row. Rounding to nearest leaves no row with more error than signal, and
             eight bits leave one outlier among 16,000 numbers of half a step about 7; zeroed, swapped
             and negated rows have 0, -3 and -6.
    largest: error of one number over the largest of its weight: rounding leaves 0.004, 0.04 and 0.09,
             numbers that compensate for others a few times as much, a flipped sign 1 to 2. Unlimited
             for int4, whose best scale may clip an outlier of a row to an eighth.
    """

    sqnr_db: float
    row_db: float = -math.inf
    largest: float = math.inf

    def damage(self, report: ModuleReport | Comparison) -> str | None:
        """The row or number that is off by more than rounding; None if there is none."""
        row_db = report.worst_rows[0].sqnr_db if report.worst_rows else math.inf
        if row_db < self.row_db:
            return f"SQNR of a row is {row_db:.2f} dB, the limit {self.row_db:.2f} dB"
        if report.max_rel_error > self.largest:
            return (
                f"a weight is off by {report.max_rel_error:.2f} of the largest one, the limit is "
                f"{self.largest:.2f}"
            )
        return None

    def fault(self, report: ModuleReport) -> str | None:
        """The fault of a weight as a whole, of one row, or of one number; None if it is sound."""
        if report.margin_db < 0:
            return f"SQNR is {report.sqnr_db:.2f} dB, the limit {report.limit_db:.2f} dB"
        return self.damage(report)


FLOAT_BOUNDS = Bounds(60.0)


def bounds_of(operand: Operand) -> Bounds:
    """The bounds of a quantized weight, by the types of its codes and scales."""
    element, scale = operand.element, operand.scale_type
    loss, row_loss = (scale.sqnr_db, scale.row_db) if scale else (0.0, 0.0)
    return Bounds(element.sqnr_db - loss, element.row_db - row_loss, element.error)


# The least `sqnr_db` of all types; that of fp4 with powers of two as scales is the same.
LOOSEST = min(element.sqnr_db for element in ELEMENTS.values())


def opener(weight: Weight) -> Open:
    """The function that opens a float tensor or a quantized module to read its rows."""
    return partial(ModuleReader, weight) if isinstance(weight, StoredModule) else weight.open


@dataclass(frozen=True)
class Pair:
    """A weight [n, k] of the other model, and the same weight of the checkpoint."""

    reference: Open
    ours: Open
    n: int
    k: int

    @classmethod
    def of(cls, reference: Weight, ours: Weight) -> Pair:
        """Two stored weights of one shape."""
        n, k = shape_of(ours)
        return cls(opener(reference), opener(ours), n, k)

    def first(self) -> tuple[Tensor, Tensor]:
        """The first row block of both."""
        with self.reference() as before, self.ours() as after:
            count = rows_of(self.k)
            return before.weight(0, count).float(), after.weight(0, count).float()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Row blocks of both: float32 [rows, k]."""
        count = rows_of(self.k)
        with self.reference() as before, self.ours() as after:
            for start in range(0, self.n, count):
                yield before.weight(start, count).float(), after.weight(start, count).float()


def rows_of(k: int) -> int:
    """Rows of a block: a multiple of 8, see ModuleReader."""
    return max(8, BLOCK_ELEMENTS // max(1, k) // 8 * 8)


def shape_of(weight: Weight) -> tuple[int, ...]:
    """The shape of a stored weight: [n, k] if it is quantized."""
    return weight.shape if isinstance(weight, StoredModule) else weight.spec.shape


@dataclass(frozen=True)
class FittedFactors:
    """Factors of a weight before it was quantized: rows [n], columns [k], float32."""

    rows: Tensor
    columns: Tensor

    @property
    def trivial(self) -> bool:
        """Whether all factors are 1."""
        return bool((self.rows == 1).all()) and bool((self.columns == 1).all())


@dataclass
class Comparison:
    """Sums over a weight w of the other model and the same weight d of the checkpoint, in float64."""

    signal: Tensor  # sum of w^2 of each row
    noise: Tensor  # sum of (d - w)^2 of each row
    channels: Tensor  # sum of w^2 of each column, over some rows
    energy: float = 0.0  # sum of d^2
    largest: float = 0.0  # max |d - w|
    amax: float = 0.0  # max |w|
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))

    @property
    def sqnr_db(self) -> float:
        """10 log10 of signal over noise; 200 without noise."""
        return _decibels(float(self.signal.sum()), float(self.noise.sum()))

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
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

    @property
    def max_rel_error(self) -> float:
        """max |d - w| over max |w|; JSON has no infinity."""
        ratio = self.largest / self.amax if self.amax else 0.0
        return ratio if math.isfinite(ratio) else 1e30

    @property
    def worst_rows(self) -> list[RowReport]:
        """The rows with the lowest SQNR, worst first."""
        ratio = torch.where(self.signal > 0, self.noise / self.signal, self.noise * math.inf)
        ratio = ratio.nan_to_num(0.0, posinf=math.inf)
        ratio[self.noise <= _NEGLIGIBLE * self.signal.mean()] = 0
        rows = ratio.topk(min(_WORST, len(ratio))).indices.tolist()
        scores = sorted((_decibels(float(self.signal[i]), float(self.noise[i])), i) for i in rows)
        return [RowReport(row, round(sqnr, 3)) for sqnr, row in scores]

    @property
    def outlier_channels(self) -> list[ChannelReport]:
        """The columns with the largest rms, if they are far above the median column."""
        rms = self.channels.sqrt()
        median = float(rms[rms > 0].median()) if bool((rms > 0).any()) else 0.0
        ratios = rms / median if median else rms
        top = zip(*ratios.topk(min(_WORST, len(ratios))), strict=True)
        return [
            ChannelReport(int(channel), round(float(ratio), 3))
            for ratio, channel in top
            if float(ratio) >= _OUTLIER
        ]

    @property
    def histogram(self) -> Histogram:
        """Errors in some rows, over the row's mean error."""
        edges = torch.linspace(-_REACH, _REACH, _BINS + 1).tolist()
        return Histogram(edges, self.counts.tolist())


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return 200.0
    if not signal or not math.isfinite(noise):
        return -200.0
    return max(-200.0, min(200.0, 10 * math.log10(signal / noise)))


def _squares(values: Tensor, dim: int) -> Tensor:
    """Sums of squares along a dimension of a float32 matrix, float64.

    In float32 squares overflow from 2^64 on, and vanish below 2^-75: such sums are taken again.
    """
    sums: Tensor = torch.linalg.vecdot(values, values, dim=dim).double()
    odd = ~((sums > _LEAST_SUM) & torch.isfinite(sums))
    if bool(odd.any()):
        some = values[odd] if dim == 1 else values[:, odd]
        sums[odd] = some.double().square_().sum(dim)
    return sums


def compare(pair: Pair, factors: FittedFactors | None = None) -> Comparison:
    """Compare two weights block by block; `factors` are applied to the reference first.

    Memory: a few blocks of BLOCK_ELEMENTS.
    """
    zeros = partial(torch.zeros, dtype=torch.float64)
    sums = Comparison(signal=zeros(pair.n), noise=zeros(pair.n), channels=zeros(pair.k))
    start = 0
    for number, (w, d) in enumerate(pair):
        stop = start + len(w)
        if factors is not None:
            w *= factors.rows[start:stop].unsqueeze(1)
            w *= factors.columns
        sums.energy += float(_squares(d, 1).sum())
        d -= w
        noise = _squares(d, 1)
        sums.signal[start:stop] = _squares(w, 1)
        sums.noise[start:stop] = noise
        low, high = d.aminmax()
        sums.largest = max(sums.largest, -float(low), float(high))
        low, high = w.aminmax()
        sums.amax = max(sums.amax, -float(low), float(high))
        if number % _SAMPLED == 0:
            sums.channels += _squares(w, 0)
            rms = (noise / pair.k).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
            d /= rms.float().unsqueeze(1)
            sums.counts += torch.histc(d, _BINS, -_REACH, _REACH).long()
        start = stop
    return sums
