from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from quantcli.checkpoint.hub import find_model
from quantcli.core.errors import InputError, MachineError, QuantError
from quantcli.core.events import Progress
from tests.builders import make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


LOOKING = "looking for org/name on the Hub, or in its cache\n"


def offline(home: Path, model: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "quantcli", "inspect", model, *arguments],
        capture_output=True,
        text=True,
        cwd=home,
        env={**env, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )


def test_offline_with_an_empty_cache_is_one_clear_sentence(tmp_path: Path) -> None:
    done = offline(tmp_path, "org/name", "--json")
    problem = "`org/name` is neither a directory nor in the Hub cache, and HF_HUB_OFFLINE is set"
    fix = "fetch it where there is a network, or give a directory"
    assert done.returncode == 3
    assert done.stderr == f"{LOOKING}error: {problem}\n  fix: {fix}\n"
    assert json.loads(done.stdout) == {
        "ok": False,
        "schema_version": 1,
        "error": {"what": problem, "where": None, "fix": fix},
        "exit_code": 3,
    }


def test_offline_with_a_filled_cache_works(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = make_model(cache / "snapshots" / COMMIT, config={"model_type": "tiny"})
    blob = cache / "blobs" / "abc"
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    done = offline(tmp_path, "org/name", "--json")
    assert (done.returncode, done.stderr) == (0, LOOKING)
    account = json.loads(done.stdout)
    assert (account["path"], account["model_type"]) == (str(snapshot), "tiny")
    assert account["bytes"] == 16


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What the Hub is asked for; it gives `/hub`."""
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repo: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        asked.append((repo if revision is None else f"{repo} at {revision}", ignore_patterns))
        return "/hub"

    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_id_is_fetched_without_pickles(fetched: list[tuple[str, list[str]]]) -> None:
    assert find_model("Org-1/Name_2.5") == Path("/hub")
    ((repo, patterns),) = fetched
    assert repo == "Org-1/Name_2.5"

    def ignored(file: str) -> bool:
        return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)

    assert all(map(ignored, ["pytorch_model.bin", "original/consolidated.00.pth", "x.pt", "x.pkl"]))
    assert not any(map(ignored, ["model.safetensors", "config.json", "tokenizer.model", "ptx"]))


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", COMMIT])
def test_a_hub_id_with_a_revision(fetched: list[tuple[str, list[str]]], revision: str) -> None:
    assert find_model(f"org/name@{revision}") == Path("/hub")
    assert [repo for repo, _ in fetched] == [f"org/name at {revision}"]


@pytest.mark.parametrize(
    "model",
    ["name", "./org/name", "../org/name", "/org/name", "a/b/c", "", "org/", "-x/y", "a/\0", "name@x"],
)
def test_what_is_no_hub_id_is_a_path(fetched: list[tuple[str, list[str]]], model: str) -> None:
    assert find_model(model) == Path(model)
    assert fetched == []


@pytest.mark.parametrize("model", ["org/name@", "org/name@-x", "org/name@a b", "org@x/name"])
def test_what_is_no_revision_is_part_of_a_path(
    fetched: list[tuple[str, list[str]]], model: str
) -> None:
    assert find_model(model) == Path(model)
    assert fetched == []


def test_a_directory_wins_over_the_hub(
    fetched: list[tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "org" / "name")
    assert find_model("org/name") == Path("org/name")
    assert fetched == []


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/models/x") == tmp_path / "models" / "x"


@pytest.mark.parametrize(
    ("model", "reason"),
    [("~no-such-user-here/x", "Could not determine home"), ("x/" + "y" * 300, "File name too long")],
)
def test_names_that_no_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, reason: str
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        find_model(model)
    assert caught.value.what.startswith("not the name of a model: ")
    assert reason in caught.value.what
    assert caught.value.where == model[:200]


def http_error(kind: type[Exception]) -> Exception:
    """An error of the library without the response it wants."""
    return kind.__new__(kind, "401")


@pytest.mark.parametrize(
    ("raised", "kind", "what", "where"),
    [
        (http_error(errors.GatedRepoError), InputError, "`o/n` is gated on the Hub", None),
        (
            http_error(errors.RepositoryNotFoundError),
            InputError,
            "`o/n` is neither a directory nor a repository of the Hub",
            None,
        ),
        (
            errors.HFValidationError("bad"),
            InputError,
            "`o/n` is neither a directory nor the name of a repository of the Hub",
            None,
        ),
        (
            OSError(28, "No space left on device"),
            MachineError,
            "`o/n` is not a directory here, and it cannot be fetched from the Hub",
            "[Errno 28] No space left on device",
        ),
        (
            ValueError("\nfirst line " + "x" * 300 + "\nsecond"),
            MachineError,
            "`o/n` is not a directory here, and it cannot be fetched from the Hub",
            ("first line " + "x" * 300)[:200],
        ),
        (
            RuntimeError(),
            MachineError,
            "`o/n` is not a directory here, and it cannot be fetched from the Hub",
            "RuntimeError",
        ),
    ],
    ids=["gated", "absent", "bad-name", "disk-full", "long", "wordless"],
)
def test_what_the_hub_says_becomes_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    kind: type[QuantError],
    what: str,
    where: str | None,
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind) as caught:
        find_model("o/n")
    assert type(caught.value) is kind
    assert (caught.value.what, caught.value.where) == (what, where)
    assert caught.value.fix


def test_a_revision_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise http_error(errors.RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        find_model("o/n@v9")
    assert caught.value.what == "`o/n` has no revision `v9` on the Hub"
    assert caught.value.fix == "give a branch, a tag or a commit of it"


def test_a_misspelt_path_is_not_blamed_on_the_network(tmp_path: Path) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    found = subprocess.run(
        [sys.executable, "-m", "quantcli", "inspect", "models/lama"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr.splitlines() == [
        "looking for models/lama on the Hub, or in its cache",
        "error: no such model directory, and no such repository in reach",
        "  --> models/lama",
        "  fix: did you mean `llama` in models?",
    ]


def test_the_hub_is_announced_and_a_folder_is_not(
    fetched: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "say", said.append)
    assert find_model(str(tmp_path), progress) == tmp_path
    assert said == []
    find_model("org/name@main", progress)
    assert said == ["looking for org/name@main on the Hub, or in its cache"]
    assert [repo for repo, _ in fetched] == ["org/name at main"]
