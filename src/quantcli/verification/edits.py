"""Weights that were multiplied before they were quantized (smoothing, per-channel scales of a
transform): by what, and whether the model's function survived it.

A norm divided by s must have readers whose columns are multiplied by s; rows of a matrix divided by s,
a reader next to it with columns multiplied by s. Nothing is known of architectures: candidates are what
has changed in the same layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantcli.core.findings import Finding, failed
from quantcli.verification.compare import FittedFactors, Open, blocks, rows_of

_NEAR_POWER = 0.12  # of an octave: how far an estimate may be from a power of two and be taken for it
_NEARLY, _MOST = 0.4, 0.8  # octaves between estimates of one factor, and for how many of them
_CLOSE = 0.02  # relative: factors that are the same
_AS_GOOD = 1.5  # times the least error: what explains no worse
_BEST = 1.02  # times the least error: what nothing else explains better
_NOTHING = 1e-9  # of the energy: an error of float32
_AGAIN = "convert the model again"


@dataclass(frozen=True)
class Candidate:
    """Columns by which a matrix may have been multiplied, and the tensor that was divided by them."""

    producer: str
    columns: Tensor  # float32 [k]


def candidates(changed: Mapping[str, tuple[Tensor, Tensor]]) -> list[Candidate]:
    """From vectors of a layer that have changed, by name: before, after [k]. Norms multiply by their
    weight, or by one plus it, as in Gemma."""
    found = []
    for name, (before, after) in changed.items():
        for offset in (0.0, 1.0):
            old, new = before.float() + offset, after.float() + offset
            sound = (old != 0) & (new != 0) & torch.isfinite(old / new)
            columns = torch.where(sound, old / new, 1.0)
            if bool((columns > 0).all()):
                found.append(Candidate(name, columns))
    return found


Pair = tuple[Open, Open]  # a weight of the other model, and what has become of it


def choose(siblings: Sequence[Pair], k: int, known_edits: Sequence[Candidate]) -> Candidate | None:
    """The columns [k] that explain weights that read one tensor: none, or those of a candidate. None
    where an estimate explains them better.

    Told from the first rows. A factor that is the same for all columns could be one of rows as well:
    then what leaves the rows of some sibling as they were is taken, and a candidate before none.
    """
    options = [Candidate("", torch.ones(k)), *(c for c in known_edits if len(c.columns) == k)]
    left, size = torch.zeros(len(options)), torch.full((len(options),), torch.inf)
    estimated = 0.0
    for reference, quantized in siblings:
        with reference() as before, quantized() as after:
            w, d = before.weight(0, rows_of(k)).float(), after.weight(0, rows_of(k)).float()
        estimated = max(estimated, _explained(w, d, _columns(partial(_one, w, d), k))[0])
        for place, option in enumerate(options):
            rest, octaves = _explained(w, d, option.columns)
            left[place] = max(float(left[place]), rest)
            size[place] = min(float(size[place]), octaves)
    if float(left.min()) > _AS_GOOD * estimated + _NOTHING:
        return None
    least = left.min()
    fair = [i for i in range(len(options)) if left[i] <= _AS_GOOD * least + _NOTHING]
    # under the noise of 4 bits others explain nearly as much, but none does as well
    best = {i for i in fair if left[i] <= _BEST * least + _NOTHING}

    def rank(i: int) -> tuple[int, bool, bool, float]:
        return round(float(size[i])), i not in best, i == 0, float(size[i])

    return options[min(fair, key=rank)]


def fit(pair: Pair, n: int, k: int, columns: Candidate | None) -> FittedFactors:
    """Row factors, snapped to powers of two where they are near them, beside column factors: those
    given, else estimated from all rows."""
    chosen = _columns(partial(_read, pair, n, k), k) if columns is None else columns.columns
    rows = []
    for w, d in _read(pair, n, k):
        w *= chosen
        ww = torch.linalg.vecdot(w, w)
        rows.append(torch.where(ww > 0, torch.linalg.vecdot(w, d) / ww, 1.0))
    return FittedFactors(_snap(torch.cat(rows)), chosen)


def _explained(w: Tensor, d: Tensor, columns: Tensor) -> tuple[float, float]:
    """Share of the energy that the best row factors leave, and the middle of their octaves."""
    w = w * columns
    ww = torch.linalg.vecdot(w, w)
    wd, dd = torch.linalg.vecdot(w, d), torch.linalg.vecdot(d, d)
    rest = dd - torch.where(ww > 0, wd.square() / ww, 0)
    factor = torch.where((ww > 0) & (wd > 0), wd / ww, 1.0)
    return float(rest.clamp_min(0).sum() / dd.sum().clamp_min(1e-30)), abs(
        float(factor.log2().median())
    )


def _columns(read: Callable[[], Iterable[tuple[Tensor, Tensor]]], k: int) -> Tensor:
    """Column factors by least squares over blocks of rows (w, d): each row weighted by its own factor,
    at first that of its length. The middle of row factors is 1."""
    columns = torch.ones(k)
    for first in (True, False):
        product, square, ratios = torch.zeros(k).double(), torch.zeros(k).double(), []
        for w, d in read():
            scaled = w * columns
            ww = torch.linalg.vecdot(scaled, scaled)
            row = (
                (torch.linalg.vecdot(d, d) / ww).sqrt()
                if first
                else torch.linalg.vecdot(scaled, d) / ww
            )
            row = torch.where(ww > 0, row, 1.0)
            ratios.append(row)
            w = w * row.unsqueeze(1)
            product += (w * d).sum(0).double()
            square += w.square().sum(0).double()
        columns = torch.where(square > 0, product / square, 1.0).float()
        if not bool((columns > 0).any()):
            return torch.ones(k)
    return _snap(columns * torch.cat(ratios).median())


def _one(w: Tensor, d: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(w, d)]


def _read(pair: Pair, n: int, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    with pair[0]() as before, pair[1]() as after:
        for start in blocks(n, k):
            w, d = before.weight(start, rows_of(k)), after.weight(start, rows_of(k))
            yield w.float(), d.float()


def _snap(factors: Tensor) -> Tensor:
    """Powers of two where all but noise is near them; else as they are, or 1 where all are nearly 1."""
    factors = torch.where(torch.isfinite(factors) & (factors > 0), factors, 1.0)
    octaves = factors.log2()
    near = (octaves - octaves.round()).abs() < _NEAR_POWER
    if float(near.float().mean()) > 0.98:
        return octaves.round().exp2()
    return factors


@dataclass(frozen=True)
class Edited:
    """What was found of one matrix of a layer."""

    module: str
    factors: FittedFactors
    producer: str | None


def check_layer(
    changed: Sequence[str], matrices: Sequence[Edited], fused_names: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Findings for one layer: what is divided must be multiplied, and siblings alike.

    changed: vectors that were edited. fused_names: fused name of a module and its siblings, or None.
    """
    used = {matrix.producer for matrix in matrices if matrix.producer}
    readers = [m for m in matrices if bool((m.factors.columns != 1).any())]
    for name in changed:
        if name.endswith(".weight") and name not in used:
            what = "has changed, and no matrix that reads it has changed with it"
            yield failed("edits", what, f"`{name}`", _AGAIN)
    explained = {reader.module for reader in readers if reader.producer}
    open_rows, answering = [], set()
    for matrix in matrices:
        if bool((matrix.factors.rows == 1).all()):
            continue
        parent = matrix.module.rpartition(".")[0]
        beside = [m for m in matrices if m.module.startswith(f"{parent}.") and m is not matrix]
        answers = {m.module for m in beside if _answers(matrix.factors.rows, _read_by(m.factors))}
        answering |= answers
        if not answers:
            open_rows.append(matrix.module)
    explained |= answering
    for module in open_rows:
        if module not in answering:  # else its one factor is that of its columns
            what = "has rows that were multiplied, and no reader whose columns make up for it"
            yield failed("edits", what, f"`{module}`", _AGAIN)
    for reader in readers:
        if reader.module not in explained:
            what = "has columns that were multiplied, and nothing that they read is divided"
            yield failed("edits", what, f"`{reader.module}`", _AGAIN)
    first: dict[str, Edited] = {}
    for matrix in matrices:
        parameter = fused_names.get(matrix.module)
        if parameter is None:
            continue
        leader = first.setdefault(parameter, matrix)
        if not _same(leader.factors.columns, matrix.factors.columns):
            what = f"columns were multiplied otherwise than those of `{leader.module}`, its sibling"
            yield failed("edits", what, f"`{matrix.module}`", _AGAIN)


def _read_by(factors: FittedFactors) -> Tensor:
    """By what a matrix's inputs were multiplied [k]: a factor of all rows alike may be one of all
    columns, which nothing in the numbers tells apart."""
    alike = bool((factors.columns == 1).all()) and _same(factors.rows, factors.rows[:1])
    return factors.columns * factors.rows[0] if alike else factors.columns


def _answers(rows: Tensor, columns: Tensor) -> bool:
    """Whether columns undo rows: one to one, or each row's for several columns (grouped heads), or
    for a part of the rows (v of a stored q, k, v)."""
    expected = 1 / rows
    if len(expected) == len(columns):
        # columns are estimated, from few steps of a code where they were made small
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
