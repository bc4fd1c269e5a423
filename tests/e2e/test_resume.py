"""Wherever a run stops: nothing looks finished, and the same command makes the same bytes."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quantcli.convert import execute
from tests.e2e.conftest import Box, Faults, Killed, Result, make_llama, run_cli, snapshot

SHARDED = ("--workers", 1, "--set", "max_shard=1200")
SHARDS = 5


@pytest.fixture
def wanted(box: Box) -> dict[str, str]:
    """What an undisturbed run writes."""
    other = Box(box.root, box.model, box.recipe, box.root / "undisturbed")
    assert other.run(*SHARDED).code == 0
    files = snapshot(other.out)
    assert sum(name.endswith(".safetensors") for name in files) == SHARDS
    assert {"config.json", "tokenizer.json", "quantcli_manifest.json"} < files.keys()
    assert not any(name.startswith(".") for name in files)
    return files


def journal_lines(partial: Path) -> int:
    """Shards that the journal vouches for."""
    path = partial / ".quantcli_journal"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def stopped_at(box: Box, nth: int, error: BaseException, *more: object, sticky: bool = False) -> Faults:
    """Run with a fault at the nth call; check what a failure must look like."""
    faults = Faults(box.root, nth, lambda: error, sticky=sticky)
    with faults.armed():
        if isinstance(error, OSError):
            result = box.run(*SHARDED, *more)
            check_failure(result, faults)
        else:
            try:
                result = box.run(*SHARDED, *more)
            except Killed:
                return faults
            assert faults.fired is None or result.code in {0, 130}, (faults.fired, result)
    return faults


def check_failure(result: Result, faults: Faults) -> None:
    assert "Traceback" not in result.err, (faults.fired, result.err)
    if faults.fired is None:
        assert result.code == 0, result.err
    else:
        assert result.code == 3, (faults.fired, result)
        assert result.err.count("error: ") == 1, (faults.fired, result.err)
        assert "  --> " in result.err, (faults.fired, result.err)
        assert "  fix: " in result.err or "cannot read" in result.err, (faults.fired, result.err)


@pytest.mark.parametrize(
    ("error", "sticky"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (KeyboardInterrupt(), False),
        (Killed(), True),
    ],
    ids=["full disk", "ctrl-c", "kill -9"],
)
def test_stopped_at_every_call(
    box: Box, wanted: dict[str, str], error: BaseException, sticky: bool
) -> None:
    reused_counts = set()
    for nth in range(1000):
        box.out = box.root / f"out{nth}"
        faults = stopped_at(box, nth, error, sticky=sticky)
        if faults.fired is None:
            assert snapshot(box.out) == wanted
            break
        if box.out.exists():  # stopped after the one rename: it must be whole
            assert snapshot(box.out) == wanted, faults.fired
            continue
        finished = journal_lines(box.partial)
        again = box.run(*SHARDED, "--json")
        assert again.code == 0, (faults.fired, again.err)
        assert again.json["shards_reused"] == finished, faults.fired
        reused_counts.add(finished)
        assert snapshot(box.out) == wanted, faults.fired
        assert not box.partial.exists()
    assert faults.fired is None, "the loop ended before the run got through"
    assert nth > 80, "the faults were not where the disk is used"
    assert reused_counts == set(range(SHARDS + 1))


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), Killed()], ids=["EIO", "kill"]
)
def test_forced_replacement_stopped_at_every_call(
    box: Box, wanted: dict[str, str], error: BaseException
) -> None:
    """OUT is at every moment the whole old directory or the whole new one."""
    old = {"precious.txt": b"mine", "deep/er.txt": b"too"}
    seen, aside = set(), []
    for nth in range(1000):
        box.out = box.root / f"out{nth}"
        for name, content in old.items():
            (box.out / name).parent.mkdir(parents=True, exist_ok=True)
            (box.out / name).write_bytes(content)
        before = snapshot(box.out)
        faults = stopped_at(box, nth, error, "--force", sticky=isinstance(error, Killed))
        after = snapshot(box.out)
        assert after in (before, wanted), faults.fired
        seen.add(after == wanted)
        again = box.run(*SHARDED, "--force")
        if "it has no journal" in again.err:  # stopped right after the exchange, before a byte was lost
            assert (after, snapshot(box.partial)) == (wanted, before)
            aside.append(nth)
        else:
            assert again.code == 0, (faults.fired, again.err)
            assert not box.partial.exists(), faults.fired
        assert snapshot(box.out) == wanted, faults.fired
        if faults.fired is None:
            break
    assert faults.fired is None
    assert seen == {True, False}
    assert len(aside) <= 3


def test_fresh_stopped_at_every_call(box: Box, wanted: dict[str, str]) -> None:
    """A half removed OUT.partial is still known as ours."""
    half_done(box)
    template = box.partial
    for nth in range(1000):
        box.out = box.root / f"out{nth}"
        shutil.copytree(template, box.partial)
        faults = stopped_at(box, nth, Killed(), "--fresh", sticky=True)
        if not box.out.exists():
            again = box.run(*SHARDED)
            assert again.code == 0, (faults.fired, again.err)
        assert snapshot(box.out) == wanted, faults.fired
        if faults.fired is None:
            break
    assert faults.fired is None


def half_done(box: Box, shards: int = 2, *more: object) -> None:
    """A run that was killed when `shards` shards were whole."""
    journal = box.partial / ".quantcli_journal"
    left = shards - journal_lines(box.partial) + (not journal.exists())  # the head is a line too
    write = os.write

    def limited(fd: int, data: bytes) -> int:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        return write(fd, data)

    def killed(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", limited)
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            box.run(*SHARDED, *more)
    assert journal_lines(box.partial) == shards


def test_short_writes_and_reads(
    box: Box, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv, write = os.pwrite, os.preadv, os.write
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(
        os, "preadv", lambda fd, into, at, *flags: preadv(fd, [into[0][:5]], at, *flags)
    )
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    assert box.run(*SHARDED).code == 0
    monkeypatch.undo()
    assert snapshot(box.out) == wanted


def test_source_that_shrinks(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda fd, into, at, *flags: 0)
    result = box.run(*SHARDED)
    assert result.code == 3
    assert "model.safetensors" in result.err
    assert not box.out.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_source_that_is_overwritten_while_it_is_read(
    box: Box, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    write = execute.write_together

    def write_and_overwrite(*args: Any) -> Any:
        errors = write(*args)
        path = box.model / file
        content = bytearray(path.read_bytes())
        content[-1] ^= file.endswith(".safetensors")
        path.write_bytes(content)
        return errors

    monkeypatch.setattr(execute, "write_together", write_and_overwrite)
    result = box.run()
    assert result.code == 2
    assert "error: the model changed while it was read" in result.err
    assert f"--> {box.model / file}" in result.err
    assert "--fresh" in result.err
    assert not box.out.exists()
    monkeypatch.undo()
    again = box.run("--fresh")
    assert again.code == 0, again.err


def test_no_space_is_told_before_the_first_byte(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(box.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    for more in ((), ("--plan",)):
        result = box.run(*SHARDED, *more)
        assert result.code == 3
        assert "disk is too full" in result.err
        assert "5,000 are free" in result.err
        assert not box.partial.exists()


def test_what_is_in_out_partial_counts_as_space(
    box: Box, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    half_done(box, SHARDS)
    needed = box.run(*SHARDED, "--plan", "--json").json["plan"]["disk_needed"]
    held = sum(file.stat().st_size for file in box.partial.iterdir())
    usage = shutil.disk_usage(box.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - held - 1))
    assert box.run(*SHARDED).code == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - held))
    assert box.run(*SHARDED).code == 0
    monkeypatch.undo()
    assert snapshot(box.out) == wanted


# what may be found in OUT.partial


@pytest.mark.parametrize(
    ("tail", "reused"),
    [
        (b'{"shard": "model-00003-of', 2),
        (b"\x00\xff\xfe garbage\n", 2),
        (b"[1, 2]\n", 2),
        (b'{"shard": ["x"], "nbytes": 1, "sha256": null}\n', 2),
        (b'{"shard": "model-00003-of-00005.safetensors", "nbytes": 1, "sha256": "0"}\n', 2),
        (b'{"shard": "model-00003-of-00005.safetensors", "nbytes": "a", "sha256": 7}\n', 2),
        (b"[" * 100_000 + b"\n", 2),
        (b'{"shard": "../../../etc/passwd", "nbytes": 1, "sha256": null}\n', 2),
    ],
    ids=["torn", "binary", "list", "unhashable", "wrong size", "wrong types", "nested", "path"],
)
def test_journal_with_a_bad_tail(box: Box, wanted: dict[str, str], tail: bytes, reused: int) -> None:
    half_done(box)
    journal = box.partial / ".quantcli_journal"
    journal.write_bytes(journal.read_bytes() + tail)
    assert box.run(*SHARDED, "--plan").code == 0
    result = box.run(*SHARDED, "--json")
    assert result.code == 0, result.err
    assert result.json["shards_reused"] == reused
    assert snapshot(box.out) == wanted


def test_a_line_appended_to_a_torn_one_counts(box: Box, wanted: dict[str, str]) -> None:
    """The torn line is cut off, so what a second interrupted run notes is not lost."""
    half_done(box)
    journal = box.partial / ".quantcli_journal"
    journal.write_bytes(journal.read_bytes() + b'{"shard": "mod')
    half_done(box, 4)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert box.run(*SHARDED, "--json").json["shards_reused"] == 4
    assert snapshot(box.out) == wanted


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}\n", b'{"plan": 1}\n'])
def test_journal_without_a_head_starts_over(box: Box, wanted: dict[str, str], content: bytes) -> None:
    half_done(box)
    (box.partial / ".quantcli_journal").write_bytes(content)
    result = box.run(*SHARDED, "--json")
    assert (result.code, result.json["shards_reused"]) == (0, 0)
    assert snapshot(box.out) == wanted


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_damaged_finished_shard_is_made_again(box: Box, wanted: dict[str, str], damage: str) -> None:
    half_done(box)
    shard = box.partial / "model-00001-of-00005.safetensors"
    raw = bytearray(shard.read_bytes())
    if damage == "flip":
        raw[-1] ^= 1
    elif damage == "cut":
        del raw[-1:]
    elif damage == "grow":
        raw += b"x"
    shard.write_bytes(raw)
    if damage == "remove":
        shard.unlink()
    assert box.run(*SHARDED, "--json").json["shards_reused"] == 1
    assert snapshot(box.out) == wanted


def test_without_checksums_size_must_do(box: Box) -> None:
    half_done(box, 2, "--no-checksum")
    refused = box.run(*SHARDED)
    assert refused.code == 2
    assert "option --checksum has changed" in refused.err
    result = box.run(*SHARDED, "--no-checksum", "--json")
    assert (result.code, result.json["shards_reused"]) == (0, 2)
    assert all("sha256" not in entry for entry in result.json["files"].values())


def test_leftovers_in_out_partial_are_not_published(box: Box, wanted: dict[str, str]) -> None:
    half_done(box)
    (box.partial / "stranger.txt").write_text("?")
    (box.partial / "deep").mkdir()
    (box.partial / "deep" / "stranger.txt").write_text("?")
    (box.partial / "link").symlink_to(box.model / "config.json")
    (box.partial / "folder").symlink_to(box.model)
    assert box.run(*SHARDED).code == 0
    assert snapshot(box.out) == wanted
    assert (box.model / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("weights", "the model has changed"),
        ("touch", "the model has changed"),
        ("recipe", "the recipe or version has changed"),
        ("max_shard", "the recipe or version has changed"),
    ],
)
def test_another_plan_does_not_go_on(box: Box, change: str, said: str) -> None:
    half_done(box)
    arguments = SHARDED
    weights = box.model / "model.safetensors"
    if change == "weights":
        raw = bytearray(weights.read_bytes())
        raw[-2] ^= 1
        weights.write_bytes(raw)
    elif change == "touch":
        os.utime(weights, ns=(0, 1))
    elif change == "recipe":
        box.edit_recipe(box.recipe.read_text().replace("w8a8_dynamic", "w8a16"))
    else:
        arguments = ("--workers", 1, "--set", "max_shard=1300")
    before = snapshot(box.partial)
    for more in ((), ("--plan",)):
        result = box.run(*arguments, *more)
        assert result.code == 2, result.err
        assert said in result.err
        assert "--fresh" in result.err
        assert snapshot(box.partial) == before
    other = Box(box.root, box.model, box.recipe, box.root / "other")
    assert other.run(*arguments).code == 0
    result = box.run(*arguments, "--fresh", "--json")
    assert (result.code, result.json["shards_reused"]) == (0, 0)
    assert snapshot(box.out) == snapshot(other.out)


def test_a_comment_in_the_recipe_changes_nothing(box: Box, wanted: dict[str, str]) -> None:
    half_done(box)
    box.edit_recipe("# a remark\n" + box.recipe.read_text())
    assert box.run(*SHARDED, "--json").json["shards_reused"] == 2
    assert snapshot(box.out) == wanted


def test_workers_and_resuming_do_not_show_in_the_bytes(box: Box, wanted: dict[str, str]) -> None:
    half_done(box, 3)
    result = box.run("--workers", 7, "--set", "max_shard=1200", "--json")
    assert result.json["shards_reused"] == 3
    assert snapshot(box.out) == wanted


def test_two_renames_where_there_is_no_exchange(
    box: Box, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    (box.out / "old").mkdir(parents=True)
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == box.out and self == box.partial:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        assert box.run(*SHARDED, "--force").code == 3
    assert snapshot(box.out) == {"old": "folder"}
    assert box.run(*SHARDED, "--force").code == 0
    assert snapshot(box.out) == wanted
    assert sorted(path.name for path in box.root.glob("out*")) == ["out", "out.replaced"]
    assert snapshot(box.root / "out.replaced") == {"old": "folder"}, "what was not ours is kept"


def test_out_that_appears_meanwhile_is_not_replaced(
    box: Box, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        box.out.mkdir(exist_ok=True)
        (box.out / "theirs").touch()
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        result = box.run(*SHARDED)
    assert result.code == 2
    assert "output directory exists" in result.err
    assert list(snapshot(box.out)) == ["theirs"]
    again = box.run(*SHARDED, "--force", "--json")  # as the message says; nothing is done twice
    assert (again.code, again.json["shards_reused"]) == (0, SHARDS)
    assert snapshot(box.out) == wanted


# real processes and real signals

# writes nothing after its first shard, which is a single write, until it is stopped
HALTED = """
import itertools, os, sys
from quantcli.convert import together as streaming
made, write = streaming._Together.__init__, os.pwrite
runs, writes = [], itertools.count()
def make(self, *args):
    made(self, *args)
    runs.append(self)
def pwrite(*args):
    if next(writes):
        runs[0].stopped.wait()
    return write(*args)
streaming._Together.__init__, os.pwrite = make, pwrite
from quantcli.__main__ import main
main(sys.argv[1:])
"""


@contextmanager
def halted_run(box: Box, *more: object) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own that has finished a shard and stays in the next one."""
    command = [sys.executable, "-c", HALTED, *map(str, box.args(*SHARDED, *more))]
    pipe = subprocess.PIPE
    variables = {**os.environ}  # without COLUMNS, which the library readline sets behind Python's back
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("planning ")
            line = process.stderr.readline()
            assert line.startswith("shard 1/"), line
            yield process
        finally:
            process.kill()


@pytest.fixture
def bigger(tmp_path: Path) -> Box:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('target: ascend\nrules: [{match: "*_proj", scheme: w8a8_dynamic}]\n')
    return Box(tmp_path, make_llama(tmp_path / "model", layers=12), recipe, tmp_path / "out")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signals(bigger: Box, stop: signal.Signals) -> None:
    box = bigger
    undisturbed = Box(box.root, box.model, box.recipe, box.root / "undisturbed")
    assert undisturbed.run(*SHARDED).code == 0
    with halted_run(box, "--json") as process:
        if stop is signal.SIGINT:  # while it is at work, nobody else gets in
            before = snapshot(box.root / "model")
            for more in ((), ("--fresh",), ("--plan",), ("--fresh", "--plan")):
                refused = box.run(*SHARDED, *more)
                assert refused.code == 3, refused
                assert refused.later.startswith("error: another run is writing here\n"), refused.err
            assert snapshot(box.root / "model") == before
        process.send_signal(stop)
        out, err = process.communicate()
    assert "Traceback" not in err
    if stop is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "the same command again continues where it stopped" in err
        assert json.loads(out)["exit_code"] == 130
        what = json.loads(out)["error"]["what"]
        assert f"error: {what}\n" in err
        assert re.fullmatch(rf"interrupted; kept: [12] of \d+ shards in {box.partial}", what)
    assert not box.out.exists()
    result = box.run(*SHARDED, "--json")
    assert result.code == 0, result.err
    # a shard whose last write was under way may have been finished, but no other was begun
    assert 1 <= result.json["shards_reused"] < len(list(box.out.glob("*.safetensors"))) - 2
    assert snapshot(box.out) == snapshot(undisturbed.out)


def test_run_cli_is_the_real_command(box: Box) -> None:
    """What the other tests do in this process is what the installed program does."""
    program = Path(sys.executable).with_name("quantcli")
    done = subprocess.run([program, *map(str, box.args(*SHARDED))], capture_output=True, text=True)
    other = Box(box.root, box.model, box.recipe, box.root / "out2")
    here = other.run(*SHARDED)
    assert (done.returncode, here.code) == (0, 0)
    assert snapshot(box.out) == snapshot(other.out)
    again = run_cli(*box.args(*SHARDED))
    assert again.code == 2
