"""Places of output: where they must not be, and what a disk must have."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantcli.core.errors import InputError, MachineError
from quantcli.core.place import (
    as_our_errors,
    check_ancestor,
    check_calibration,
    check_space,
    check_spaces,
    check_writable,
    existing_ancestor,
    expanded,
    partial_folder,
)

FREE = 10_000


def test_a_home_in_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert expanded("~/a") == Path("/home/x/a")
    assert expanded(Path("~")) == Path("/home/x")
    assert expanded("a/~") == Path("a/~")
    assert expanded("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")


def test_the_folder_of_an_unfinished_run() -> None:
    assert partial_folder(Path("a/b.c")) == Path("a/b.c.partial")


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ("model", "the model directory"),
        ("model/c", "the model directory"),
        ("", "the model directory"),
        ("out", "the output directory"),
        ("out/c", "the output directory"),
        ("out.partial", "the folder of an unfinished run"),
        ("out.partial/c", "the folder of an unfinished run"),
        ("c", None),
        ("out2", None),
    ],
)
def test_a_calibration_stands_apart(tmp_path: Path, calibration: str, words: str | None) -> None:
    model, out, folder = tmp_path / "model", tmp_path / "out", tmp_path / calibration
    if words is None:
        check_calibration(folder, model, out)
        return
    with pytest.raises(InputError) as caught:
        check_calibration(folder, model, out)
    assert caught.value.what == f"the calibration folder and {words} must not contain each other"
    assert caught.value.where == str(folder)
    if words != "the model directory":
        check_calibration(folder, model, None)


def test_errors_of_the_system_are_told(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="file name is too long") as caught,
        as_our_errors(tmp_path, "fix"),
    ):
        (tmp_path / ("a" * 300)).stat()
    assert (caught.value.where, caught.value.fix) == (str(tmp_path), "fix")
    with pytest.raises(MachineError, match="no such file"), as_our_errors(tmp_path, "fix"):
        (tmp_path / "a").stat()
    with pytest.raises(MachineError, match="not empty"), as_our_errors(tmp_path, "fix"):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    with pytest.raises(InputError, match="form a circle") as caught, as_our_errors(tmp_path, "fix"):
        raise RuntimeError
    assert (caught.value.where, caught.value.fix) == (str(tmp_path), "fix")


def test_what_exists_above(tmp_path: Path) -> None:
    assert existing_ancestor(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "link").symlink_to("nowhere")
    assert existing_ancestor(tmp_path / "link" / "b") == tmp_path / "link"


def test_a_file_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="`file` is not a directory") as caught:
        check_ancestor(tmp_path / "file" / "a", "fix")
    assert (caught.value.where, caught.value.fix) == (str(tmp_path / "file"), "fix")
    with pytest.raises(InputError, match="`file` is not a directory"):
        check_writable(tmp_path / "file" / "a")
    check_writable(tmp_path / "new")
    check_writable(tmp_path)
    asked: list[tuple[Any, int]] = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(MachineError, match="no permission to write here") as caught:
        check_writable(tmp_path / "new")
    with pytest.raises(MachineError, match="no permission to write here"):
        check_writable(tmp_path)  # its own permission counts if it is there
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2
    assert caught.value.where == str(tmp_path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A file system of a size, with some free bytes."""
    sizes = {"total": 10 * FREE, "free": FREE}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (sizes["total"], 0, sizes["free"]))
    return sizes


def test_space(tmp_path: Path, disk: dict[str, int]) -> None:
    assert check_space(tmp_path / "out", FREE) == FREE
    with pytest.raises(MachineError) as caught:
        check_space(tmp_path / "out", FREE + 1)
    assert caught.value.what == "disk is too full: needs 10,001 bytes, 10,000 are free"
    assert caught.value.where == str(tmp_path)
    partial = partial_folder(tmp_path / "out")
    partial.mkdir()
    (partial / "done").write_bytes(b"x" * 5)
    (partial / "more").write_bytes(b"x" * 3)
    assert check_space(tmp_path / "out", FREE + 8) == FREE, "what a run has written is used again"
    with pytest.raises(MachineError, match="disk is too full"):
        check_space(tmp_path / "out", FREE + 9)
    disk["total"] = 0
    with pytest.raises(MachineError, match="this file system stores no files"):
        check_space(tmp_path / "out", 0)


def test_space_for_several(
    tmp_path: Path, disk: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    assert check_spaces([]) == 0
    assert check_spaces([(out, FREE // 2) for out in outs]) == FREE
    with pytest.raises(MachineError) as caught:
        check_spaces([(outs[0], FREE // 2), (outs[1], FREE // 2 + 1)])
    assert caught.value.what == "disk is too full: needs 10,001 bytes for 2 outputs, 10,000 are free"
    # on two file systems each has its own space, and the fullest counts
    for out in outs:
        out.with_name(f"{out.name}.partial").mkdir()
    usual = Path.stat
    devices = {f"{out.name}.partial": number for number, out in enumerate(outs)}
    monkeypatch.setattr(
        Path,
        "stat",
        lambda self, **more: (
            SimpleNamespace(st_dev=devices[self.name], st_mode=usual(self).st_mode)
            if self.name in devices
            else usual(self, **more)
        ),
    )
    free = {"a.partial": FREE, "b.partial": 2 * FREE}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (1, 0, free[path.name]))
    assert check_spaces([(outs[0], FREE), (outs[1], 2 * FREE)]) == FREE
    with pytest.raises(MachineError, match=r"needs 20,001 bytes, 20,000 are free"):
        check_spaces([(outs[0], FREE), (outs[1], 2 * FREE + 1)])


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shutil, "disk_usage", fail)
    with pytest.raises(MachineError, match="input/output error"):
        check_space(tmp_path / "out", 0)


def test_a_full_disk_can_still_be_written(tmp_path: Path, disk: dict[str, int]) -> None:
    """As far as that goes: what is to come is not known yet."""
    disk["free"] = 0
    check_writable(tmp_path / "new")
    (tmp_path / "a").mkdir()
    with pytest.raises(MachineError) as caught:
        check_spaces([(tmp_path / "a" / "out", 1), (tmp_path / "out", 1)])
    assert caught.value.where == str(tmp_path / "a"), "the place of the first"
