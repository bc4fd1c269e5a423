"""Limits of memory, and errors for want of it."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from quantcli.core.errors import MachineError
from quantcli.core.memory import limits, shortage
from quantcli.core.memory.limits import Limit, container_limits, free_memory, process_limits
from quantcli.core.memory.shortage import check_memory, is_out_of_memory, machine_fault

MB = 10**6
_UNLIMITED_V1 = 2**63 - 4096  # what version 1 has for no limit


def group(folder: Path, version: int, limit: str, used: int, cached: int = 0) -> None:
    """A control group with `used` bytes, of which the page cache has `cached`."""
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cached}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_a_group_and_of_those_above_it(tmp_path: Path, version: int) -> None:
    own = tmp_path / "cgroup"
    own.write_text("7:cpu,memory:/a/b\n3:cpu:/x\n" if version == 1 else "0::/a/b\n")
    root = tmp_path / "root"
    base = root / "memory" if version == 1 else root
    group(base / "a" / "b", version, "700000000", 300 * MB, 100 * MB)
    group(base / "a", version, "500000000", 450 * MB)
    group(base, version, "max" if version == 2 else f"{_UNLIMITED_V1}", 900 * MB)
    found = [(limit.total, limit.left) for limit in container_limits(own, root)]
    assert found == [(700 * MB, 500 * MB), (500 * MB, 50 * MB)]


def test_a_group_that_is_the_root_of_a_container(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/docker/1234\n")
    group(tmp_path / "root", 2, "64000000", 96 * MB)
    assert [limit.left for limit in container_limits(own, tmp_path / "root")] == [0]


def test_the_limits_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {resource.RLIMIT_AS: 2**50, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (table[number], table[number]))
    (limit,) = process_limits()
    used = 2**50 - limit.left
    assert limit.name == "limit of address space (ulimit -v)"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    assert used == pytest.approx(pages * resource.getpagesize(), rel=0.1)


def only(monkeypatch: pytest.MonkeyPatch, total: int, left: int) -> None:
    limit = Limit("limit of the box", total, left, "raise it")
    for module in (limits, shortage):
        monkeypatch.setattr(module, "hard_limits", lambda: [limit])


def test_free_memory_is_what_limits_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, 9000, 4096)
    assert free_memory() == 4096


def test_work_that_a_limit_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, 900 * MB, 100 * MB)
    check_memory(100 * MB, "it")
    with pytest.raises(MachineError) as caught:
        check_memory(101 * MB, "it")
    assert caught.value.what == (
        "it takes about 101.0 MB of memory; 100.0 MB are left of the limit of the box, 900.0 MB"
    )
    assert caught.value.fix == "raise it, or give fewer --workers, or less --max-memory"


def raised(kind: str) -> BaseException:
    """What a library raises that gets no memory."""
    try:
        if kind == "torch":
            torch.empty(2**55, dtype=torch.uint8)
        else:
            np.empty(2**55, np.uint8)
    except (RuntimeError, MemoryError) as error:
        return error
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_what_a_library_asked_for(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    only(monkeypatch, 900 * MB, 100 * MB)
    fault = machine_fault(raised(kind), "a row block", Path("x"))
    assert fault is not None
    asked = {"torch": "36028797018963968 bytes", "numpy": "32.0 PiB"}[kind]
    assert fault.what == (
        f"memory does not suffice for a row block: {asked} were asked for; "
        "100.0 MB are left of the limit of the box, 900.0 MB"
    )
    assert fault.exit_code == 3


def caused(error: BaseException, by: BaseException) -> BaseException:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError("libx.so: failed to map segment from shared object"), True),
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (caused(ValueError("cannot load"), MemoryError()), True),
        (caused(ValueError("cannot load"), KeyError("memory")), False),
        (OSError(errno.ENOSPC, "out of memory"), False),
        (ValueError("out of memory"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_errors_for_want_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_errors_of_the_disk_within_a_library() -> None:
    read = caused(ValueError("cannot load"), OSError(errno.EIO, "Input/output error"))
    fault = machine_fault(read, "the tokenizer", Path("model"))
    assert (fault and fault.where) == "model"
    named = OSError(errno.EIO, "Input/output error", "model/tokenizer.json")
    fault = machine_fault(caused(ValueError("cannot load"), named), "the tokenizer", Path("model"))
    assert (fault and fault.where) == "model/tokenizer.json"
    missing = caused(ValueError("cannot load"), FileNotFoundError(errno.ENOENT, "no"))
    assert machine_fault(missing, "the tokenizer", Path("model")) is None
