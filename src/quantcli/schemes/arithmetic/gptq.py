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

`Descent` lowers what is left: it goes over the groups and columns of a row again, and takes for each
scale, then for each code, the number that is best while all others stay. With the slopes g = d H, a
group with codes q gets the scale s + (g q) / (q H q), and a column the code that is nearest to
q_i + g_i / (H_ii s).

Rows do not depend on each other. Bits do not depend on the number of threads: jobs have a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    added:  what was added to the diagonal of H.
    block_size: columns between two updates of all that follow.
    """

    order: Tensor
    shares: Tensor
    added: float = 0.0
    block_size: int = BLOCK

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
                return cls(order, shares, damping * mean * 10**attempt)
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
        for start in range(0, k, self.block_size):
            block = slice(start, min(start + self.block_size, k))
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


class Mended(NamedTuple):
    """Numbers of the codes' type, float32 [n, k], and scales as `Descent` has them. before, after:
    d H d^T, float64 [n]."""

    numbers: Tensor
    scale: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Descent:
    """How codes and scales are mended, one at a time, while all others stay.

    sweeps:   how often over all columns.
    columns:  that share a scale.
    scale:    float32 [n, groups], as it is stored.
    whole:    what all scales are multiplied with, float32 [1]; None: nothing.
    to_scale: the nearest numbers that may be a scale; None: scales stay as they are.
    """

    sweeps: int
    columns: int
    scale: Tensor
    whole: Tensor | None = None
    to_scale: Callable[[Tensor], Tensor] | None = None

    def step(self, scale: Tensor, k: int) -> Tensor:
        """What each of k columns is multiplied with, float32 [n, k]."""
        step = scale if self.whole is None else scale * self.whole
        return step.repeat_interleave(self.columns, 1)[:, :k]

    def mended(
        self, rows: Tensor, hessian: Tensor, numbers: Tensor, element: ElementType, damping: float
    ) -> Mended:
        """No change makes d (H + damping I) d^T larger.

        rows, numbers: float32 [n, k]; hessian: float32 [k, k].
        """
        k, columns = rows.shape[1], self.columns
        numbers, scale = numbers.T.contiguous(), self.scale.clone()
        lost = rows - numbers.T * self.step(scale, k)
        slopes = lost @ hessian
        before = _products(slopes, lost).clamp_min_(0)
        damped = before + damping * _products(lost, lost)
        slopes.add_(lost, alpha=damping)
        for sweep in range(self.sweeps):
            if columns > BLOCK and self.to_scale is not None:
                damped -= self._fit_wide(slopes, hessian, numbers, scale, damping)
            for block in self._blocks(k):
                start = block.start
                corner = hessian[block, block].clone()
                corner.diagonal().add_(damping)
                within, number = slopes[:, block].T.contiguous(), numbers[block]
                change = torch.zeros_like(number)
                if columns <= BLOCK and self.to_scale is not None:
                    for first in range(0, len(number), columns):
                        part = slice(first, first + columns)
                        of_group = number[part]
                        curve = (corner[part, part] @ of_group).mul_(of_group).sum(0)
                        place = (start + first) // columns
                        moved = self._fit(scale, place, (within[part] * of_group).sum(0), curve)
                        change[part] = of_group * moved
                        within -= corner[:, part] @ change[part]
                step = scale[:, start // columns : -(-block.stop // columns)].T.contiguous()
                self._codes(corner, within, number, change, step, element)
                damped -= _products(change.T, 2 * slopes[:, block] - change.T @ corner)
                # nothing reads the slopes of columns that the last sweep has behind it
                left = 0 if sweep + 1 < self.sweeps else block.stop
                slopes[:, left:] -= change.T @ hessian[block, left:]
                if not left:
                    slopes[:, block] -= change.T * damping
        numbers = numbers.T.contiguous()
        lost = torch.addcmul(rows, numbers, self.step(scale, k), value=-1)
        after = (damped - damping * _products(lost, lost)).clamp_min_(0)
        return Mended(numbers, scale, before, after if self.sweeps else before)

    def _blocks(self, k: int) -> Iterator[slice]:
        """As many whole groups as fit BLOCK columns; or parts of a group."""
        span = max(BLOCK // self.columns, 1) * self.columns
        for first in range(0, k, span):
            end = min(first + span, k)
            for start in range(first, end, BLOCK):
                yield slice(start, min(start + BLOCK, end))

    def _fit(self, scale: Tensor, place: int, slope: Tensor, curve: Tensor) -> Tensor:
        """Move the scales of a group where that is better. slope, curve: g q and q H q, float32 [n].
        Returns the changes of steps [n]."""
        assert self.to_scale is not None
        old, whole = scale[:, place].clone(), 1.0 if self.whole is None else self.whole
        new = self.to_scale((old * whole + slope / curve).abs() / whole).copysign(old)
        moved = (new - old) * whole
        gain = 2 * moved * slope - moved.square() * curve
        moved = torch.where(torch.isfinite(gain) & (gain > 0), moved, 0.0)
        scale[:, place] = torch.where(moved == 0, old, new)
        return moved

    def _fit_wide(
        self, slopes: Tensor, hessian: Tensor, numbers: Tensor, scale: Tensor, damping: float
    ) -> Tensor:
        """The scales of groups that are wider than a block; adapts the slopes. Returns by how much
        d (H + damping I) d^T falls, float64 [n]."""
        gain = torch.zeros(len(slopes), dtype=torch.float64, device=slopes.device)
        for place in range(scale.shape[1]):
            part = slice(place * self.columns, min((place + 1) * self.columns, len(numbers)))
            of_group = numbers[part].T
            curve = ((of_group @ hessian[part, part] + of_group * damping) * of_group).sum(1)
            slope = (slopes[:, part] * of_group).sum(1)
            moved = self._fit(scale, place, slope, curve)
            gain += moved * (2 * slope - moved * curve)
            change = of_group * moved[:, None]
            slopes -= change @ hessian[part]
            slopes[:, part] -= change * damping
        return gain

    def _codes(
        self,
        corner: Tensor,
        within: Tensor,
        number: Tensor,
        change: Tensor,
        step: Tensor,
        element: ElementType,
    ) -> None:
        """The codes of a block's columns, all [columns, n]; adds what weights lose to `change`.

        step: the scales of the block's groups [groups, n].
        """
        steps = step if self.whole is None else step * self.whole
        curves = corner.diagonal()
        for place in range(len(number)):
            each = steps[place // self.columns]
            best = torch.addcdiv(number[place], within[place], curves[place] * each)
            new = elements.nearest(best, element)
            moved = (new - number[place]) * each
            within[place + 1 :].addr_(corner[place + 1 :, place], moved, alpha=-1)
            change[place] += moved
            number[place] = new


class Rounded(NamedTuple):
    """Codes of n rows, and of each row the error of its output, float64 [n]: of these codes, of the
    nearest ones, and without any weight. scale: as `Descent` has it; None if nothing was mended."""

    codes: Tensor
    error: Tensor
    nearest: Tensor
    signal: Tensor
    scale: Tensor | None = None


def squares(rows: Tensor, hessian: Tensor) -> Tensor:
    """The sum of squares of the outputs of each row of a weight: float32 [n, k] -> float64 [n].
    hessian: symmetric, so that half of its products will do."""
    k = rows.shape[1]
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, k, _TILE):
        block = slice(start, min(start + _TILE, k))
        part = rows[:, block] @ hessian[block, block]
        if start:
            part.addmm_(rows[:, :start], hessian[:start, block], alpha=2)
        total += _products(part, rows[:, block])
    return total.clamp_min_(0)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """The sum of the products of each row: float32 [n, k] -> float64 [n]."""
    return (left * right).sum(1, dtype=torch.float64)


def gptq(
    rows: Tensor,
    hessian: Tensor,
    step: Tensor,
    nearest: Tensor,
    element: ElementType,
    feedback: Feedback | None,
    descent: Descent | None = None,
) -> Rounded:
    """Codes of a block of rows: for each row those of GPTQ, mended by `descent`, or `nearest` if they
    are better.

    rows: float32 [n, k]; hessian: sum x x^T, float32 [k, k]; step, element: as in `Feedback.round`;
    nearest: codes as `elements.encode` has them. feedback: of this hessian; None:
    nearest. Errors are sums of squares over the inputs.
    """
    k = rows.shape[1]

    def error(numbers: Tensor, step: Tensor) -> Tensor:
        return squares(torch.addcmul(rows, numbers, step.expand_as(rows), value=-1), hessian)

    signal = squares(rows, hessian)
    plain = error(elements.decode(nearest, element, k), step)
    scale = None if descent is None else descent.scale
    if feedback is None:
        return Rounded(nearest, plain, plain, signal, scale)
    codes = feedback.round(rows, step, element)
    numbers = elements.decode(codes, element, k)
    if descent is None:
        total = error(numbers, step)
    else:
        numbers, found, before, after = descent.mended(rows, hessian, numbers, element, feedback.added)
        lower = after < before
        codes = torch.where(lower[:, None], elements.encode(numbers, element), codes)
        total = torch.minimum(after, before)
        scale = torch.where(lower[:, None], found, descent.scale)
    better = total < plain
    if descent is not None and scale is not None:
        scale = torch.where(better[:, None], scale, descent.scale)
    codes = torch.where(better[:, None], codes, nearest)
    return Rounded(codes, torch.where(better, total, plain), plain, signal, scale)
