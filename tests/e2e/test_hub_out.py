"""Conversions into a repository of the Hub, which a server on this machine takes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantcli.checkpoint.files import CARD, INDEX, JOURNAL, MANIFEST
from quantcli.convert.hub import _Scratch
from tests.e2e.conftest import Box, Result, make_box, run_cli, snapshot
from tests.hub_server import Asked
from tests.hub_uploads import Shelf, uploads

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=")  # in huggingface_hub

URL = "hf://org/out"
SMALL = ("--set", "max_shard=1.2KB", "--workers", "2")
SHARDS = [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
ADDED = [f"Add {shard}" for shard in SHARDS]
END = ["Add the files without weights", "Add the configuration and the manifest", "Add the card"]


@pytest.fixture
def hub(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    (tmp_path / "served").mkdir()
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with uploads(tmp_path / "served", tmp_path / "cache") as hub:
        yield hub
    assert list((tmp_path / "scratch").glob("quantcli-*-*")) == []  # models that are open have others


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same conversion into a folder."""
    box = make_box(tmp_path_factory.mktemp("expected"))
    assert box.run(*SMALL).code == 0
    return snapshot(box.out)


def convert(box: Box, *more: object) -> Result:
    return run_cli("quantize", box.recipe, "--model", box.model, "--out", URL, *SMALL, *more)


def published(hub: Shelf, branch: str = "") -> dict[str, str]:
    files = snapshot(hub.folder / f"org/out{branch}")
    assert files.pop(".gitattributes")
    return files


def test_the_same_bytes_as_in_a_folder(box: Box, hub: Shelf, expected: dict[str, str]) -> None:
    """Nothing looks done before the last shard is there, and the card comes last."""
    done = convert(box)
    assert done.code == 0, done.err
    assert published(hub) == expected
    assert [commit.title for commit in hub.commits] == ["Begin", *ADDED, *END]
    assert hub.private == {"org/out"}
    states = [set(commit.files) - {".gitattributes"} for commit in hub.commits]
    assert states[0] == {JOURNAL}
    assert states[5] == {JOURNAL, *SHARDS}
    assert states[6] == {*expected} - {MANIFEST, "config.json", CARD} | {JOURNAL}
    assert states[7] == {*expected} - {CARD} | {JOURNAL}
    assert states[8] == {*expected}
    assert f"done: {URL}" in done.err
    assert "hf_secret" not in done.out + done.err


def test_one_shard_at_a_time_is_on_this_machine(
    box: Box, hub: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the plan says; the folder is measured at each request."""
    plan = convert(box, "--plan", "--json").json["plan"]
    assert hub.commits == []
    sizes = []
    note = Shelf.note

    def measure(self: Shelf, asked: Asked) -> None:
        sizes.append(sum(p.stat().st_size for p in (tmp_path / "scratch").glob("*/shards/*")))
        note(self, asked)

    monkeypatch.setattr(Shelf, "note", measure)
    assert convert(box).code == 0
    largest = max(shard["bytes"] for shard in plan["shards"])
    assert largest == max(sizes) <= plan["disk_needed"]
    rest = plan["disk_needed"] - largest
    assert 0 < rest < 10_000


def test_from_the_hub_to_the_hub(box: Box, hub: Shelf, expected: dict[str, str]) -> None:
    """And what is there then is verified where it is, against the model where that is."""
    (hub.folder / "org").mkdir()
    box.model.rename(hub.folder / "org" / "model")
    command = ["quantize", box.recipe, "--model", "hf://org/model", "--out", URL, *SMALL]
    plan = run_cli(*command, "--plan")
    assert f"output       {URL}, which is created as a private repository" in plan.out
    assert run_cli(*command).code == 0
    named = {CARD, MANIFEST}  # the card names the model, and the manifest has its hash
    same = dict(item for item in published(hub).items() if item[0] not in named)
    assert same == dict(item for item in expected.items() if item[0] not in named)
    verified = run_cli("verify", URL, "--full", "--against", "hf://org/model")
    assert verified.code == 0, verified.out + verified.err
    assert not (box.root / "cache").exists()


@pytest.mark.parametrize("done", [1, 3])
def test_an_interrupted_run_goes_on(box: Box, hub: Shelf, expected: dict[str, str], done: int) -> None:
    hub.most_commits = 1 + done
    ended = convert(box)
    assert ended.code == 3, ended.err
    assert "the Hub could not be written to: the server answers 500" in ended.err
    hub.most_commits = 99
    assert "error: checkpoint is not finished" in run_cli("inspect", URL).err
    plan = convert(box, "--plan")
    assert f"resumes      {done} shard" in plan.out
    again = convert(box, "--json")
    assert again.json["shards_reused"] == done
    assert [commit.title for commit in hub.commits] == ["Begin", *ADDED, *END]
    assert published(hub) == expected


def test_a_run_of_something_else_goes_on_only_if_fresh(
    box: Box, hub: Shelf, expected: dict[str, str]
) -> None:
    hub.most_commits = 2
    assert convert(box, "--set", "max_shard=2KB").code == 3
    hub.most_commits = 99
    refused = convert(box)
    assert refused.code == 2
    assert "unfinished work of another run: the recipe or version has changed" in refused.err
    assert convert(box, "--fresh").code == 0
    assert published(hub) == expected


def test_a_shard_that_somebody_replaced_is_written_again(
    box: Box, hub: Shelf, expected: dict[str, str]
) -> None:
    hub.most_commits = 3
    assert convert(box).code == 3
    hub.most_commits = 99
    shard = hub.folder / "org/out" / SHARDS[0]
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(bytes(len(content)))
    again = convert(box, "-v")
    assert f"{SHARDS[0]} is written again: its hash has changed" in again.err
    assert published(hub) == expected


def test_force_replaces_a_model(box: Box, hub: Shelf, expected: dict[str, str]) -> None:
    """The old one looks unfinished from the first commit on, and is gone with the last ones."""
    assert convert(box, "--set", "max_shard=2KB").code == 0
    refused = convert(box)
    assert refused.code == 2
    assert "the repository holds other files: `config.json`" in refused.err
    hub.commits.clear()
    plan = convert(box, "--plan", "--force")
    assert f"replaces     {URL}, which is deleted, and stays in the history" in plan.out
    assert convert(box, "--force").code == 0
    assert published(hub) == expected
    assert not {MANIFEST, "config.json", INDEX, CARD} & {*hub.commits[0].files}
    assert convert(box, "--fresh").code == 2


def test_a_branch_of_its_own(box: Box, hub: Shelf, expected: dict[str, str]) -> None:
    assert convert(box, "--set", "max_shard=2KB").code == 0
    command = ["quantize", box.recipe, "--model", box.model, "--out", f"{URL}@int8", *SMALL, "--json"]
    done = run_cli(*command)
    assert done.json["plan"]["serve"][0]["command"].startswith("vllm serve org/out ")
    assert done.json["plan"]["serve"][0]["command"].endswith(" --revision int8")
    assert published(hub, "@int8") == expected
    assert published(hub) != expected


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--no-checksum"], "the Hub takes no file without its hash"),
        (["--part", "1/2"], "a repository takes no parts"),
        (["--out", "hf://datasets/org/out"], "not the address of a model on the Hub"),
    ],
)
def test_what_the_hub_does_not_take_is_refused_before_the_work(
    box: Box, hub: Shelf, more: list[str], what: str
) -> None:
    refused = convert(box, *more)
    assert refused.code == 2
    assert what in refused.err
    assert hub.commits == []
    assert not (hub.folder / "org").exists()


def test_a_disk_that_is_too_full_is_told_before_the_work(
    box: Box, hub: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcli.convert.hub.disk_usage", lambda _: (10**9, 10**9, 100))
    refused = convert(box, "--plan")
    assert refused.code == 3
    assert "disk is too full for the largest shard" in refused.err


def test_what_a_killed_run_left_here_is_deleted(box: Box, hub: Shelf, tmp_path: Path) -> None:
    """Nobody else's folder is used, and no two runs share one."""
    killed = _Scratch(URL)
    (killed.shards / SHARDS[0]).write_bytes(b"half")
    assert "another run is writing here" in convert(box).err
    os.close(killed._fd)  # as the end of a process does
    (folder,) = (tmp_path / "scratch").iterdir()
    aside = folder.rename(tmp_path / "aside")
    folder.symlink_to(aside)
    refused = convert(box)
    assert refused.code == 3
    assert "somebody else has made this folder, or can write in it" in refused.err
    assert (aside / "shards" / SHARDS[0]).exists()
    folder.unlink()
    aside.rename(folder)
    assert convert(box).code == 0
    assert not folder.exists()


def test_parts_are_joined_in_a_repository(box: Box, hub: Shelf, expected: dict[str, str]) -> None:
    parts = []
    for number in (1, 2):
        out = box.root / "parts"
        args = ["quantize", box.recipe, "--model", box.model, "--out", out, *SMALL]
        assert run_cli(*args, "--part", f"{number}/2").code == 0
        parts.append(out.with_name(f"parts.part-{number}-of-2"))
    done = run_cli("pack", "--merge", *parts, "--out", URL)
    assert done.code == 0, done.err
    assert published(hub) == expected


def test_a_release_into_repositories(box: Box, hub: Shelf, expected: dict[str, str]) -> None:
    """`{name}` is a part of the repository's name; what is done is recognised."""
    entries = [{"recipe": str(box.recipe), "name": name} for name in ("out", "more")]
    release = box.root / "release.yaml"
    release.write_text(json.dumps({"checkpoints": entries, "set": {"max_shard": "1.2KB"}}))
    words = ("release", release, "--model", box.model, "--out", "hf://org/{name}", "--json")
    for status in ("written", "done"):
        result = run_cli(*words, "--workers", 2)
        assert result.code == 0, result.err
        assert {c["status"] for c in result.json["checkpoints"]} == {status}
    for name in ("out", "more"):
        files = snapshot(hub.folder / f"org/{name}")
        assert files.pop(".gitattributes")
        assert files == expected
