"""Where the output may go, and how it gets there."""

import ctypes
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from quantcli.checkpoint.files import JOURNAL, MANIFEST
from quantcli.convert import publish as publishing
from quantcli.convert.destination import Start
from quantcli.convert.folder import LocalFolder
from quantcli.convert.journal import check_folder
from quantcli.convert.publish import check_destination, publish
from quantcli.core.errors import InputError, MachineError
from quantcli.core.place import check_space, partial_folder


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def made(tmp_path):
    """A finished OUT.partial."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "new").write_text("new")
    return partial


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_partial_stands_beside():
    assert partial_folder(Path("a/b.c")) == Path("a/b.c.partial")


@pytest.mark.parametrize("out", ["out", "deep/er/out", "model2", "model.partial", "sub/../out"])
def test_good_places(tmp_path, model, out):
    check_destination(tmp_path / out, model, force=False)
    check_destination(tmp_path / out, model, force=True)


def test_relative_places(tmp_path, model, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in ("out", "../out", "./deep/out"):
        check_destination(Path(out), model, force=False)
    for out in (".", "", "..", "../here", "../model", "../model/x", "/"):
        with pytest.raises(InputError):
            check_destination(Path(out), model, force=True)


def test_force_is_for_directories_only(tmp_path, model):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="output directory exists") as caught:
        check_destination(out, model, force=False)
    assert "--force" in caught.value.fix
    check_destination(out, model, force=True)


def test_home_behind_a_link_is_home(tmp_path, model, monkeypatch):
    (tmp_path / "data" / "me").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    for out in (tmp_path / "data" / "me", tmp_path / "data"):
        with pytest.raises(InputError, match="contains your home"):
            check_destination(out, model, force=True)


def test_no_home_is_no_trouble(tmp_path, model, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for unknown users
    check_destination(tmp_path / "out", model, force=False)


def test_permission(tmp_path, model, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(MachineError, match="no permission to write here") as caught:
        check_destination(tmp_path / "deep" / "out", model, force=False)
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, MachineError), (errno.ENAMETOOLONG, InputError)]
)
def test_system_errors_are_told_in_our_words(tmp_path, model, monkeypatch, number, kind):
    def lstat(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "is_symlink", lstat)
    with pytest.raises(kind) as caught:
        check_destination(tmp_path / "out", model, force=False)
    assert caught.value.fix
    assert caught.value.where == str(tmp_path / "out")


def test_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (10**6, 0, 1000))
    out = tmp_path / "deep" / "out"
    assert check_space(out, 1000) == 1000
    with pytest.raises(MachineError, match="needs 1,001 bytes, 1,000 are free") as caught:
        check_space(out, 1001)
    assert caught.value.where == str(tmp_path)
    partial_folder(out).mkdir(parents=True)
    (partial_folder(out) / "shard").write_bytes(bytes(500))
    (partial_folder(out) / "broken").symlink_to("nowhere")
    assert check_space(out, 1500) == 1000
    with pytest.raises(MachineError):
        check_space(out, 1600)


def test_places_that_store_nothing():
    with pytest.raises(MachineError, match="stores no files"):
        check_space(Path("/proc/out"), 0)


def test_publish_is_a_rename(tmp_path, made):
    inode = (made / "new").stat().st_ino
    publish(made, tmp_path / "out", force=False)
    assert (tmp_path / "out" / "new").stat().st_ino == inode
    assert names(tmp_path) == ["out"]


def test_publish_replaces_nothing_unasked(tmp_path, made):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="output directory exists"):
        publish(made, tmp_path / "out", force=False)
    assert names(tmp_path) == ["out", "out.partial"]


def without_exchange(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


@pytest.mark.parametrize("exchange", [True, False])
def test_publish_by_force(tmp_path, made, monkeypatch, exchange):
    if not exchange:
        without_exchange(monkeypatch)
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "old").touch()
    publish(made, tmp_path / "out", force=True)
    assert names(tmp_path) == ["out", "out.replaced"]
    assert names(tmp_path / "out") == ["new"]
    assert (tmp_path / "out.replaced" / "deep" / "old").exists(), "what was not ours is kept"


@pytest.mark.parametrize(("stranger", "left"), [(None, []), ("notes.txt", ["out.replaced"])])
def test_force_deletes_only_what_the_manifest_lists(tmp_path, made, stranger, left):
    out = tmp_path / "out"
    (out / "assets").mkdir(parents=True)
    (out / "assets" / "a.png").touch()
    manifest = {"files": {"assets/a.png": {"bytes": 0}}}
    (out / "quantcli_manifest.json").write_text(json.dumps(manifest))
    if stranger:
        (out / stranger).touch()
    publish(made, out, force=True)
    assert names(tmp_path) == ["out", *left]
    assert names(out) == ["new"]


def test_force_has_no_place_for_what_is_not_ours(tmp_path):
    for name in ("model", "out", "out.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "thesis").touch()
    with pytest.raises(InputError, match="its new name is taken") as caught:
        check_destination(tmp_path / "out", tmp_path / "model", force=True)
    assert caught.value.where == str(tmp_path / "out.replaced")


def test_publish_by_force_where_nothing_is(tmp_path, made):
    publish(made, tmp_path / "out", force=True)
    assert names(tmp_path / "out") == ["new"]


def test_old_directory_comes_back_where_the_new_cannot_go(tmp_path, made, monkeypatch):
    without_exchange(monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    real = os.rename

    def rename(source, target, **options):
        if Path(source) == made:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(MachineError, match="input/output error"):
        publish(made, tmp_path / "out", force=True)
    assert names(tmp_path / "out") == ["old"]
    assert names(made) == ["new"]
    assert names(tmp_path) == ["out", "out.partial"]


def checkpoint(folder: Path, *others: str) -> Path:
    """A folder with a manifest of one file, and files that it does not list."""
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps({"files": {"config.json": {"bytes": 2}}}))
    for name in ("config.json", *others):
        (folder / name).write_text("{}")
    return folder


def killed(*_):
    raise KeyboardInterrupt


def test_a_kill_between_the_exchange_and_the_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = checkpoint(tmp_path / "out", "notes.txt"), checkpoint(tmp_path / "out.partial")
    monkeypatch.setattr(publishing, "replaced_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(partial, out, force=True)
    monkeypatch.undo()
    assert (partial / "notes.txt").exists()
    with pytest.raises(InputError, match="not the work of an interrupted run"):
        check_folder(partial, None)

    with LocalFolder(out).begin(Start({"plan": "p", "checksum": True, "source": {}}, [], force=True)):
        assert (tmp_path / "out.replaced" / "notes.txt").exists()
        assert [path.name for path in partial.iterdir()] == [JOURNAL]


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    out, partial = checkpoint(tmp_path / "out"), checkpoint(tmp_path / "out.partial", "notes.txt")
    (tmp_path / "out.replaced").mkdir()
    with pytest.raises(InputError, match="its new name is taken"):
        publishing.keep_exchanged(partial, out)
    assert (partial / "notes.txt").exists()


def test_what_was_exchanged_is_no_work_of_a_run(tmp_path):
    checkpoint(tmp_path / "out")
    checkpoint(tmp_path / "out.partial", "notes.txt")
    assert LocalFolder(tmp_path / "out").done({"plan": "p"}) == 0
