"""Shards and small files: whole and in place, or not there."""

import errno
import hashlib
import os
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantcli.checkpoint.spec import TensorSpec
from quantcli.checkpoint.writer import ShardWriter
from quantcli.core.disk import file_entry, machine_error, write_file
from quantcli.core.errors import MachineError

SPECS = (TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "I8", (4,)), TensorSpec("e", "I8", (0,)))
MATRIX = (TensorSpec("a", "I32", (5, 7)),)


def test_shard_in_any_order_of_writes(tmp_path):
    writer = ShardWriter(tmp_path, "x.safetensors", SPECS)
    writer.write("b", 2, b"\x03\x04")
    writer.write("a", 12, bytes(12))
    writer.write("b", 0, memoryview(b"\x01\x02"))
    assert [path.name for path in tmp_path.iterdir()] == [".x.safetensors.writing"]
    writer.write("a", 0, bytes(12))
    assert writer.finish() == {"bytes": writer.nbytes}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert writer.path.stat().st_size == writer.nbytes
    loaded = load_file(writer.path)
    assert loaded["b"].tolist() == [1, 2, 3, 4]
    assert loaded["a"].tolist() == [[0.0] * 3] * 2
    assert loaded["e"].shape == (0,)


def columns_of(values, first, last):
    return memoryview(np.ascontiguousarray(values[:, first:last]))


def test_columns_of_a_matrix(tmp_path):
    """Neighbours keep their bytes; all columns together are one write."""
    values = np.arange(5 * 7, dtype="<i4").reshape(5, 7)
    specs = (TensorSpec("a", "I32", (5, 7)), TensorSpec("b", "I8", (4,)))
    writer = ShardWriter(tmp_path, "x.safetensors", specs, by_columns={"a"})
    writer.write_columns("a", 4, columns_of(values, 4, 7))
    writer.write("b", 0, b"\x01\x02\x03\x04")
    writer.write_columns("a", 0, columns_of(values, 0, 1))
    writer.write_columns("a", 1, columns_of(values, 1, 4))
    writer.finish()
    loaded = load_file(writer.path)
    assert loaded["a"].tolist() == values.tolist()
    assert loaded["b"].tolist() == [1, 2, 3, 4]


def test_missing_columns_are_missed(tmp_path):
    writer = ShardWriter(tmp_path, "x.safetensors", MATRIX, by_columns={"a"})
    writer.write_columns("a", 0, columns_of(np.zeros((5, 7), "<i4"), 0, 6))
    with pytest.raises(AssertionError):
        writer.finish()
    writer.abandon()


def test_all_columns_are_one_write_and_short_writes_go_on(tmp_path, monkeypatch):
    values, sizes, real = np.arange(35, dtype="<i4").reshape(5, 7), [], os.pwrite

    def short(fd, data, position):
        sizes.append(len(data))
        return real(fd, data[: max(1, len(data) // 2)], position)

    writer = ShardWriter(tmp_path, "x.safetensors", MATRIX, by_columns={"a"})
    monkeypatch.setattr(os, "pwrite", short)
    writer.write_columns("a", 0, columns_of(values, 0, 7))
    assert sizes[0] == 5 * 7 * 4
    writer.finish()
    assert load_file(writer.path)["a"].tolist() == values.tolist()
    sizes.clear()
    writer = ShardWriter(tmp_path, "y.safetensors", MATRIX, by_columns={"a"})
    sizes.clear()
    writer.write_columns("a", 0, columns_of(values, 0, 3))
    assert sizes[0] == 3 * 4
    writer.write_columns("a", 3, columns_of(values, 3, 7))
    writer.finish()
    assert load_file(writer.path)["a"].tolist() == values.tolist()


@pytest.mark.parametrize("columns", [(), ("a",)])
def test_entry_of_the_manifest(tmp_path, columns):
    """The hashes are those of the file, whether it was assembled or written by runs."""
    writer = ShardWriter(tmp_path, "x.safetensors", MATRIX, by_columns=columns, checksum=True)
    values = np.arange(35, dtype="<i4").reshape(5, 7)
    if columns:
        writer.write_columns("a", 3, columns_of(values, 3, 7))
        writer.write_columns("a", 0, columns_of(values, 0, 3))
    else:
        writer.write("a", 0, values.tobytes())
    entry = writer.finish()
    assert entry == file_entry(writer.path, checksum=True)
    assert entry["sha256"] == hashlib.sha256(writer.path.read_bytes()).hexdigest()
    assert load_file(writer.path)["a"].tolist() == values.tolist()


def test_incomplete_shard_is_never_named(tmp_path):
    writer = ShardWriter(tmp_path, "x.safetensors", SPECS)
    writer.write("a", 0, bytes(24))
    writer.write("b", 0, bytes(3))
    with pytest.raises(AssertionError):
        writer.finish()
    writer.abandon()
    writer.abandon()  # twice does no harm
    assert not writer.path.exists()


def test_leftover_of_an_earlier_run_is_overwritten(tmp_path):
    (tmp_path / ".x.safetensors.writing").write_bytes(b"longer than the shard" * 100)
    writer = ShardWriter(tmp_path, "x.safetensors", SPECS)
    writer.write("a", 0, bytes(24))
    writer.write("b", 0, bytes(4))
    writer.finish()
    assert writer.path.stat().st_size == writer.nbytes


def test_threads_share_a_writer(tmp_path):
    spec = TensorSpec("a", "I8", (64, 100))
    writer = ShardWriter(tmp_path, "x.safetensors", [spec])
    threads = [
        threading.Thread(target=writer.write, args=("a", row * 100, bytes([row]) * 100))
        for row in range(64)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.finish()
    assert load_file(writer.path)["a"].tolist() == [[row] * 100 for row in range(64)]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_failing_disk(tmp_path, monkeypatch, call):
    """One MachineError, the file descriptor closed once, nothing in place."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    closed = []
    close = os.close
    monkeypatch.setattr(os, "close", lambda fd: (closed.append(fd), close(fd)))
    opened = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(MachineError, match="no space left on device") as caught:
        write_and_abandon(tmp_path)
    assert caught.value.exit_code == 3
    assert "run the same command again" in caught.value.fix
    assert str(tmp_path) in caught.value.where
    assert len(closed) == len(set(closed)) == 1
    assert not (tmp_path / "x.safetensors").exists()
    assert set(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208


def write_and_abandon(folder):
    writer = ShardWriter(folder, "x.safetensors", [])
    try:
        writer.finish()
    finally:
        writer.abandon()


def test_no_folder(tmp_path):
    with pytest.raises(MachineError, match="no such file") as caught:
        ShardWriter(tmp_path / "missing", "x.safetensors", SPECS)
    assert "missing" in caught.value.where


def test_small_file_makes_its_folder_and_replaces(tmp_path):
    path = tmp_path / "deep" / "er" / "x.json"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_small_file_replaces_a_link_not_its_target(tmp_path):
    (tmp_path / "theirs").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "theirs")
    write_file(tmp_path / "x", b"new")
    assert (tmp_path / "theirs").read_text() == "mine"
    assert (tmp_path / "x").read_bytes() == b"new"


def umask():
    before = os.umask(0)
    os.umask(before)
    return before


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "raise the quota"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "--out"),
        (errno.EMFILE, "ulimit"),
        (errno.EIO, "run the same command again"),
    ],
)
def test_every_error_has_a_way_out(tmp_path, number, hint):
    error = machine_error(OSError(number, os.strerror(number)), tmp_path)
    assert hint in error.fix
    assert error.where == str(tmp_path)
    assert error.what[0].islower()
