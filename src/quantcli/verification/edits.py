"""Weights that were multiplied before they were quantized (smoothing, per-channel scales of a
transform): the factors, and whether the model's function survived them.

If a norm is divided by s, the columns of its readers must be multiplied by s; if rows of a matrix are,
the columns of a reader next to it. No table of architectures is used: candidates are the vectors of the
same layer that changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.core.findings import Finding, failed
from quantcli.verification.compare import FittedFactors, Pair
from quantcli.verification.outcome import CONVERT

_NEAR_POWER = 0.12  # octaves: an estimate this near to a power of two is taken for it
_NEARLY, _MOST = 0.4, 0.8  # octaves between estimates of one factor, and the share that must be so near
_NEARLY_ALL = 0.98  # of rows or columns
_WITHIN = 5.0  # standard deviations of an estimate: what is nearer is the same
_CLOSE = 0.02  # relative: factors that are the same
_AS_GOOD = 1.5  # times the least error: an explanation that is not worse
_BEST = 1.02  # times the least error: an explanation that no other one beats
_NEGLIGIBLE = 1e-9  # of the energy: an error of float32


@dataclass(frozen=True)
class Candidate:
    """Factors that columns may have been multiplied with, and the tensor that was divided by them."""

    producer: str
    columns: Tensor  # float32 [k]


def candidates(changed: Mapping[str, tuple[Tensor, Tensor]]) -> list[Candidate]:
    """Candidates from the vectors of a layer that changed: before and after [k], by name.

    Norms multiply by their weight, or by one plus it, as in Gemma.
    """
    options = []
    for name, (before, after) in changed.items():
        for offset in (0.0, 1.0):
            old, new = before.float() + offset, after.float() + offset
            sound = (old != 0) & (new != 0) & torch.isfinite(old / new)
            columns = torch.where(sound, old / new, 1.0)
            if bool((columns > 0).all()):
                options.append(Candidate(name, columns))
    return options


def choose(siblings: Sequence[Pair], norms: Sequence[Candidate]) -> Candidate | None:
    """The column factors [k] that explain weights that read one tensor: ones, or those of a candidate.

    None if an estimate explains them better. Decided by the first row block. A factor that is the same
    for all columns could be one of rows as well: then the choice that leaves the rows of some sibling
    unchanged wins, and a candidate wins over ones.
    """
    k = siblings[0].k
    options = [Candidate("", torch.ones(k)), *(c for c in norms if len(c.columns) == k)]
    left, size = torch.zeros(len(options)), torch.full((len(options),), torch.inf)
    estimated = 0.0
    for pair in siblings:
        first = pair.first()
        estimated = max(estimated, _explained(*first, _columns([first], k))[0])
        for place, option in enumerate(options):
            rest, octaves = _explained(*first, option.columns)
            left[place] = max(float(left[place]), rest)
            size[place] = min(float(size[place]), octaves)
    if float(left.min()) > _AS_GOOD * estimated + _NEGLIGIBLE:
        return None
    least = left.min()
    fair = [i for i in range(len(options)) if left[i] <= _AS_GOOD * least + _NEGLIGIBLE]
    # under the noise of 4 bits others explain nearly as much, but none does as well
    best = {i for i in fair if left[i] <= _BEST * least + _NEGLIGIBLE}

    def rank(i: int) -> tuple[int, bool, bool, float]:
        return round(float(size[i])), i not in best, i == 0, float(size[i])

    return options[min(fair, key=rank)]


def fit(pair: Pair, columns: Candidate | None) -> FittedFactors:
    """Row factors, rounded to powers of two if they are near them, and column factors: the given ones,
    or estimates from all rows.

    A row's factor is estimated from k rounded numbers: if they are few and have 4 bits, it is off by
    several percent. Its own deviation counts, but not more than twice the median one: a damaged row
    does not excuse itself.
    """
    chosen = _columns(pair, pair.k) if columns is None else columns.columns
    rows, deviations = [], []
    for w, d in pair:
        w *= chosen
        ww = torch.linalg.vecdot(w, w)
        factors = torch.where(ww > 0, torch.linalg.vecdot(w, d) / ww, 1.0)
        rest = torch.linalg.vecdot(d, d) - factors.square() * ww
        deviations.append(torch.where(ww > 0, rest.clamp_min(0) / (ww * max(1, pair.k - 1)), 0.0))
        rows.append(factors)
    noise = torch.cat(deviations).sqrt()
    noise = noise.clamp_max(2 * float(noise.median()))
    return FittedFactors(_snap(torch.cat(rows), noise), chosen)


def _explained(w: Tensor, d: Tensor, columns: Tensor) -> tuple[float, float]:
    """Share of the energy that the best row factors leave unexplained, and their median in octaves."""
    w = w * columns
    ww = torch.linalg.vecdot(w, w)
    wd, dd = torch.linalg.vecdot(w, d), torch.linalg.vecdot(d, d)
    rest = dd - torch.where(ww > 0, wd.square() / ww, 0)
    factor = torch.where((ww > 0) & (wd > 0), wd / ww, 1.0)
    return float(rest.clamp_min(0).sum() / dd.sum().clamp_min(1e-30)), abs(
        float(factor.log2().median())
    )


def _columns(blocks: Iterable[tuple[Tensor, Tensor]], k: int) -> Tensor:
    """Column factors by least squares over row blocks (w, d), which are read twice.

    Each row is weighted by its own factor: in the first pass the ratio of its lengths, then a fit. All
    rows count alike: a few with huge weights would draw the columns of these to their own factor. The
    factors are scaled so that the median row factor is 1.
    """
    columns = torch.ones(k)
    for first in (True, False):
        product, square, ratios = torch.zeros(k).double(), torch.zeros(k).double(), []
        for w, d in blocks:
            scaled = w * columns
            ww = torch.linalg.vecdot(scaled, scaled)
            ratio = torch.linalg.vecdot(d if first else scaled, d) / ww
            row = _nearly_one(torch.where(ww > 0, ratio.sqrt() if first else ratio, 1.0))
            ratios.append(row)
            w = w * row.unsqueeze(1)
            energy = torch.linalg.vecdot(w, w).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
            product += (w * d / energy).sum(0).double()
            square += (w.square() / energy).sum(0).double()
        columns = torch.where(square > 0, product / square, 1.0).float()
        if not bool((columns > 0).any()):
            return torch.ones(k)
    return _snap(columns * torch.cat(ratios).median())


def _nearly_one(rows: Tensor) -> Tensor:
    """The median for all rows if nearly all have it: a row whose only large weight is in one column has
    taken the factor of that column for its own."""
    median = rows.median()
    near = (rows / median).log2().abs() < _NEAR_POWER
    return median.expand_as(rows) if float(near.float().mean()) > _NEARLY_ALL else rows


def _snap(factors: Tensor, noise: Tensor | None = None) -> Tensor:
    """Powers of two if nearly all factors are near them; else the factors.

    noise: standard deviations of estimates near 1.

    What was divided so much that all codes are 0 has no estimate: it takes the smallest of the rest.
    """
    usable = torch.isfinite(factors) & (factors > 0)
    factors = torch.where(usable, factors, factors[usable].min() if bool(usable.any()) else 1.0)
    octaves = factors.log2()
    noise = torch.zeros_like(octaves) if noise is None else noise
    limits = (1 + _WITHIN * noise).log2().clamp_min(_NEAR_POWER)
    near = (octaves - octaves.round()).abs() < limits
    if float(near.float().mean()) > _NEARLY_ALL:
        return octaves.round().exp2()
    return factors


@dataclass(frozen=True)
class Edited:
    """A multiplied matrix of a layer, and the tensor that was divided by its column factors."""

    module: str
    factors: FittedFactors
    producer: str | None


def check_layer(
    changed: Sequence[str], matrices: Sequence[Edited], fused_names: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Findings for one layer: a division must be compensated by a multiplication, equal for siblings.

    changed: weights of norms that were edited. fused_names: fused name of each matrix, or None.
    """
    used = {matrix.producer for matrix in matrices if matrix.producer}
    for name in changed:
        if name not in used:
            what = "changed, but no matrix that reads it changed with it"
            yield failed("edits", what, f"`{name}`", CONVERT)
    readers = [m for m in matrices if bool((m.factors.columns != 1).any())]
    explained = {reader.module for reader in readers if reader.producer}
    open_rows, answering = [], set()
    for matrix in matrices:
        if bool((matrix.factors.rows == 1).all()):
            continue
        answers = answers_of(matrix, matrices)
        answering |= answers
        if not answers:
            open_rows.append(matrix.module)
    for module in open_rows:
        if module not in answering:  # else its one factor is that of its columns
            what = "its rows were multiplied, but the columns of no reader compensate for it"
            yield failed("edits", what, f"`{module}`", CONVERT)
    for reader in readers:
        if reader.module not in explained | answering:
            what = "its columns were multiplied, but nothing that they read is divided"
            yield failed("edits", what, f"`{reader.module}`", CONVERT)
    first: dict[str, Edited] = {}
    for matrix in matrices:
        fused = fused_names.get(matrix.module)
        leader = matrix if fused is None else first.setdefault(fused, matrix)
        if not _same(leader.factors.columns, matrix.factors.columns):
            what = f"its columns were multiplied, but not like those of its sibling `{leader.module}`"
            yield failed("edits", what, f"`{matrix.module}`", CONVERT)


def block_of(module: str) -> str:
    """The module that a matrix and its readers are in. BERT has values in `attention.self`, and their
    reader in `attention.output`; Moshi has `v_proj.linear` and `o_proj.linear`."""
    return module.removesuffix(".linear").rpartition(".")[0].removesuffix(".self")


def answers_of(matrix: Edited, matrices: Sequence[Edited]) -> set[str]:
    """Names of the matrices next to a matrix whose columns undo the factors of its rows."""
    block = block_of(matrix.module)
    neighbours = [m for m in matrices if m.module.startswith(f"{block}.") and m is not matrix]
    return {m.module for m in neighbours if _answers(matrix.factors.rows, _read_by(m.factors))}


def hidden_columns(pair: Pair, rows: Tensor) -> Tensor | None:
    """Column factors [k] that undo row factors [n], of so few columns that no fit sees them under the
    noise of 4 bits; None if the weight does not have them.

    Each row has one column, or k / n of them, a head's rows together. Decided by these columns alone.
    """
    n, k = len(rows), pair.k
    if k % n:
        return None
    heads = [n] if k == n else [size for size in range(1, n + 1) if n % size == 0]
    options = [(1 / rows).view(-1, 1, size).expand(-1, k // n, -1).reshape(-1) for size in heads]
    noise = torch.zeros(len(options), 2).double()
    for w, d in pair:
        for place, columns in enumerate(options):
            some = columns != 1
            w_some, d_some = w[:, some], d[:, some]
            noise[place, 0] += (d_some - w_some * columns[some]).square().sum().double()
            noise[place, 1] += (d_some - w_some).square().sum().double()
    best = int((noise[:, 0] / noise[:, 1].clamp_min(1e-30)).argmin())
    return options[best] if float(noise[best, 0]) < float(noise[best, 1]) / 2 else None


def text_of(factors: FittedFactors) -> str:
    """The rows and columns that were multiplied, and the range of their factors."""
    texts = []
    for axis, values in (("rows", factors.rows), ("columns", factors.columns)):
        some = values[values != 1]
        if len(some):
            texts.append(f"{len(some)} {axis} x {float(some.min()):.4g}..{float(some.max()):.4g}")
    return ", ".join(texts)


def _read_by(factors: FittedFactors) -> Tensor:
    """Factors of a matrix's inputs [k]. If all rows have one factor and all columns another, only their
    product is known: it may be that of the columns."""
    rows, columns = factors.rows, factors.columns
    alike = _same(columns, columns[:1]) and _same(rows, rows[:1])
    return columns * rows[0] if alike else columns


def _answers(rows: Tensor, columns: Tensor) -> bool:
    """Whether column factors undo row factors: one to one, one row for several columns (grouped heads),
    or for a part of the rows (v of a stored q, k, v)."""
    expected = 1 / rows
    if len(expected) == len(columns):
        # columns are estimates, from few steps of a code if they are small
        some = (expected != 1) | (columns != 1)
        octaves = (expected / columns).log2().abs()[some]
        return not len(octaves) or float((octaves < _NEARLY).float().mean()) > _MOST
    some, others = expected[expected != 1].sort().values, columns[columns != 1].sort().values
    if not len(some) or not len(others) or len(others) % len(some):
        return False
    return _same(some.repeat_interleave(len(others) // len(some)), others)


def _same(a: Tensor, b: Tensor) -> bool:
    fits = a.shape == b.shape or len(b) == 1
    return fits and bool(((a / b - 1).abs() < _CLOSE).all())
