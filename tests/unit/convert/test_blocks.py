"""Blocks of the source that several plans share."""

import random
import threading
from pathlib import Path

import pytest

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec
from quantcli.convert.blocks import BLOCK, SharedBlocks

FILE = Path("model.safetensors")
NBYTES = 3 * BLOCK + 100


class Source:
    """A tensor of random bytes, and the ranges that were read of it."""

    def __init__(self) -> None:
        self.stored = StoredTensor(TensorSpec("w", "U8", (NBYTES,)), FILE, 8)
        self.content = random.Random(0).randbytes(NBYTES)
        self.reads: list[tuple[int, int]] = []
        self.fail = False

    def fetch(self, offset: int, into: memoryview) -> None:
        self.reads.append((offset, len(into)))
        if self.fail:
            raise OSError("gone")
        into[:] = self.content[offset : offset + len(into)]

    def read(self, blocks: SharedBlocks, offset: int, nbytes: int) -> bytes:
        into = bytearray(nbytes)
        blocks.read(self.stored, offset, memoryview(into), self.fetch)
        return bytes(into)


def test_each_byte_is_read_once_whatever_ranges_threads_ask_for():
    source, blocks = Source(), SharedBlocks({FILE}, NBYTES)
    wrong = []

    def work(seed):
        ranges = random.Random(seed)
        for _ in range(40):
            begin = ranges.randrange(NBYTES)
            nbytes = ranges.randrange(1, NBYTES - begin + 1)
            if source.read(blocks, begin, nbytes) != source.content[begin : begin + nbytes]:
                wrong.append((begin, nbytes))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert source.read(blocks, 0, NBYTES) == source.content
    assert blocks.fetched == sum(nbytes for _, nbytes in source.reads) == NBYTES
    assert all(
        blocks.unread(source.stored, at, at + 1) == (at + BLOCK, at + BLOCK) for at in (0, BLOCK)
    )


def test_a_long_range_is_one_read():
    source, blocks = Source(), SharedBlocks({FILE}, NBYTES)
    assert source.read(blocks, 10, NBYTES - 10) == source.content[10:]
    assert source.reads == [(0, NBYTES)]


def test_blocks_that_were_not_used_for_longest_go_first():
    source, blocks = Source(), SharedBlocks({FILE}, 2 * BLOCK)
    for number in (0, 1, 0, 2, 0, 1):
        source.read(blocks, number * BLOCK, 10)
    assert [offset // BLOCK for offset, _ in source.reads] == [0, 1, 2, 1]


def test_a_read_that_fails_is_tried_again():
    source, blocks = Source(), SharedBlocks({FILE}, NBYTES)
    source.fail = True
    with pytest.raises(OSError, match="gone"):
        source.read(blocks, 0, 10)
    source.fail = False
    assert source.read(blocks, 0, 10) == source.content[:10]
    assert blocks.fetched == BLOCK


def test_files_that_are_not_of_the_source_are_read_as_ever():
    source, blocks = Source(), SharedBlocks(set(), NBYTES)
    for _ in range(2):
        assert source.read(blocks, 5, 10) == source.content[5:15]
    assert source.reads == [(5, 10)] * 2
    assert blocks.unread(source.stored, 5, 15) == (5, 15)
