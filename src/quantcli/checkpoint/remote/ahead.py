"""Blocks of remote files that are fetched before they are read, in memory of a limited size.

Three kinds of reads:
* What is announced (`want`), and what follows on what is read, is fetched in pieces by a few threads.
  A piece leaves memory when all of it was read.
* Short reads fetch the page around them. Pages are kept for a while: norms and scales lie together.
* Everything else is fetched into the reader's own memory.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass, field

from quantcli.checkpoint.remote.origin import Origin, Version
from quantcli.checkpoint.remote.reading import read_range

LIMIT = 17 * 2**20  # bytes of pieces: four large ones
CONNECTIONS = 4
PIECE = 4 * 2**20  # bytes that are asked for at once
PAGE = 2**16
_MOST_PAGES = 32
_GAP = 2**16  # bytes that nobody wants, between two pieces that are fetched as one
_MOST_STREAMS = 32  # places where a read ended, and where the next may begin
_IDLE = 5.0  # seconds after which a thread with nothing to do ends

Key = tuple[Origin, str, Version]


@dataclass(eq=False)
class _Piece:
    """Bytes [begin, end) of a file that are wanted.

    is_page: whether it becomes a page. state: waiting, coming, here. left: bytes that were asked for
    and that nobody has read yet. age: bytes that had been read of all files when it was complete.
    """

    key: Key
    begin: int
    end: int
    left: int
    is_page: bool = False
    state: str = "waiting"
    data: memoryview = field(default_factory=lambda: memoryview(b""))
    age: int = 0
    error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def is_large(self) -> bool:
        """Whether it is read into a buffer that is used again."""
        return self.nbytes > PIECE // 2

    @property
    def memory(self) -> int:
        """Bytes that it takes."""
        return PIECE + PAGE if self.is_large else self.nbytes


class Reader:
    """Reads remote files for all threads of a process."""

    def __init__(self, limit: int = LIMIT, connections: int = CONNECTIONS) -> None:
        self.limit = limit
        self._connections = connections
        self._changed = threading.Condition()
        self._waiting: deque[_Piece] = deque()
        self._pieces: dict[Key, list[_Piece]] = {}
        self._pages: OrderedDict[tuple[Key, int], bytes] = OrderedDict()
        self._streams: OrderedDict[tuple[Key, int], int] = OrderedDict()  # an end -> bytes of the run
        self._buffers: list[bytearray] = []
        self.nbytes = 0  # of memory that pieces take which are coming or here
        self._read = 0  # bytes that were read in all
        self._threads = self._free = 0

    def want(self, origin: Origin, name: str, version: Version, begin: int, end: int) -> None:
        """Fetch bytes [begin, end) soon. It is advice: it does not wait, and it does not fail."""
        with self._changed:
            self._want((origin, name, version), begin, min(end, version.nbytes))

    def _want(self, key: Key, begin: int, end: int) -> None:
        if self.limit < 2 * PIECE:
            return
        for piece in sorted(self._pieces.get(key, []), key=lambda piece: piece.begin):
            if begin < piece.begin < end:
                self._queue(key, begin, piece.begin)
            if piece.begin <= begin < piece.end or begin < piece.begin < end:
                begin = piece.end
        if begin < end:
            self._queue(key, begin, end)

    def _queue(self, key: Key, begin: int, end: int) -> None:
        """Add to what is waiting: to a piece right before, or as pieces of their own."""
        for piece in self._pieces.get(key, []):
            near = not piece.is_page and 0 <= begin - piece.end <= _GAP
            if near and piece.state == "waiting" and end - piece.begin <= PIECE + PAGE:
                piece.end = end
                piece.left += end - begin
                return
        if end - begin < PAGE:
            for start in range(begin // PAGE * PAGE, end, PAGE):
                if (key, start) not in self._pages:
                    self._add(_Piece(key, start, min(start + PAGE, key[2].nbytes), 0, is_page=True))
            return
        for start in range(begin, end, PIECE):
            self._add(_Piece(key, start, min(end, start + PIECE), min(end - start, PIECE)))

    def _add(self, piece: _Piece) -> None:
        self._waiting.append(piece)
        self._pieces.setdefault(piece.key, []).append(piece)
        self._wake()

    def _wake(self) -> None:
        """Have a thread for what is waiting."""
        if len(self._waiting) > self._free and self._threads < self._connections:
            with suppress(RuntimeError):  # no thread can be started: whoever reads it fetches it
                threading.Thread(target=self._serve, name="quantcli-remote", daemon=True).start()
                self._threads += 1
        self._changed.notify_all()

    def _next(self) -> _Piece | None:
        """The next piece to fetch, if there is memory for it."""
        if not self._waiting:
            return None
        if self.nbytes + self._waiting[0].memory > self.limit:
            self._forget()
        return self._waiting[0] if self.nbytes + self._waiting[0].memory <= self.limit else None

    def _forget(self) -> None:
        """Drop pieces that nobody came for while much else was read."""
        for pieces in [*self._pieces.values()]:
            for piece in [*pieces]:
                if piece.state == "here" and self._read - piece.age > 4 * self.limit:
                    self._drop(piece)

    def _serve(self) -> None:
        """Fetch pieces until there are none for a while."""
        with self._changed:
            while True:
                piece = self._next()
                if piece is None:
                    self._free += 1
                    woken = self._changed.wait(_IDLE)
                    self._free -= 1
                    if not woken and self._next() is None:
                        break
                    continue
                self._waiting.remove(piece)
                self._begin(piece)
                self._changed.release()
                try:
                    self._fetch(piece)
                finally:
                    self._changed.acquire()
            self._threads -= 1

    def _begin(self, piece: _Piece) -> None:
        """Take memory for a piece. The lock is held."""
        piece.state = "coming"
        self.nbytes += piece.memory
        if not piece.is_large:
            piece.data = memoryview(bytearray(piece.nbytes))
            return
        buffer = self._buffers.pop() if self._buffers else bytearray(PIECE + PAGE)
        piece.data = memoryview(buffer)[: piece.nbytes]

    def _fetch(self, piece: _Piece) -> None:
        origin, name, version = piece.key
        try:
            read_range(origin, name, version, piece.begin, piece.data)
        except BaseException as error:
            piece.error = error
        with self._changed:
            piece.state, piece.age = "here", self._read
            if piece.is_page:
                if piece.error is None:
                    self._keep_page(piece.key, piece.begin, bytes(piece.data))
                self._drop(piece)  # whoever waits reads the page, or meets the error itself
            self._changed.notify_all()

    def _drop(self, piece: _Piece) -> None:
        """Give the memory of a piece back. The lock is held."""
        self.nbytes -= piece.memory
        buffer = piece.data.obj
        piece.data = memoryview(b"")
        spare = len(self._buffers) < self._connections
        if spare and isinstance(buffer, bytearray) and len(buffer) > PIECE:
            self._buffers.append(buffer)
        self._pieces[piece.key].remove(piece)
        if not self._pieces[piece.key]:
            del self._pieces[piece.key]
        self._wake()

    def read(
        self, origin: Origin, name: str, version: Version, first: int, block: memoryview, bound: int
    ) -> None:
        """Fill `block` with the bytes of a file from `first` on, which it has.

        bound: the end of what is read in one go, such as a tensor. Raises MachineError and InputError,
        also for a piece that was fetched before.
        """
        key, done = (origin, name, version), 0
        while done < len(block):
            at, rest = first + done, block[done:]
            with self._changed:
                piece = self._piece(key, at)
                if piece is None:
                    ahead = (p.begin - at for p in self._pieces.get(key, []) if p.begin > at)
                    nbytes = min([len(rest), *ahead])
            if piece is not None:
                done += self._from_piece(piece, at, rest)
            elif nbytes < PAGE:
                done += self._from_page(key, at, rest[:nbytes])
            else:
                read_range(origin, name, version, at, rest[:nbytes])
                done += nbytes
        with self._changed:
            self._read += len(block)
            self._follow(key, first, first + len(block), bound)

    def _piece(self, key: Key, at: int) -> _Piece | None:
        """The piece that has a byte."""
        pieces = self._pieces.get(key, [])
        return next((piece for piece in pieces if piece.begin <= at < piece.end), None)

    def _from_piece(self, piece: _Piece, at: int, rest: memoryview) -> int:
        """Copy from a piece, which the reader fetches itself if nobody has begun to."""
        with self._changed:
            own = piece.state == "waiting"
            if own:
                self._waiting.remove(piece)
                self._begin(piece)
        if own:
            self._fetch(piece)
        with self._changed:
            while piece.state != "here":
                self._changed.wait()
            if not piece.data:
                return 0  # another reader took the last of it
            if piece.error is not None:
                self._drop(piece)
                raise piece.error
            n = min(len(rest), piece.end - at)
            data = piece.data[at - piece.begin : at - piece.begin + n]
            rest[:n] = data
            del data
            piece.left -= n
            if piece.left <= 0:
                self._drop(piece)
            return n

    def _from_page(self, key: Key, at: int, rest: memoryview) -> int:
        """Copy from a page, which is fetched if it is not here."""
        origin, name, version = key
        begin = at // PAGE * PAGE
        with self._changed:
            page = self._pages.get((key, begin))
        if page is None:
            fresh = bytearray(min(PAGE, version.nbytes - begin))
            read_range(origin, name, version, begin, memoryview(fresh))
            page = bytes(fresh)
            with self._changed:
                self._keep_page(key, begin, page)
        data = page[at - begin : at - begin + len(rest)]
        rest[: len(data)] = data
        return len(data)

    def _keep_page(self, key: Key, begin: int, page: bytes) -> None:
        self._pages[key, begin] = page
        while len(self._pages) > _MOST_PAGES:
            self._pages.popitem(last=False)

    def _follow(self, key: Key, begin: int, end: int, bound: int) -> None:
        """Fetch what follows on a run of reads, as much as was read of it, up to two pieces."""
        run = self._streams.pop((key, begin), 0) + end - begin
        self._streams[key, end] = run
        while len(self._streams) > _MOST_STREAMS:
            self._streams.popitem(last=False)
        if run > end - begin and run >= PAGE and end < bound:
            self._want(key, end, min(bound, end + min(run, 2 * PIECE)))


def most_memory() -> int:
    """Bytes that the blocks and pages of a process take at most."""
    return LIMIT + CONNECTIONS * (PIECE + PAGE) + _MOST_PAGES * PAGE


READER = Reader()


def _start_again() -> None:
    """A fork has none of its parent's threads, which were fetching."""
    READER.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_start_again)
