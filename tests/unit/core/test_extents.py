"""Files that are assembled from pieces: their bytes, their hashes, and what goes wrong on disks."""

import errno
import fcntl
import hashlib
import os
import random
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from quantcli.core import extents
from quantcli.core.disk import Hashes, file_entry
from quantcli.core.errors import MachineError
from quantcli.core.extents import Buffers, ExtentFile

EXTENT = 16 * 1024
SIZES = [1, 4095, 4096, EXTENT - 1, EXTENT, EXTENT + 1, 3 * EXTENT, 5 * EXTENT + 4097]


@pytest.fixture(autouse=True)
def small_extents(monkeypatch):
    monkeypatch.setattr(extents, "EXTENT", EXTENT)
    monkeypatch.setattr(extents, "_SMALL", 512)
    monkeypatch.setattr(extents, "_READ", 3000)


def content(nbytes):
    return random.Random(nbytes).randbytes(nbytes)


def pieces_of(nbytes, most, seed=0):
    """(begin, end) of pieces that make a file, in a random order."""
    order, pieces, begin = random.Random(seed), [], 0
    while begin < nbytes:
        end = min(nbytes, begin + order.randint(1, most))
        pieces.append((begin, end))
        begin = end
    order.shuffle(pieces)
    return pieces


def write(path, data, pieces, buffers=None, **options):
    """Write a file in pieces; returns its hashes."""
    hashes = Hashes()
    file = ExtentFile(path, len(data), buffers or Buffers(8, 2), hashes=hashes, **options)
    try:
        for begin, end in pieces:
            file.put(begin, memoryview(data)[begin:end])
        file.finish()
    finally:
        file.close()
    return hashes.hex()


def check(path, data, hashes):
    assert path.read_bytes() == data
    assert {"bytes": len(data), **hashes} == file_entry(path, checksum=True)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("most", [700, EXTENT // 2, 3 * EXTENT])
def test_pieces_in_any_order(tmp_path, nbytes, most):
    data = content(nbytes)
    check(tmp_path / "x", data, write(tmp_path / "x", data, pieces_of(nbytes, most)))


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_with_too_few_buffers_pieces_are_written_at_once(tmp_path, limit, monkeypatch):
    """Extents without a buffer are read back for their hash, and no buffer is lost."""
    data, read, real = content(9 * EXTENT + 5), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(real(*args)) or read[-1])
    buffers = Buffers(limit, 1)
    check(tmp_path / "x", data, write(tmp_path / "x", data, pieces_of(len(data), 900), buffers))
    assert sum(read) > 3 * EXTENT
    assert [buffers.take() is None for _ in range(limit + 1)] == [False] * limit + [True]


def test_in_order_nothing_is_read_back_and_one_buffer_is_enough(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    data = content(4 * EXTENT + 77)
    pieces = sorted(pieces_of(len(data), 900))
    check(tmp_path / "x", data, write(tmp_path / "x", data, pieces, Buffers(1, 1)))


def test_whole_extents_are_one_aligned_write_each(tmp_path, monkeypatch):
    calls, real = [], os.pwrite

    def pwrite(fd, view, position):
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        calls.append((len(view), position, bool(flags & os.O_DIRECT)))
        return real(fd, view, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = content(2 * EXTENT + 4097)
    write(tmp_path / "x", data, pieces_of(len(data), 3000), direct=False)
    assert sorted(position for _, position, _ in calls) == [0, EXTENT, 2 * EXTENT]
    assert sorted(size for size, _, _ in calls) == [8192, EXTENT, EXTENT]
    assert not any(direct for *_, direct in calls)


def test_a_file_system_that_refuses_to_open_directly(tmp_path, monkeypatch):
    real, flags = os.open, []

    def refusing(path, flag, *mode):
        flags.append(flag)
        if flag & os.O_DIRECT == os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flag, *mode)

    monkeypatch.setattr(os, "open", refusing)
    data = content(3 * EXTENT + 1)
    check(tmp_path / "x", data, write(tmp_path / "x", data, pieces_of(len(data), 5000)))
    assert flags[0] & os.O_DIRECT == os.O_DIRECT
    assert flags[1] & os.O_DIRECT == 0


def test_a_file_system_that_refuses_to_write_directly(tmp_path, monkeypatch):
    real, refused = os.pwrite, []

    def refusing(fd, view, position):
        if not refused:
            refused.append(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT == 0
        return real(fd, view, position)

    monkeypatch.setattr(os, "pwrite", refusing)
    data = content(3 * EXTENT + 1)
    hashes = write(tmp_path / "x", data, pieces_of(len(data), 5000))
    assert refused
    check(tmp_path / "x", data, hashes)


def test_an_invalid_write_is_an_error_if_it_was_not_direct(tmp_path, monkeypatch):
    def refusing(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refusing)
    with pytest.raises(MachineError, match="invalid argument"):
        write(tmp_path / "x", b"abc", [(0, 3)])


@pytest.mark.parametrize("most", [7, 4096, 5000])
def test_short_writes_go_on(tmp_path, monkeypatch, most):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: real(fd, view[:most], at))
    data = content(2 * EXTENT + 100)
    check(tmp_path / "x", data, write(tmp_path / "x", data, pieces_of(len(data), 5000)))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", [0, 2])
def test_failing_writes(tmp_path, monkeypatch, error, call):
    real, calls = os.pwrite, []

    def failing(*args):
        calls.append(args)
        if len(calls) > call:
            raise OSError(error, os.strerror(error))
        return real(*args)

    opened = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    monkeypatch.setattr(os, "pwrite", failing)
    data = content(5 * EXTENT)
    with pytest.raises(MachineError, match=os.strerror(error).lower()) as caught:
        write(tmp_path / "x", data, pieces_of(len(data), 5000))
    assert caught.value.where == str(tmp_path / "x")
    assert set(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208


def test_a_file_that_someone_cuts_off_is_noticed_when_it_is_read_back(tmp_path):
    data = content(4 * EXTENT)
    file = ExtentFile(tmp_path / "x", len(data), Buffers(0, 0), hashes=Hashes())
    file.put(EXTENT, memoryview(data)[EXTENT:])
    os.truncate(tmp_path / "x", 100)
    with pytest.raises(MachineError, match="shorter"):
        file.put(0, memoryview(data)[:EXTENT])
    file.close()


def test_a_missing_byte_is_missed(tmp_path):
    file = ExtentFile(tmp_path / "x", 3 * EXTENT, Buffers(2, 0))
    file.put(0, bytes(EXTENT + 5))
    file.put(EXTENT + 6, bytes(2 * EXTENT - 6))
    with pytest.raises(AssertionError):
        file.finish()
    file.close()
    file.close()


@pytest.mark.parametrize("limit", [2, 40])
def test_threads_share_a_file(tmp_path, limit):
    data = content(40 * EXTENT + 123)
    hashes = Hashes()
    file = ExtentFile(tmp_path / "x", len(data), Buffers(limit, 1), hashes=hashes)
    pieces = pieces_of(len(data), 4000)

    def work(number):
        for begin, end in pieces[number::4]:
            file.put(begin, memoryview(data)[begin:end])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.finish()
    check(tmp_path / "x", data, hashes.hex())


def test_finish_waits_for_a_thread_that_hashes(tmp_path, monkeypatch):
    """The extent that another thread hashes is not hashed twice, and the file is not closed early."""
    begun, go, real = threading.Event(), threading.Event(), Hashes.update

    def slow(self, data):
        begun.set()
        go.wait(60)
        real(self, data)

    monkeypatch.setattr(Hashes, "update", slow)
    data, hashes = content(2 * EXTENT), Hashes()
    file = ExtentFile(tmp_path / "x", len(data), Buffers(4, 1), hashes=hashes)
    first = threading.Thread(target=file.put, args=(0, memoryview(data)[:EXTENT]))
    first.start()
    assert begun.wait(60)
    file.put(EXTENT, memoryview(data)[EXTENT:])
    assert file.backlog == 1
    last = threading.Thread(target=file.finish)
    last.start()
    go.set()
    first.join()
    last.join()
    monkeypatch.undo()
    check(tmp_path / "x", data, hashes.hex())


def test_runs_next_to_assembled_extents(tmp_path):
    """A matrix by columns begins and ends within extents that hold other bytes."""
    begin, rows, step = 5000, 90, 400
    end = begin + rows * step
    data = content(end + 7000)
    hashes = Hashes()
    file = ExtentFile(tmp_path / "x", len(data), Buffers(4, 1), hashes=hashes, scattered=[(begin, end)])
    file.put(end, memoryview(data)[end:])
    for first, width in ((100, 300), (0, 100)):
        runs = [data[begin + row * step + first :][:width] for row in range(rows)]
        file.put_runs(begin + first, memoryview(b"".join(runs)), width, step)
    file.put(0, memoryview(data)[:begin])
    file.finish()
    check(tmp_path / "x", data, hashes.hex())


def test_runs_outside_of_the_announced_bytes_are_an_error(tmp_path):
    file = ExtentFile(tmp_path / "x", 2 * EXTENT, Buffers(4, 1), scattered=[(0, 10)])
    with pytest.raises(AssertionError):
        file.put_runs(EXTENT - 1, memoryview(bytes(2)), 2, 2)
    file.close()


@pytest.fixture
def writing():
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize("limit", [0, 3, 40])
def test_a_thread_of_its_own_writes(tmp_path, writing, limit):
    data = content(20 * EXTENT + 123)
    pieces = pieces_of(len(data), 4000)
    buffers = Buffers(limit, 1, writing)
    check(tmp_path / "x", data, write(tmp_path / "x", data, pieces, buffers))
    taken = [buffers.take() for _ in range(limit)]
    assert None not in taken


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("x")])
def test_what_goes_wrong_in_the_thread_that_writes_is_raised(tmp_path, monkeypatch, writing, error):
    real, calls = os.pwrite, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(os, "pwrite", failing)
    data = content(6 * EXTENT)
    kind = MachineError if isinstance(error, OSError) else KeyError
    with pytest.raises(kind):
        write(tmp_path / "x", data, pieces_of(len(data), 5000), Buffers(8, 1, writing))


def test_a_file_is_not_closed_under_the_thread_that_writes(tmp_path, monkeypatch, writing):
    begun, go, real, done = threading.Event(), threading.Event(), os.pwrite, []

    def slow(*args):
        begun.set()
        go.wait(60)
        done.append(real(*args))
        return done[-1]

    monkeypatch.setattr(os, "pwrite", slow)
    file = ExtentFile(tmp_path / "x", 2 * EXTENT, Buffers(8, 1, writing))
    file.put(0, bytes(EXTENT))
    assert begun.wait(60)
    closing = threading.Thread(target=file.close)
    closing.start()
    assert closing.is_alive()
    go.set()
    closing.join()
    assert done == [EXTENT]


def test_no_thread_and_no_memory(tmp_path, monkeypatch):
    """The file is written by who made it, and piece by piece."""
    monkeypatch.setattr(extents, "EXTENT", 8192)

    class Refuses(Executor):
        def submit(self, *_):
            raise RuntimeError("can't start new thread")

    data = bytes(range(256)) * 100
    for kind in ("thread", "memory"):
        if kind == "memory":
            monkeypatch.setattr(extents.mmap, "mmap", refuse_memory)
        hashes = Hashes()
        buffers = Buffers(8, 2, Refuses())
        file = ExtentFile(tmp_path / kind, len(data), buffers, hashes=hashes)
        for start in range(0, len(data), 1000):
            file.put(start, data[start : start + 1000])
        file.finish()
        assert (tmp_path / kind).read_bytes() == data
        assert hashes.hex()["sha256"] == hashlib.sha256(data).hexdigest()
        assert buffers._left == 8


def refuse_memory(*_):
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_others_wait_for_the_hash(tmp_path, monkeypatch):
    """With few buffers nothing is read back, as long as the next extent to hash is there."""
    monkeypatch.setattr(extents, "EXTENT", 8192)
    data = random.Random(1).randbytes(100 * 8192)
    slow, began = threading.Event(), threading.Event()

    class Slow(Hashes):
        def update(self, piece):
            began.set()
            slow.wait()
            super().update(piece)

    def no_reading(*_):
        raise AssertionError

    monkeypatch.setattr(os, "preadv", no_reading)
    hashes = Slow()
    buffers = Buffers(6, 2)
    file = ExtentFile(tmp_path / "file", len(data), buffers, hashes=hashes)

    def put(numbers):
        for number in numbers:
            file.put(number * 8192, data[number * 8192 : (number + 1) * 8192])

    first = threading.Thread(target=put, args=([0],))
    first.start()
    began.wait()
    second = threading.Thread(target=put, args=(range(1, 100),))
    second.start()
    while buffers.plenty:
        time.sleep(0.001)
    slow.set()
    first.join()
    second.join()
    file.finish()
    assert hashes.hex()["sha256"] == hashlib.sha256(data).hexdigest()
