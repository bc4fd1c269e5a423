"""Blocks of the source that several plans need at about the same time: each is read once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from quantcli.checkpoint.header import StoredTensor

BLOCK = 2**20  # bytes
Fetch = Callable[[int, memoryview], None]  # fills memory from an offset of a stored tensor
_Key = tuple[Path, int, int, int]  # the file, where the tensor begins, its bytes, the block's number


@dataclass(eq=False, slots=True)
class _Block:
    """Bytes of a tensor. data is None until they are read, and after that failed."""

    ready: threading.Event = field(default_factory=threading.Event)
    data: memoryview | None = None


class SharedBlocks:
    """The blocks that were used last, at most `limit` bytes and what is being read. Threads share it.

    A block is a piece of a stored tensor, so that nothing is read that no plan asks for. A thread that
    needs a block which another one is reading waits for it.
    """

    def __init__(self, files: Collection[Path], limit: int) -> None:
        """files: those of the source; others are read as they would be without this."""
        self._files = frozenset(files)
        self._limit = limit
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._lock = threading.Lock()
        self._nbytes = 0  # bytes of blocks that are ready
        self.fetched = 0  # bytes that were read from the source

    def read(self, stored: StoredTensor, offset: int, into: memoryview, fetch: Fetch) -> None:
        """Fill `into` from byte `offset` of a stored tensor; `fetch` reads what is not here.

        Raises what `fetch` raises; the next reader tries again.
        """
        end = offset + len(into)
        if stored.file not in self._files:
            fetch(offset, into)
            return
        place = offset
        while place < end:
            number = place // BLOCK
            block, claimed = self._claim(stored, number, (end - 1) // BLOCK)
            if claimed:
                self._fetch(stored, number, claimed, fetch)
            block.ready.wait()
            data = block.data
            if data is None:
                continue  # the thread that read it failed
            begin = place - number * BLOCK
            piece = data[begin : begin + end - place]
            into[place - offset : place - offset + len(piece)] = piece
            place += len(piece)

    def unread(self, stored: StoredTensor, begin: int, end: int) -> tuple[int, int]:
        """The blocks with bytes [begin, end) of a stored tensor, without those at both ends that are
        here or are being read: their first byte, and the one behind their last."""
        if stored.file not in self._files:
            return begin, end
        first, last = begin // BLOCK, -(-end // BLOCK)
        with self._lock:
            while first < last and _key(stored, first) in self._blocks:
                first += 1
            while first < last and _key(stored, last - 1) in self._blocks:
                last -= 1
        return first * BLOCK, min(last * BLOCK, stored.spec.nbytes)

    def _claim(self, stored: StoredTensor, number: int, last: int) -> tuple[_Block, list[_Block]]:
        """A block, and those from it on that this thread must read: none if it is here already."""
        claimed: list[_Block] = []
        with self._lock:
            found = self._blocks.get(_key(stored, number))
            if found is not None:
                self._blocks.move_to_end(_key(stored, number))
                return found, claimed
            for each in range(number, last + 1):
                if _key(stored, each) in self._blocks:
                    break
                claimed.append(self._blocks.setdefault(_key(stored, each), _Block()))
        return claimed[0], claimed

    def _fetch(self, stored: StoredTensor, first: int, blocks: list[_Block], fetch: Fetch) -> None:
        """Read blocks that this thread has claimed."""
        begin = first * BLOCK
        memory = memoryview(bytearray(min(len(blocks) * BLOCK, int(stored.spec.nbytes) - begin)))
        keys = [_key(stored, number) for number in range(first, first + len(blocks))]
        try:
            fetch(begin, memory)
        except BaseException:
            with self._lock:
                for key in keys:
                    del self._blocks[key]
            for block in blocks:
                block.ready.set()
            raise
        for number, block in enumerate(blocks):
            block.data = memory[number * BLOCK : (number + 1) * BLOCK]
        with self._lock:
            self.fetched += len(memory)
            self._nbytes += len(memory)
            self._evict()
        for block in blocks:
            block.ready.set()

    def _evict(self) -> None:
        """Let go of the blocks that were not used for longest."""
        for key, block in [*self._blocks.items()]:
            if self._nbytes <= self._limit:
                return
            if block.data is not None:
                self._nbytes -= len(block.data)
                del self._blocks[key]


def _key(stored: StoredTensor, number: int) -> _Key:
    return stored.file, stored.offset, stored.spec.nbytes, number
