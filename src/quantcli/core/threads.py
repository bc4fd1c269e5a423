"""Threads: the cores of this process, and a pool whose threads compute with torch."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from quantcli.core.errors import MachineError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def default_workers() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Locked:
    """Has a lock for the threads that change it. A copy in another process has a lock of its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "lock": threading.Lock()}


class _Pool(ThreadPoolExecutor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit work; MachineError if no thread can be started."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
            raise MachineError(
                "no thread can be started",
                fix="raise the limit of processes (ulimit -u), or give fewer --workers",
            ) from None


@contextmanager
def thread_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `workers` threads in which every torch operation stays on its own thread.

    Torch releases the GIL while it computes, so that these threads use all cores; torch's own threads
    would compete with them. When the block ends, by an exception as well, jobs that have not begun are
    dropped, and running ones are awaited. MachineError if a thread cannot be started.
    """
    with one_thread():
        keep_freed_memory()
        pool = _Pool(workers, "quantcli", initializer=set_one_thread)
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Blocks(threading.local):
    """Blocks of `one_thread` that this thread is in."""

    depth = 0


_blocks, _lock = _Blocks(), threading.Lock()
_users = 0  # threads that are in such a block
_before = 0  # torch's number of threads when the first of them began


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: sums over several would depend on how many.

    Torch has a number for each thread, and one for those that have not asked yet. Blocks may be nested,
    and run in several threads: each thread gets back the number from before the first block.
    """
    global _users, _before
    with _lock:
        number = set_one_thread()
        if not _users:
            _before = number
        _users += not _blocks.depth
        _blocks.depth += 1
    try:
        yield
    finally:
        with _lock:
            _blocks.depth -= 1
            _users -= not _blocks.depth
            if not _blocks.depth:
                _set(_before)
                if _users:  # new threads of the other blocks
                    other = threading.Thread(target=_set, args=(1,))
                    other.start()
                    other.join()


def set_one_thread() -> int:
    """Torch on one thread, for this thread and new ones. Returns the number from before."""
    import torch

    number = torch.get_num_threads()  # a thread that has not asked would forget what it was set to
    torch.set_num_threads(1)
    return number


def _set(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next row block.

    By default it returns buffers of a few megabytes to the kernel, which clears the pages when they
    are allocated again: up to half of the CPU time.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum of glibc
        adjust(_M_TRIM_THRESHOLD, 64 * 2**20)
