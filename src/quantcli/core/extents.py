"""Files that are put together in memory, extent by extent, and hashed on the way."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantcli.core.disk import Hashes, disk_errors, machine_error
from quantcli.core.errors import MachineError

EXTENT = 2**20  # bytes: twice as many per write save a third of the system's time, a fiftieth of a run
_SMALL = 16 * 1024  # bytes that are copied faster than the GIL is released
_READ = 256 * 1024  # bytes that are read back at a time
_ALIGNMENT = 4096  # bytes, of what O_DIRECT writes: enough for any disk in use


class Buffers:
    """Memory for the extents that the files of a run assemble or hash. Threads may share it.

    Buffers are used again, so that the kernel does not clear pages for each extent. An extent that
    gets none is written piece by piece, which is slow and rare.
    """

    def __init__(self, limit: int, reserve: int, writing: Executor | None = None) -> None:
        """limit:   number of buffers.
        reserve: how many must be free for one to wait, for its hash or to be written by `writing`.
        writing: writes whole extents while the threads that made them go on; without it they write.
        """
        self.writing = writing
        self._free: list[memoryview] = []
        self._limit = self._left = limit
        self._reserve = reserve
        self._lock = threading.Lock()

    def take(self, *, beyond: bool = False) -> memoryview | None:
        """A buffer of EXTENT bytes that begins at a page, or None. beyond: also above the limit."""
        with self._lock:
            if self._left <= 0 and not beyond:
                return None
            self._left -= 1
            if self._free:
                return self._free.pop()
        try:
            return memoryview(mmap.mmap(-1, EXTENT))
        except OSError:  # no memory
            with self._lock:
                self._left += 1
            return None

    def give(self, memory: memoryview) -> None:
        """Take a buffer back."""
        with self._lock:
            self._left += 1
            if len(self._free) < self._limit:
                self._free.append(memory)

    @property
    def plenty(self) -> bool:
        """Whether more are left than the reserve."""
        return self._left > self._reserve

    @property
    def exhausted(self) -> bool:
        """Whether none is left below the limit."""
        return self._left <= 0


@dataclass(slots=True)
class _Extent:
    """An extent that is not whole yet. `memory` is None if its pieces go straight to the file."""

    missing: int  # bytes
    memory: memoryview | None


@dataclass(slots=True, eq=False)
class Whole:
    """An extent whose bytes are all there. `memory` is None if they must be read back from the file."""

    memory: memoryview | None
    unused: int  # of being written and being hashed, what is still to be done with the memory


class Assembly(ABC):
    """A file of a known size. Threads may put pieces into it in any order.

    Whole extents are passed on in the order of the file, by whichever thread has made one whole. While
    buffers are few, other threads wait for it.
    """

    def __init__(self, nbytes: int, buffers: Buffers, hashes: Hashes | None) -> None:
        self._nbytes = nbytes
        self._buffers = buffers
        self._hashes = hashes
        self._count = -(-nbytes // EXTENT)
        self._extents: dict[int, _Extent] = {}
        self._whole: dict[int, Whole] = {}  # not passed on yet
        self._next = 0  # to pass on
        self._passing = False  # whether a thread is at it
        self._missing = nbytes
        self._error: BaseException | None = None  # the first one in another thread
        self._lock = threading.Condition()

    @property
    def backlog(self) -> int:
        """Extents that are whole and wait for their turn."""
        return len(self._whole)

    def put(self, position: int, data: bytes | memoryview) -> None:
        """Put bytes at a position."""
        view = memoryview(data)
        if view.format != "B":
            view = view.cast("B")
        nbytes, start = view.nbytes, 0
        while start < nbytes:
            number, offset = divmod(position + start, EXTENT)
            size = min(nbytes - start, EXTENT - offset)
            with self._lock:
                extent = self._extent(number)
                memory, small = extent.memory, size <= _SMALL
                if memory is not None and small:
                    memory[offset : offset + size] = view[start : start + size]
                    whole = self._add(number, size)
            if memory is None or not small:
                if memory is None:
                    self._write_piece(view[start : start + size], position + start)
                else:  # without the GIL
                    piece = np.frombuffer(view, np.uint8, size, start)
                    np.frombuffer(memory, np.uint8)[offset : offset + size] = piece
                with self._lock:
                    whole = self._add(number, size)
            if whole:
                self._write_whole(number, memory)
            start += size

    @abstractmethod
    def _memory(self, number: int) -> memoryview | None:
        """Memory for an extent; None if its pieces go straight to their place. The lock is held."""

    @abstractmethod
    def _write_piece(self, piece: memoryview, position: int) -> None:
        """Write bytes of an extent without memory."""

    @abstractmethod
    def _write_whole(self, number: int, memory: memoryview | None) -> None:
        """Take an extent that is whole."""

    @abstractmethod
    def _pass(self, number: int, whole: Whole) -> None:
        """Take an extent whose turn it is."""

    def _size(self, number: int) -> int:
        return min(EXTENT, self._nbytes - number * EXTENT)

    def _extent(self, number: int) -> _Extent:
        """An extent that is not whole; the lock is held."""
        extent = self._extents.get(number)
        if extent is None:
            extent = self._extents[number] = _Extent(self._size(number), self._memory(number))
        return extent

    def _add(self, number: int, size: int) -> bool:
        """Count bytes of an extent; whether it is whole now. The lock is held."""
        extent = self._extent(number)
        self._missing -= size
        extent.missing -= size
        if not extent.missing:
            del self._extents[number]
        return not extent.missing

    def _pass_whole(self) -> None:
        """Pass on all extents that are whole and come next, unless another thread is at it."""
        with self._lock:
            if self._passing or self._next not in self._whole:
                return
            self._passing = True
            after: Whole | None = self._whole.pop(self._next)
        while after is not None:
            try:
                self._pass(self._next, after)
            except BaseException:
                with self._lock:
                    self._passing = False
                    self._lock.notify_all()
                raise
            with self._lock:
                self._next += 1
                after = self._whole.pop(self._next, None)
                self._passing = after is not None
                self._lock.notify_all()

    def _pass_all(self) -> None:
        """Pass on what is left of a file that is whole."""
        while self._next < self._count:
            self._pass_whole()
            with self._lock:
                while self._passing:  # another thread is at an extent
                    self._lock.wait()

    def _used(self, whole: Whole, memory: memoryview) -> None:
        """Count a use of an extent's memory, which the last one gives back."""
        with self._lock:
            whole.unused -= 1
            if not whole.unused:
                self._buffers.give(memory)


class ExtentFile(Assembly):
    """A new file on disk, in large aligned extents.

    It is hashed in the order of its bytes. If the hash waits for an extent, those that come too early
    are read back later.

    Whole extents go to the disk past the page cache (O_DIRECT): the kernel neither copies them nor
    looks for pages for them, which is most of the time of a usual write.
    """

    def __init__(
        self,
        path: Path,
        nbytes: int,
        buffers: Buffers,
        *,
        hashes: Hashes | None = None,
        scattered: Iterable[tuple[int, int]] = (),
        direct: bool = True,
    ) -> None:
        """Create the file.

        scattered: (begin, end) of bytes that `put_runs` writes: their extents are not assembled.
        direct:    write past the page cache, if the file system can. Not for what is read soon.
        """
        super().__init__(nbytes, buffers, hashes)
        self._path = path
        self._scattered = {
            number for begin, end in scattered if begin < end for number in _numbers(begin, end)
        }
        self._pending = 0  # extents that are being written by another thread
        # through the page cache the kernel lets one writer at a time into a file: who waits for this
        # lock sleeps, who waits for the kernel's spins
        self._turn = threading.Lock()
        self._piece_fd = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._direct = direct
        with disk_errors(path):
            try:
                self._fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._direct = False
                self._fd = os.open(path, flags, 0o666)

    def put_runs(self, position: int, data: memoryview, run: int, step: int) -> None:
        """Put runs of `run` bytes at positions `step` apart, which are scattered bytes of the file."""
        view = memoryview(data).cast("B")
        sizes = Counter[int]()
        for start in range(0, len(view), max(1, run)):
            self._write_piece(view[start : start + run], position)
            for number in _numbers(position, position + run):
                begin = max(position, number * EXTENT)
                sizes[number] += min(position + run, (number + 1) * EXTENT) - begin
            position += step
        assert sizes.keys() <= self._scattered, self._path
        with self._lock:
            whole = [number for number, size in sizes.items() if self._add(number, size)]
        for number in whole:
            self._write_whole(number, None)

    def finish(self) -> None:
        """Make the file durable, hash what is left, and close it. Every byte was put once."""
        assert not self._missing, (self._path, self._missing, self._nbytes)
        self._wait()
        if self._error is not None:
            raise self._error
        with disk_errors(self._path):
            os.ftruncate(self._fd, self._nbytes)  # the last extent was filled up with zeros
            os.fsync(self._fd)
        if self._hashes is not None:
            self._pass_all()
        self.close()

    def close(self) -> None:
        """Close the file, whole or not. Twice does no harm."""
        self._wait()
        fds = self._fd, self._piece_fd
        self._fd = self._piece_fd = -1
        for fd in fds:
            if fd >= 0:  # closed twice, it could be another thread's file by then
                with disk_errors(self._path):
                    os.close(fd)

    def _memory(self, number: int) -> memoryview | None:
        return None if number in self._scattered else self._buffers.take()

    def _write_whole(self, number: int, memory: memoryview | None) -> None:
        """Write an extent that is whole, if it was assembled in memory; hash what can be hashed."""
        if self._error is not None:
            raise self._error
        whole = Whole(memory, 1 if self._hashes is None else 2)
        if self._hashes is not None:
            with self._lock:
                self._whole[number] = whole
                # who hashes needs no buffer to go on
                while memory is not None and self._passing and not self._buffers.plenty:
                    self._lock.wait()
        if memory is not None:
            writing = self._buffers.writing if self._buffers.plenty else None
            if writing is None:
                self._store(number, memory, whole)
            else:
                self._submit(writing, number, memory, whole)
        self._pass_whole()

    def _submit(self, writing: Executor, number: int, memory: memoryview, whole: Whole) -> None:
        with self._lock:
            self._pending += 1
        try:
            writing.submit(self._write_later, number, memory, whole)
        except RuntimeError:  # no thread can be started
            self._write_later(number, memory, whole)

    def _write_later(self, number: int, memory: memoryview, whole: Whole) -> None:
        try:
            self._store(number, memory, whole)
        except BaseException as error:  # raised by whoever works on the file next
            self._error = self._error or error
        finally:
            with self._lock:
                self._pending -= 1
                self._lock.notify_all()

    def _store(self, number: int, memory: memoryview, whole: Whole) -> None:
        self._write_extent(number, memory)
        with self._lock:
            waits = self._whole.get(number) is whole
            if waits and not self._passing and number != self._next and not self._buffers.plenty:
                whole.memory, whole.unused = None, 1
        self._used(whole, memory)

    def _wait(self) -> None:
        """Wait until no extent is being written by another thread."""
        with self._lock:
            while self._pending:
                self._lock.wait()

    def _write_extent(self, number: int, memory: memoryview) -> None:
        size = self._size(number)
        padded = -(-size // _ALIGNMENT) * _ALIGNMENT
        memory[size:padded] = bytes(padded - size)
        done = 0
        while done < padded:  # a write may be short
            direct = self._direct
            try:
                with nullcontext() if direct else self._turn:
                    done += os.pwrite(self._fd, memory[done:padded], number * EXTENT + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise machine_error(error, self._path) from None
                # the file system refuses O_DIRECT only now, or a short write ended within a block
                flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                self._direct = False

    def _write_piece(self, piece: memoryview, position: int) -> None:
        done, fd = 0, self._pieces()
        with self._turn, disk_errors(self._path):
            while done < len(piece):
                done += os.pwrite(fd, piece[done:], position + done)

    def _pieces(self) -> int:
        """The file as it is written by pieces and read back: through the page cache.

        The kernel keeps both ways together, as no page is part of two extents.
        """
        with self._lock, disk_errors(self._path):
            if self._piece_fd < 0:
                self._piece_fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            return self._piece_fd

    def _pass(self, number: int, whole: Whole) -> None:
        assert self._hashes is not None
        size, memory = self._size(number), whole.memory
        if memory is not None:
            self._hashes.update(memory[:size])
            self._used(whole, memory)
            return
        block, done, fd = memoryview(bytearray(min(size, _READ))), 0, self._pieces()
        while done < size:
            with disk_errors(self._path):
                n = os.preadv(fd, [block[: size - done]], number * EXTENT + done)
            if n == 0:
                raise MachineError(
                    "file became shorter while it was written",
                    where=str(self._path),
                    fix="let nobody write to the output",
                )
            self._hashes.update(block[:n])
            done += n


def _numbers(begin: int, end: int) -> range:
    """The extents that hold bytes [begin, end)."""
    return range(begin // EXTENT, -(-end // EXTENT))
