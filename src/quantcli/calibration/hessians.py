"""Which inputs of a matrix go together: sum x x^T over all tokens, the same whatever the workers.

Threads that run batches only keep what they are shown. Products are added afterwards, batch by batch in
the order of the data, each thread its own columns of the sum.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from quantcli.calibration.taps import Matrix
from quantcli.executors import thread_pool
from quantcli.schemes.gptq import Each, in_turn

_TILE = 512  # columns that one job adds up


class Inputs:
    """What a matrix was given in some batches. Threads may share it."""

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
        """What was kept, in the order of the data, and forget it."""
        seen, self._seen = self._seen, {}
        return [x for batch in sorted(seen) for x in seen[batch]]


class Hessian:
    """sum x x^T, float32 [k, k]; its upper triangle while it grows."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.sum = torch.zeros((k, k), device=device)
        self.tokens = 0

    @property
    def finite(self) -> bool:
        """Whether no input was NaN or Inf, or so large that its square is."""
        return bool(torch.isfinite(self.sum.diagonal()).all())

    def mirror(self) -> None:
        """All of it has been added: fill the lower triangle."""
        k = len(self.sum)
        for start in range(0, k, _TILE):
            stop = min(start + _TILE, k)
            corner = self.sum[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self.sum[stop:, start:stop] = self.sum[start:stop, stop:].T


def add(hessians: Mapping[Matrix, Hessian], seen: Mapping[Matrix, Inputs], each: Each) -> None:
    """Add what was seen and forget it."""
    jobs: list[tuple[Tensor, list[Tensor], int]] = []
    for matrix, hessian in hessians.items():
        inputs = seen[matrix].take()
        hessian.tokens += sum(map(len, inputs))
        jobs += [(hessian.sum, inputs, start) for start in range(0, len(hessian.sum), _TILE)]

    def work(number: int) -> None:
        total, inputs, start = jobs[number]
        columns = slice(start, min(start + _TILE, len(total)))
        for x in inputs:
            total[columns, start:].addmm_(x[:, columns].T, x[:, start:])

    each(work, range(len(jobs)))


@contextmanager
def jobs(workers: int, device: torch.device) -> Iterator[Each]:
    """What runs jobs on so many threads, each with one thread in torch; in turn on an accelerator."""
    if device.type != "cpu":
        yield in_turn
        return
    with thread_pool(workers) as pool:
        yield lambda job, numbers: list(pool.map(job, numbers)).clear()
