"""Tensors to and from bytes on disk, without a second copy."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.memory import MemoryFile
from quantcli.checkpoint.remote.file import RemoteFile
from quantcli.checkpoint.spec import torch_dtype
from quantcli.core.disk import disk_errors
from quantcli.core.errors import MachineError

_CHUNK = 2**20  # bytes
_AHEAD = 2**20  # bytes of one piece of advice
_BLOCK = 512 * 1024  # elements that are read together
_WORTH_ADVICE = 64 * 1024  # bytes that the kernel is asked for
_NOT_HERE = -1  # in place of a descriptor: a file that is in memory, or elsewhere


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous."""
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data


def read_tensor(stored: StoredTensor) -> Tensor:
    """A whole stored tensor, in the dtype and shape of its spec. MachineError if it cannot be read."""
    spec = stored.spec
    return read_span(stored, 0, spec.shape[0] if spec.shape else 1).view(spec.shape)


def read_bytes(stored: StoredTensor, offset: int, nbytes: int) -> bytes:
    """Some bytes of a stored tensor."""
    block = bytearray(nbytes)
    with _opened(stored) as fd:
        read_into(fd, stored, offset, memoryview(block))
    return bytes(block)


def content_of(stored: StoredTensor) -> str:
    """sha256 of a stored tensor's bytes."""
    digest = hashlib.sha256()
    block = bytearray(min(_CHUNK, stored.spec.nbytes))
    with _opened(stored) as fd:
        for start in range(0, stored.spec.nbytes, _CHUNK):
            part = memoryview(block)[: stored.spec.nbytes - start]
            read_into(fd, stored, start, part)
            digest.update(part)
    return digest.hexdigest()


def read_span(stored: StoredTensor, start: int, count: int) -> Tensor:
    """Rows [start, start + count) of a stored tensor, as many as there are: [rows, ...].

    A scalar is one row.
    """
    spec = stored.spec
    count = min(count, (spec.shape[0] if spec.shape else 1) - start)
    tensor = torch.empty((count, *spec.shape[1:]), dtype=torch_dtype(spec.dtype))
    if tensor.numel() and type(stored).open is StoredTensor.open:  # stored as it is: no copy
        with _opened(stored) as fd:
            read_into(fd, stored, start * spec.row_nbytes, tensor_bytes(tensor))
    elif tensor.numel():
        step = max(1, _BLOCK * count // tensor.numel())
        with stored.open() as reader:
            for first in range(0, count, step):
                block = tensor[first : first + step]
                block.copy_(reader.weight(start + first, len(block)))
    return tensor


def read_rows(stored: StoredTensor, rows: list[int]) -> Tensor:
    """Some rows of a stored tensor, in the given order: [len(rows), ...]."""
    tensor = torch.empty((len(rows), *stored.spec.shape[1:]), dtype=torch_dtype(stored.spec.dtype))
    with stored.open() as reader:
        for place, row in enumerate(rows):
            tensor[place] = reader.weight(row, 1)[0]
    return tensor


def first_not_finite(stored: StoredTensor) -> tuple[list[int], float] | None:
    """Index and value of the first NaN or Inf of a stored tensor; None if all are finite."""
    spec = stored.spec
    if not torch_dtype(spec.dtype).is_floating_point or not spec.numel:
        return None
    height = spec.shape[0] if spec.shape else 1
    step = max(1, _BLOCK * height // spec.numel)
    for start in range(0, height, step):
        values = read_span(stored, start, min(step, height - start)).view(-1, *spec.shape[1:]).float()
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            row, *rest = bad[0].tolist()
            return [start + row, *rest] if spec.shape else [], float(values[tuple(bad[0])])
    return None


def will_read(stored: StoredTensor, begin: int, end: int) -> None:
    """Have bytes [begin, end) of a stored tensor read soon, if they are not in memory: by the kernel,
    or by threads of ours if the file is elsewhere.

    It is advice: nothing depends on it, and it fails silently.
    """
    if isinstance(stored.file, MemoryFile):
        return
    if _READING.shared is not None:
        begin, end = _READING.shared.unread(stored, begin, end)
    if isinstance(stored.file, RemoteFile):
        if begin < end:
            stored.file.will_read(stored.offset + begin, stored.offset + end)
        return
    if end - begin < _WORTH_ADVICE:
        return
    with _opened(stored) as fd, disk_errors(stored.file):
        try:
            os.preadv(fd, [bytearray(1)], stored.offset + begin, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                return
            for start in range(begin, end, _AHEAD):  # it heeds only the beginning of a long span
                size = min(_AHEAD, end - start)
                os.posix_fadvise(fd, stored.offset + start, size, os.POSIX_FADV_WILLNEED)


@contextmanager
def _opened(stored: StoredTensor) -> Iterator[int]:
    fd = open_file(stored)
    try:
        yield fd
    finally:
        close_file(fd)


def open_file(stored: StoredTensor) -> int:
    """What `read_into` reads the file of a stored tensor with, until `close_file`: a descriptor if the
    file is on this machine."""
    if isinstance(stored.file, MemoryFile | RemoteFile):
        return _NOT_HERE
    with disk_errors(stored.file):
        return os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)


def close_file(fd: int) -> None:
    """Let go of what `open_file` gave."""
    if fd != _NOT_HERE:
        with suppress(OSError):  # nothing was written
            os.close(fd)


class SharedReads(Protocol):
    """What reads for several threads that need the same bytes."""

    def read(
        self,
        stored: StoredTensor,
        offset: int,
        into: memoryview,
        fetch: Callable[[int, memoryview], None],
    ) -> None:
        """Fill `into` from byte `offset` of a stored tensor. fetch: reads it from its file."""

    def unread(self, stored: StoredTensor, begin: int, end: int) -> tuple[int, int]:
        """Those of bytes [begin, end) of a stored tensor that must still be read, and some next to
        them."""


class _Reading(threading.local):
    """What the thread reads through; None: from files."""

    shared: SharedReads | None = None


_READING = _Reading()


@contextmanager
def reading_through(shared: SharedReads | None) -> Iterator[None]:
    """In the block, the thread reads stored tensors through `shared`."""
    before, _READING.shared = _READING.shared, shared
    try:
        yield
    finally:
        _READING.shared = before


def read_into(fd: int, stored: StoredTensor, offset: int, block: memoryview) -> None:
    """Fill `block` from byte `offset` of a stored tensor in its open file."""
    assert not stored.kind, "codes are not weights"
    shared = _READING.shared
    if shared is None or isinstance(stored.file, MemoryFile):
        _read(fd, stored, offset, block)
    else:
        shared.read(stored, offset, block, partial(_read, fd, stored))


def _read(fd: int, stored: StoredTensor, offset: int, block: memoryview) -> None:
    """Fill `block` from the file."""
    done = 0
    with disk_errors(stored.file):
        while done < len(block):
            place, rest = stored.offset + offset + done, block[done:]
            if isinstance(stored.file, MemoryFile):
                n = stored.file.read(place, rest)
            elif isinstance(stored.file, RemoteFile):
                n = stored.file.read(place, rest, stored.offset + stored.nbytes)
            else:
                n = os.preadv(fd, [rest], place)
            if n == 0:
                raise MachineError(
                    "file became shorter while it was read",
                    where=str(stored.file),
                    fix="let nobody write to the model",
                )
            done += n
