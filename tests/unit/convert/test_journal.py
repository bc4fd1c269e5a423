"""The journal of a run: what counts, who may go on, and who is locked out."""

import errno
import fcntl
import json
import os

import pytest

from quantcli.checkpoint.files import JOURNAL, MANIFEST
from quantcli.convert.journal import DoneShard, Journal, check_folder, discard, remove_folder
from quantcli.core.errors import InputError, MachineError

HEAD = {"plan": "p", "checksum": True, "source": {"a": [1, 2]}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "out.partial"


def begin(folder, head=HEAD):
    journal = Journal(folder, head)
    journal.record("s1", 10, "aa")
    journal.record("s2", 20, None)
    return journal


def reopened(folder):
    journal = Journal(folder, HEAD)
    journal.close()
    return journal.done


def test_what_was_recorded_is_there_again(folder):
    journal = begin(folder)
    journal.close()
    journal.close()
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    assert lines[0] == HEAD
    assert lines[1:] == [
        {"shard": "s1", "nbytes": 10, "sha256": "aa"},
        {"shard": "s2", "nbytes": 20, "sha256": None},
    ]
    assert reopened(folder) == {"s1": DoneShard(10, "aa"), "s2": DoneShard(20, None)}


def test_every_cut_of_the_file_keeps_the_whole_lines(folder):
    begin(folder).close()
    path = folder / JOURNAL
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        done = reopened(folder)
        assert len(done) == max(0, sum(end <= cut for end in ends) - 1), cut
        kept = max([end for end in ends if end <= cut], default=0)
        assert path.read_bytes() == (whole[:kept] or whole[: ends[0]]), cut


def test_a_line_after_a_bad_one_does_not_count(folder):
    begin(folder).close()
    path = folder / JOURNAL
    head, first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + b"?\n" + first + second)
    assert reopened(folder) == {}
    assert path.read_bytes() == head


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": {"a": [1, 3]}}, "the model has changed"),
        ({"plan": "q"}, "the recipe or version has changed"),
        ({"checksum": False}, "the option --checksum has changed"),
        ({"plan": "q", "source": {}}, "the model has changed"),
    ],
)
def test_another_run_is_refused_and_nothing_touched(folder, change, said):
    begin(folder).close()
    before = (folder / JOURNAL).read_bytes()
    with pytest.raises(InputError, match=said) as caught:
        Journal(folder, HEAD | change)
    assert "--fresh" in caught.value.fix
    assert (folder / JOURNAL).read_bytes() == before
    check_folder(folder, None)  # to be removed, it may be anybody's


def test_one_run_at_a_time(folder):
    journal = begin(folder)
    for attempt in (
        lambda: Journal(folder, HEAD),
        lambda: check_folder(folder, HEAD),
        lambda: check_folder(folder, None),
        lambda: remove_folder(folder),
        lambda: discard(folder),
    ):
        with pytest.raises(MachineError, match="another run is writing here"):
            attempt()
    journal.record("s3", 30, None)
    journal.close()
    assert len(reopened(folder)) == 3


def test_looking_is_not_locking(folder):
    begin(folder).close()
    check_folder(folder, HEAD)
    check_folder(folder, HEAD)
    assert len(reopened(folder)) == 2


def test_the_lock_outlives_the_name(folder):
    """While the folder is renamed, nobody with the old file open gets in."""
    journal = begin(folder)
    with (folder / JOURNAL).open() as other:
        journal.remove()
        assert not (folder / JOURNAL).exists()
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        journal.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_file_systems_without_locks_work(folder, monkeypatch, number):
    def flock(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    begin(folder).close()
    assert len(reopened(folder)) == 2
    remove_folder(folder)
    assert not folder.exists()


def test_full_disk_is_said_once(folder, monkeypatch):
    journal = begin(folder)
    full = OSError(errno.ENOSPC, "No space left on device")

    def write(fd, data):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(MachineError, match="no space left"):
            journal.record("s3", 1, None)
    journal.close()  # has nothing left to write
    assert len(reopened(folder)) == 2


def test_no_descriptor_is_lost(folder):
    begin(folder).close()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        with pytest.raises(InputError):
            Journal(folder, HEAD | {"plan": "q"})
        check_folder(folder, HEAD)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("marker", [JOURNAL, MANIFEST])
def test_ours_by_either_file(folder, marker):
    folder.mkdir(parents=True)
    (folder / marker).write_text('{"files": {"model.safetensors": {}}}' if marker == MANIFEST else "")
    (folder / "model.safetensors").touch()
    check_folder(folder, HEAD)
    Journal(folder, HEAD).close()


def test_absent_and_empty_are_fine(folder):
    check_folder(folder, HEAD)
    remove_folder(folder)
    folder.mkdir(parents=True)
    check_folder(folder, HEAD)
    remove_folder(folder)
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["strange", "file", "link", "broken link"])
def test_what_is_not_ours_stays(folder, kind):
    folder.parent.mkdir(parents=True)
    theirs = folder.parent / "theirs"
    if kind == "strange":
        folder.mkdir()
        (folder / "thesis.tex").touch()
    elif kind == "file":
        folder.touch()
    else:
        if kind == "link":
            theirs.mkdir()
            (theirs / JOURNAL).touch()
        folder.symlink_to(theirs)
    for attempt in (
        lambda: check_folder(folder, HEAD),
        lambda: check_folder(folder, None),
        lambda: remove_folder(folder),
        lambda: Journal(folder, HEAD),
    ):
        with pytest.raises(InputError) as caught:
            attempt()
        assert caught.value.fix == "move it away"
    assert os.path.lexists(folder)
    assert kind != "link" or (theirs / JOURNAL).exists()


def test_discard_follows_no_link(folder):
    theirs = folder.parent / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "precious").touch()
    begin(folder).close()
    (folder / "link").symlink_to(theirs)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").touch()
    remove_folder(folder)
    assert not folder.exists()
    assert (theirs / "precious").exists()
