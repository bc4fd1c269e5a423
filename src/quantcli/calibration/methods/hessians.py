"""Correlations of a matrix's inputs: sum x x^T over all tokens, the same for any number of workers.

Threads that run batches only keep inputs. Products are added afterwards, batch by batch in
the order of the data, each thread its own columns of the sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from quantcli.calibration.replay.taps import Matrix
from quantcli.core.exact import exact
from quantcli.core.threads import thread_pool
from quantcli.schemes.arithmetic.gptq import Each, in_turn

InputRounding = Callable[[Tensor], tuple[Tensor, Tensor]]
HESSIANS_NBYTES = 2**30  # of sums at a time
INPUTS_NBYTES = 2**28  # of the inputs of a batch at a time
_ENOUGH = 4  # tokens a column: fewer would fit the weights to the noise of the samples
_TILE = 512  # columns that one job adds up


class Inputs:
    """Inputs of a matrix in some batches. Threads may share it."""

    def __init__(self) -> None:
        self._seen: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()

    def update(self, x: Tensor, batch: int) -> None:
        """Keep inputs [tokens, k] as float32. `batch` is their place in the data."""
        if len(x):
            kept = x.detach().to(torch.float32, copy=True)
            with self._lock:
                self._seen.setdefault(batch, []).append(kept)

    def take(self) -> list[Tensor]:
        """All inputs in the order of the data; they are kept no longer."""
        seen, self._seen = self._seen, {}
        return [x for batch in sorted(seen) for x in seen[batch]]


class Hessian:
    """sum x x^T, float32 [k, k]; its upper triangle while it grows.

    If inputs are rounded, x is rounded, and `cross` is sum r x^T with r before rounding.
    """

    def __init__(self, k: int, device: torch.device, rounded: InputRounding | None = None) -> None:
        """rounded: inputs [tokens, k] -> the same as a matrix reads them, before and after rounding."""
        self.sum = torch.zeros((k, k), device=device)
        self.cross = None if rounded is None else torch.zeros((k, k), device=device)
        self.rounded = rounded
        self.tokens = 0

    def toward(self, damping: float) -> Tensor | None:
        """The factor of weights [n, k], float32 [k, k], that brings outputs of rounded inputs nearest
        to those of inputs before rounding, in least squares: cross sum^-1, both damped. None if inputs
        are not rounded, or tokens are too few. Float64 inside, 24 k^2 bytes."""
        if self.cross is None or self.tokens < _ENOUGH * len(self.sum):
            return None
        added = damping * float(self.sum.diagonal().double().mean())
        damped, cross = self.sum.double(), self.cross.double()
        damped.diagonal().add_(added)
        cross.diagonal().add_(added)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            return None
        correction: Tensor = torch.cholesky_solve(cross.T, factor).T.float().contiguous()
        return correction if bool(torch.isfinite(correction).all()) else None

    @property
    def finite(self) -> bool:
        """Whether no input was NaN or Inf, or so large that its square is."""
        return bool(torch.isfinite(self.sum.diagonal()).all())

    def complete(self) -> None:
        """All of it has been added: fill the lower triangle, and go where float64 is computed."""
        k = len(self.sum)
        for start in range(0, k, _TILE):
            stop = min(start + _TILE, k)
            corner = self.sum[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self.sum[stop:, start:stop] = self.sum[start:stop, stop:].T
        self.sum = exact(self.sum)
        self.cross = None if self.cross is None else exact(self.cross)


def add(hessians: Mapping[Matrix, Hessian], seen: Mapping[Matrix, Inputs], each: Each) -> None:
    """Add the products of all inputs that are kept."""
    jobs: list[tuple[Tensor, list[tuple[Tensor, Tensor]], int, int]] = []
    for matrix, hessian in hessians.items():
        inputs = seen[matrix].take()
        hessian.tokens += sum(map(len, inputs))
        starts = range(0, len(hessian.sum), _TILE)
        if hessian.rounded is not None and hessian.cross is not None:
            pairs = [hessian.rounded(x) for x in inputs]
            jobs += [(hessian.cross, pairs, start, 0) for start in starts]
            inputs = [rounded for _, rounded in pairs]
        jobs += [(hessian.sum, [(x, x) for x in inputs], start, start) for start in starts]

    def work(number: int) -> None:
        total, pairs, start, first = jobs[number]
        columns = slice(start, min(start + _TILE, len(total)))
        for left, right in pairs:
            total[columns, first:].addmm_(left[:, columns].T, right[:, first:])

    each(work, range(len(jobs)))


@contextmanager
def jobs(workers: int, device: torch.device) -> Iterator[Each]:
    """A runner of jobs on so many threads, each with one thread in torch; in turn on an accelerator."""
    if device.type != "cpu":
        yield in_turn
        return
    with thread_pool(workers) as pool:
        yield lambda job, numbers: list(pool.map(job, numbers)).clear()


def fitting(
    group: Mapping[Matrix, list[str]],
    inputs_of: Callable[[Sequence[str]], int],
    tokens_of: Callable[[Matrix], float],
) -> Iterator[dict[Matrix, int]]:
    """The matrices of a group, and how many inputs each has, in runs that fit the memory.

    tokens_of: how many tokens of a batch a matrix reads, on average. A run has at least one matrix, and
    no more than HESSIANS_NBYTES of sums and INPUTS_NBYTES of the inputs of a batch.
    """
    run: dict[Matrix, int] = {}
    sums = inputs = 0.0
    for leader, modules in group.items():
        k = inputs_of(modules)
        more, kept = 4 * k * k, 4 * k * tokens_of(leader)
        if run and (sums + more > HESSIANS_NBYTES or inputs + kept > INPUTS_NBYTES):
            yield run
            run, sums, inputs = {}, 0, 0
        run[leader] = k
        sums += more
        inputs += kept
    if run:
        yield run
