"""GPTQ: round a weight column by column, each column making up for the errors of those before it.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. With the errors d = w - s q of a row and H = sum x x^T over its inputs,
the error of the output is d H d^T. Let H = R R^T with R upper triangular. Then

    d H d^T = sum_i (sum_{j <= i} d_j R_ji)^2

so whatever the columns before i have lost, column i makes up for best as q_i, the number of the codes'
type that is nearest to t_i / s_i, with

    t_i = w_i + sum_{j < i} d_j R_ji / R_ii

These are the codes of the paper, which takes U = R^-1 and keeps the columns that are left up to date;
this way needs neither the inverse nor a copy of the weight.

Rows do not depend on each other. Bits do not depend on the number of threads: jobs have a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantcli.core.number_types import ElementType
from quantcli.schemes.arithmetic import elements

DAMPING = 0.01  # of the mean of H's diagonal, added to it: samples never show all there is
BLOCK = 128  # columns between two updates of all that follow
_TILE = 512  # rows and columns that one job of a factorization takes
_ATTEMPTS = 4  # with ten times the damping each, if H is not positive definite

Each = Callable[[Callable[[int], None], Iterable[int]], None]  # calls a function with every number


def in_turn(job: Callable[[int], None], numbers: Iterable[int]) -> None:
    """One after the other."""
    for number in numbers:
        job(number)


@dataclass(frozen=True)
class Feedback:
    """How columns make up for each other's errors.

    order:  int64 [k], the columns as they are rounded, those with the largest inputs first.
    shares: float32 [k, k] in that order, strictly upper triangular: R_ji / R_ii.
    """

    order: Tensor
    shares: Tensor

    @classmethod
    def of(
        cls, hessian: Tensor, *, damping: float = DAMPING, act_order: bool = True, each: Each = in_turn
    ) -> Feedback | None:
        """From sum x x^T, float32 [k, k]. None if it cannot be factorized.

        Columns whose inputs were all zero neither give nor take: they are rounded to nearest. `each`
        may run jobs on several threads, each of which keeps to one thread in torch. Float64 inside,
        8 k^2 bytes.
        """
        diagonal = hessian.diagonal().double()
        live = diagonal > 0
        k = len(diagonal)
        order = torch.arange(k, device=hessian.device)
        if act_order:
            order = diagonal.argsort(descending=True, stable=True)
        if not bool(live.any()):
            return cls(order, torch.zeros_like(hessian))
        mean = float(diagonal[live].mean())
        backwards = order.flip(0)  # H = R R^T of one order is L L^T of the other
        extra = torch.where(live, damping * mean, mean)[backwards]
        for attempt in range(_ATTEMPTS):
            work = torch.empty((k, k), dtype=torch.float64, device=hessian.device)
            each(_copier(work, hessian, backwards), range(0, k, _TILE))
            work.diagonal().add_(extra * 10**attempt)
            if factorize(work, each):
                shares = torch.empty_like(hessian)
                each(_sharer(shares, work), range(0, k, _TILE))
                return cls(order, shares)
        return None

    def round(self, rows: Tensor, step: Tensor, element: ElementType) -> Tensor:
        """Codes as `elements.encode` has them.

        rows: float32 [n, k]; step: float32, the scale of each column [n, k], or of all [n, 1]; element:
        the type of codes.
        """
        n, k = rows.shape
        columns = rows[:, self.order].T.contiguous()
        steps = (step[:, self.order] if step.shape[1] == k else step.expand(n, k)).T
        if step.shape[1] == k:
            steps = steps.contiguous()
        lost = torch.empty_like(columns)
        for start in range(0, k, BLOCK):
            block = slice(start, min(start + BLOCK, k))
            targets = columns[block] + self.shares[:start, block].T @ lost[:start]
            within = self.shares[block, block]
            for place, column in enumerate(range(start, block.stop)):
                target = targets[place]
                if place:
                    target = torch.addmv(target, lost[start:column].T, within[:place, place])
                number = elements.nearest(target / steps[column], element)
                lost[column] = torch.addcmul(columns[column], number, steps[column], value=-1)
                columns[column] = number  # in place of the weights, which nothing reads any more
        del lost, steps
        in_order = torch.empty_like(rows)
        in_order[:, self.order] = columns.T
        return elements.encode(in_order, element)


def factorize(matrix: Tensor, each: Each = in_turn) -> bool:
    """Cholesky in place: the lower triangle of a symmetric float64 [k, k] becomes L, matrix = L L^T.

    False if it is not positive definite; then its content is of no use.
    """
    k = len(matrix)
    for start in range(0, k, _TILE):
        stop = min(start + _TILE, k)
        left = matrix[start:stop, :start]

        def subtract(row: int, start: int = start, stop: int = stop, left: Tensor = left) -> None:
            rows = slice(row, min(row + _TILE, k))
            matrix[rows, start:stop] -= matrix[rows, :start] @ left.T

        if start:
            each(subtract, range(start, k, _TILE))
        corner, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if int(info) or not bool(torch.isfinite(corner).all()):
            return False
        matrix[start:stop, start:stop] = corner

        def solve(row: int, start: int = start, stop: int = stop, corner: Tensor = corner) -> None:
            rows = slice(row, min(row + _TILE, k))
            below = matrix[rows, start:stop]
            below[:] = torch.linalg.solve_triangular(corner.T, below, upper=True, left=False)

        each(solve, range(stop, k, _TILE))
    return True


def _copier(work: Tensor, hessian: Tensor, order: Tensor) -> Callable[[int], None]:
    def copy(row: int) -> None:
        rows = slice(row, row + _TILE)
        work[rows] = hessian[order[rows]][:, order].double()

    return copy


def _sharer(shares: Tensor, lower: Tensor) -> Callable[[int], None]:
    """R is L with rows and columns reversed; shares are R's columns over its diagonal."""
    k = len(lower)

    def share(row: int) -> None:
        rows = slice(row, min(row + _TILE, k))
        columns = torch.arange(k - 1 - rows.start, k - 1 - rows.stop, -1, device=lower.device)
        upper = lower[columns].flip(1) / lower.diagonal().flip(0)
        shares[rows] = upper.float().triu_(row + 1)

    return share


class Rounded(NamedTuple):
    """Codes of n rows, and of each row the error of its output, float64 [n]: of these codes, of the
    nearest ones, and without any weight."""

    codes: Tensor
    error: Tensor
    nearest: Tensor
    signal: Tensor


def squares(rows: Tensor, hessian: Tensor) -> Tensor:
    """The sum of squares of the outputs of each row of a weight: float32 [n, k] -> float64 [n]."""
    return ((rows @ hessian) * rows).sum(1, dtype=torch.float64).clamp_min(0)


def gptq(
    rows: Tensor,
    hessian: Tensor,
    step: Tensor,
    nearest: Tensor,
    element: ElementType,
    feedback: Feedback | None,
) -> Rounded:
    """Codes of a block of rows: for each row those of GPTQ, or `nearest` if they are better.

    rows: float32 [n, k]; hessian: sum x x^T, float32 [k, k]; step, element: as in `Feedback.round`;
    nearest: codes as `elements.encode` has them. feedback: of this hessian; None: nearest. Errors are
    sums of squares over the inputs.
    """

    def error(codes: Tensor) -> Tensor:
        numbers = elements.decode(codes, element, rows.shape[1])
        return squares(torch.addcmul(rows, numbers, step.expand_as(rows), value=-1), hessian)

    signal = squares(rows, hessian)
    plain = error(nearest)
    if feedback is None:
        return Rounded(nearest, plain, plain, signal)
    codes = feedback.round(rows, step, element)
    total = error(codes)
    better = total < plain
    return Rounded(
        torch.where(better[:, None], codes, nearest), torch.where(better, total, plain), plain, signal
    )
