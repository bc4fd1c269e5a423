"""Where jobs run: threads of this process, one a core."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def thread_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `workers` threads in which every torch operation stays on its own thread.

    Torch releases the GIL while it computes, so the threads are the parallelism; its own threads on
    top would fight over the cores. What has not begun when the block is left by an exception is
    dropped; what has begun is waited for.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _keep_freed_memory()
    pool = ThreadPoolExecutor(workers, "quantcli", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next row block. By default it hands temporaries of some
    megabytes back to the kernel, which clears them again page by page: up to half of the CPU time.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
        adjust(_M_TRIM_THRESHOLD, 64 * 2**20)
