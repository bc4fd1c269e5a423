"""Orthogonal matrices between two checkpoints, by least squares over their weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.core.threads import one_thread
from quantcli.verification.compare import Weight, opener

_ROWS = 256  # of a block
_TURNED = 0.5  # relative distance of two tables, from which on one is the other in another basis
_SAMPLE = 4  # times h: rows of a table that decide, spread evenly


@dataclass(frozen=True)
class Fit:
    """A matrix R [h, h], float64, with after = before R in the sense of least squares.

    error: length of after - before R over that of after. skew: length of R^T R - 1 over the root of h.
    """

    matrix: Tensor
    error: float
    skew: float


def fit_rows(before: StoredTensor, after: StoredTensor) -> Fit | None:
    """The matrix that turns rows [n, h] of one table into those of another; None if there are too few
    rows, or if they lie in fewer directions than h.

    Memory: three matrices [h, h] in float64.
    """
    hidden = after.spec.shape[1]
    gram = torch.zeros(hidden, hidden, dtype=torch.float64)
    product = torch.zeros_like(gram)
    with one_thread():
        for old, new in _blocks(before, after, most=_SAMPLE * hidden):
            gram += old.T @ old
            product += old.T @ new
        factor, fault = torch.linalg.cholesky_ex(gram)
        if int(fault) or not bool(torch.isfinite(product).all()):
            return None
        matrix = torch.cholesky_solve(product, factor)
        signal = noise = 0.0
        for old, new in _blocks(before, after, most=_SAMPLE * hidden):
            signal += float(new.square().sum())
            noise += float((new - old @ matrix).square().sum())
        error = (noise / signal) ** 0.5 if signal else 0.0
        return Fit(matrix, error, skew_of(matrix))


def is_turned(before: StoredTensor, after: StoredTensor) -> bool:
    """Whether two tables [n, h] are as far from each other as rows that a rotation has turned.

    Their distance over the length of `before` is about the root of 2 then; 1 if rows became zeros.
    """
    signal = noise = 0.0
    for old, new in _blocks(before, after, most=_SAMPLE * after.spec.shape[1]):
        signal += float(old.square().sum())
        noise += float((new - old).square().sum())
    return noise > _TURNED**2 * signal


def skew_of(matrix: Tensor) -> float:
    """How far a matrix [n, n] is from orthogonal: length of M^T M - 1 over the root of n."""
    n = len(matrix)
    return float((matrix.T @ matrix - torch.eye(n, dtype=matrix.dtype)).norm()) / math.sqrt(n)


def _blocks(before: StoredTensor, after: StoredTensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Row blocks of both, float64; if there are more than `most` rows, blocks spread evenly."""
    rows = after.spec.shape[0]
    count = -(-rows // _ROWS)
    step = max(1, rows // max(1, most))
    with before.open() as old, after.open() as new:
        for block in range(0, count, step):
            yield (
                old.weight(block * _ROWS, _ROWS).double(),
                new.weight(block * _ROWS, _ROWS).double(),
            )


def fit_head(products: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The orthogonal matrix R [d, d], float64, that is nearest to turning some rows [n, d] into others.

    products: pairs (before, after) of rows. Source: orthogonal Procrustes, Schoenemann 1966.
    """
    with one_thread():
        total = sum(before.double().T @ after.double() for before, after in products)
        assert isinstance(total, Tensor)
        u, _, v = torch.linalg.svd(total)
        matrix: Tensor = u @ v
        return matrix


def rows_of_weight(weight: Weight, start: int, count: int) -> Tensor:
    """Rows [start, start + count) of a weight, decoded: float32 [count, k]."""
    with opener(weight)() as reader:
        return reader.weight(start, count).float()
