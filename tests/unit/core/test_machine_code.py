"""Machine code of kernels: where it is kept, whom it trusts, and what happens without it."""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from quantcli.core.kernels import machine
from quantcli.core.kernels import tensors as kernels

KEY = ("absmax_columns", "bfloat16")
ROWS = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).bfloat16()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has loaded no kernels, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(machine.CACHE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    machine._folder.cache_clear()
    found = machine._Kernels()
    monkeypatch.setattr(machine, "_KERNELS", found)
    yield found
    machine._folder.cache_clear()


def again(monkeypatch):
    """The next process."""
    machine._folder.cache_clear()
    monkeypatch.setattr(machine, "_KERNELS", machine._Kernels())


def works():
    found = kernels.absmax_columns(ROWS)
    return found is not None and found.tolist() == [[1.0, 3.0]]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def no_compiler(monkeypatch):
    def refuse(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(machine._Kernels, "_compiled", refuse)


def test_compiled_once_and_then_loaded(fresh, tmp_path, monkeypatch):
    assert works()
    (file,) = files(tmp_path)
    assert file.name == "absmax_columns-bfloat16.o"
    assert file.is_relative_to(tmp_path / "cache" / "quantcli" / "kernels")
    for folder in list(file.parents)[:3]:
        assert folder.stat().st_mode & 0o777 == 0o700
    again(monkeypatch)
    no_compiler(monkeypatch)
    assert works()
    assert machine.problem() is None


def test_a_folder_of_the_users_choice(fresh, tmp_path, monkeypatch):
    """Others may write in it, as in a volume of a container, but not in what quantcli makes there."""
    shared = tmp_path / "deep" / "shared"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.setenv(machine.CACHE, str(shared))
    assert works()
    (file,) = files(tmp_path)
    assert file.parents[2] == shared
    assert (shared / "kernels").stat().st_mode & 0o777 == 0o700
    (shared / "kernels").chmod(0o777)
    file.write_bytes(b"what somebody else put there")
    again(monkeypatch)
    assert works()
    assert file.read_bytes() == b"what somebody else put there"


def test_a_folder_of_the_users_choice_that_is_new(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv(machine.CACHE, str(tmp_path / "deep" / "new"))
    assert works()
    (file,) = files(tmp_path)
    assert file.parents[2] == tmp_path / "deep" / "new"


def test_private_whatever_the_umask(fresh, tmp_path, monkeypatch):
    before = os.umask(0)
    try:
        assert works()
    finally:
        os.umask(before)
    assert len(files(tmp_path / "cache")) == 1
    again(monkeypatch)
    no_compiler(monkeypatch)
    assert works()


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "no checksum"])
def test_a_damaged_file_is_compiled_again(fresh, tmp_path, monkeypatch, damage):
    assert works()
    (file,) = files(tmp_path)
    sound = file.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    content = {"cut": sound[:-100], "empty": b"", "bit": bytes(flipped), "no checksum": sound[32:]}
    file.write_bytes(content[damage])
    again(monkeypatch)
    assert works()
    assert machine.problem() is None
    assert files(tmp_path) == [file]
    assert machine._read(file) is not None


@pytest.mark.parametrize("mode", [0o775, 0o707])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_folder_that_others_may_write_in_is_not_used(fresh, tmp_path, monkeypatch, mode, depth):
    assert works()
    (file,) = files(tmp_path / "cache")
    folder = file.parents[depth]
    folder.chmod(mode)
    file.write_bytes(b"what somebody else put there")
    again(monkeypatch)
    assert works()
    assert file.read_bytes() == b"what somebody else put there"
    assert len(files(tmp_path / "temporary")) == 1


def test_a_folder_of_another_user_is_not_used(fresh, tmp_path, monkeypatch):
    assert works()
    (file,) = files(tmp_path / "cache")
    user = os.geteuid()
    again(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    said = []
    with machine.announced(said.append):
        assert works()
    assert files(tmp_path) == [file]  # nor is one among temporary files, which is the first user's, too
    assert len(said) == 1
    assert "which no folder of this user's can keep" in said[0]


def test_a_link_is_not_followed(fresh, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (tmp_path / "cache" / "quantcli").mkdir(parents=True, mode=0o700)
    (tmp_path / "cache" / "quantcli" / "kernels").symlink_to(target)
    assert works()
    assert files(target) == []
    assert len(files(tmp_path / "temporary")) == 1


def test_a_home_that_cannot_be_written(fresh, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in its place")
    assert works()
    (file,) = files(tmp_path / "temporary")
    assert f"quantcli-{os.geteuid()}" in file.parts
    again(monkeypatch)
    no_compiler(monkeypatch)
    assert works()


def test_nowhere_to_keep_them(fresh, tmp_path, monkeypatch):
    for name in ("cache", "temporary"):
        place = tmp_path / name
        if place.exists():
            place.rmdir()
        place.write_text("a file in its place")
    assert works()
    assert machine.problem() is None


def test_a_full_disk_leaves_nothing_behind(fresh, tmp_path, monkeypatch):
    def full(path, content):
        with path.open("wb") as stream:
            stream.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert works()
    assert files(tmp_path) == []


def test_people_are_told_once(fresh):
    said = []
    with machine.announced(said.append):
        assert works()
        assert kernels.absmax_columns(ROWS.float()) is not None
    (line,) = said
    assert re.fullmatch(r"compiling kernels for this CPU, kept in /\S+/kernels: a few seconds", line)
    with machine.announced(said.append):
        assert works()
    assert len(said) == 1


def test_threads_share_a_kernel(fresh, monkeypatch):
    calls = []
    compiled = machine._Kernels._compiled

    def counted(self, key):
        calls.append(key)
        return compiled(self, key)

    monkeypatch.setattr(machine._Kernels, "_compiled", counted)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: works(), range(32)))
    assert calls == [KEY]


_PROCESS = """
import torch
from quantcli.core.kernels import machine, tensors
found = tensors.absmax_columns(torch.tensor([[1.0, -2.0], [0.5, 3.0]]).bfloat16())
assert machine.problem() is None, machine.problem()
assert found.tolist() == [[1.0, 2.0 + 1.0]], found
"""


def test_processes_at_once_and_one_that_finds_all_of_it(tmp_path):
    """The last one must not import numba: loading without it is what each run but the first does."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    for name in (machine.SWITCH, machine.CACHE):
        environment.pop(name, None)
    command = [sys.executable, "-c", _PROCESS]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        _, problems = process.communicate()
        assert process.returncode == 0, problems.decode()
    assert [file.name for file in files(tmp_path)] == ["absmax_columns-bfloat16.o"]
    without = "import sys\nsys.modules['numba'] = None\n" + _PROCESS
    last = subprocess.run([sys.executable, "-c", without], env=environment, stderr=subprocess.PIPE)
    assert last.returncode == 0, last.stderr.decode()


@pytest.mark.parametrize("library", ["numba", "llvmlite"])
def test_without_a_library_torch_serves(fresh, monkeypatch, library):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("compile", "formulas", "loops"):
        monkeypatch.delitem(sys.modules, f"quantcli.core.kernels.{name}", raising=False)
    machine._fingerprint.cache_clear()
    real = builtins.__import__

    def refuse(name, *rest, **named):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named '{library}'", name=library)
        return real(name, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", refuse)
        assert kernels.absmax_columns(ROWS) is None
    assert machine.problem() == f"ModuleNotFoundError: No module named '{library}'"
    assert kernels.absmax_columns(ROWS) is None  # no second try


def test_a_kernel_that_cannot_be_compiled(fresh, monkeypatch):
    from quantcli.core.kernels import compile as compiler

    def broken(dtype):
        def kernel(rows):
            return rows.no_such_thing

        from numba import types

        return kernel, types.void(types.CPointer(types.float32))

    monkeypatch.setitem(compiler.KERNELS, "absmax_columns", broken)
    assert kernels.absmax_columns(ROWS) is None
    assert "no_such_thing" in str(machine.problem())


def test_another_cpu_has_files_of_its_own(fresh, monkeypatch):
    usual = machine._fingerprint()
    machine._fingerprint.cache_clear()
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "")
    assert machine.cpu() == ("generic", "")
    assert machine._fingerprint() != usual
    machine._fingerprint.cache_clear()
