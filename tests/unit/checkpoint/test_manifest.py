"""The manifest: sealed, read again, and what is not one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quantcli
from quantcli.checkpoint.files import MANIFEST
from quantcli.checkpoint.manifest import (
    Recorded,
    encode_manifest,
    has_recipe,
    read_manifest,
    read_sealed,
    tool_of,
    tool_text,
    whole_manifest,
)
from quantcli.core.errors import InputError

TABLE: dict[str, Any] = {
    "manifest_version": 1,
    "name": "x é",
    "files": {"a": {"bytes": 3}, "b/c": {"bytes": 0}},
}
SIZES = {"a": 3, "b/c": 0, "other": 9}


def test_the_seal_is_the_hash_of_all_the_rest() -> None:
    content = encode_manifest(TABLE)
    plain = json.dumps(TABLE, indent=2, ensure_ascii=False) + "\n"
    seal = hashlib.sha256(plain.encode()).hexdigest()
    assert (
        content == (json.dumps({**TABLE, "sha256": seal}, indent=2, ensure_ascii=False) + "\n").encode()
    )
    assert encode_manifest({"sha256": "old", **TABLE}) == content, "an old seal is replaced"


def test_what_was_sealed_is_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(encode_manifest(TABLE))
    table = read_manifest(tmp_path)
    assert {**table, "sha256": ""} == {**TABLE, "sha256": ""}
    assert list(table) == ["manifest_version", "name", "files", "sha256"]


def test_a_change_breaks_the_seal(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    path.write_bytes(encode_manifest(TABLE).replace(b": 3", b": 4"))
    with pytest.raises(InputError) as caught:
        read_manifest(tmp_path)
    assert caught.value.what == "manifest was changed since it was written"
    assert caught.value.where == str(path)
    assert caught.value.fix == "copy the checkpoint again"
    with pytest.raises(InputError, match=r"^part was changed") as caught:
        read_sealed(path, "part", "again")
    assert caught.value.fix == "again"


@pytest.mark.parametrize("files", [None, [], "a", {"a": 3}, {"a": {"bytes": 3}, "b": []}])
def test_files_are_a_table_of_tables(tmp_path: Path, files: Any) -> None:
    (tmp_path / MANIFEST).write_bytes(encode_manifest({**TABLE, "files": files}))
    with pytest.raises(InputError, match=r"`files.*` should be an object"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [None, True, 1.0, 2, "1"])
def test_another_version_is_refused(tmp_path: Path, version: Any) -> None:
    (tmp_path / MANIFEST).write_bytes(encode_manifest({**TABLE, "manifest_version": version}))
    with pytest.raises(InputError, match=r"^the manifest has version ") as caught:
        read_manifest(tmp_path)
    assert caught.value.where == str(tmp_path / MANIFEST)


def test_a_whole_manifest() -> None:
    content = encode_manifest(TABLE)
    found = whole_manifest(content, SIZES)
    assert found is not None
    assert found["files"] == TABLE["files"]
    assert whole_manifest(encode_manifest({"files": {}}), {}) is not None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"[" * 5000, b"\xff", encode_manifest({}), encode_manifest({"files": []}),
        encode_manifest({"files": {"a": {}}}), encode_manifest({"files": {"a": 3}}),
        encode_manifest(TABLE) + b" ", encode_manifest(TABLE).replace(b"x", b"y"),
        encode_manifest(TABLE).replace(b"x", b"w"), encode_manifest({**TABLE, "recipe": 3}),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_none(content: bytes) -> None:
    assert whole_manifest(content, SIZES) is None


@pytest.mark.parametrize("sizes", [{}, {"a": 3}, {"a": 4, "b/c": 0}, {"b/c": 0}])
def test_a_manifest_of_other_files_is_none(sizes: dict[str, int]) -> None:
    assert whole_manifest(encode_manifest(TABLE), sizes) is None


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ({"version": "1.2", "packages": {"torch": "2", "a": 3}}, "quantcli 1.2 with a 3 with torch 2"),
        ({"version": "1.2"}, "quantcli 1.2"),
        ({"version": "1.2", "packages": ["torch"]}, "quantcli 1.2"),
        ("x", "quantcli None"),
        ({"version": "v" * 99, "packages": {"p" * 99: "w" * 99}},
         f"quantcli {'v' * 40} with {'p' * 40} {'w' * 40}"),
    ],
)  # fmt: skip
def test_the_versions_as_text(tool: Any, text: str) -> None:
    assert tool_text(tool) == text


@pytest.mark.parametrize(
    "change",
    [
        {"plan": 1}, {"target": ["ascend"]}, {"recipe": []}, {"source": "x"}, {"tool": 3},
        {"source": {"fingerprint": 1}}, {"tool": {"version": 1}}, {"tool": {"packages": []}},
        {"tool": {"packages": {"torch": 2}}}, {"files": {"a": {}}}, {"files": {"a": {"bytes": "3"}}},
        {"files": {"a": {"bytes": 3, "sha256": 1}}}, {"files": {"a": {"bytes": 3, "blake3": 1}}},
        {"files": {"a": {"bytes": 3, "sha256": "a"}}},
        {"files": {"a": {"bytes": 3, "blake3": "A" * 64}}},
        {"files": {"../a": {"bytes": 3}}}, {"files": {"a" * 256: {"bytes": 3}}},
    ],
)  # fmt: skip
def test_values_of_other_types_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Anyone can seal a manifest."""
    (tmp_path / MANIFEST).write_bytes(encode_manifest({**TABLE, **change}))
    with pytest.raises(InputError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value.where).startswith(str(tmp_path / MANIFEST))
    assert caught.value.fix == "copy the checkpoint again"


def test_the_recipe_of_a_manifest_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    text = "target: é\n"
    assert not has_recipe({"recipe": text}, file), "there is none"
    file.write_text(text)
    assert has_recipe({"recipe": text}, file)
    assert not has_recipe({"recipe": text + " "}, file)
    assert not has_recipe({"recipe": " " + text}, file)
    assert not has_recipe({"recipe": text[:-1] + "!"}, file)
    assert not has_recipe({"recipe": [text]}, file)
    assert not has_recipe({}, file)


def test_what_makes_a_checkpoint() -> None:
    assert tool_of({}) == {"name": "quantcli", "version": quantcli.__version__}
    assert tool_of({"plugin": "2"}) == {**tool_of({}), "packages": {"plugin": "2"}}


CALIBRATION = {"text": {"name": "x.txt", "sha256": "12"}, "tokenizer": {"tokenizer.json": "34"},
               "statistics": "56", "tool": "quantcli 1"}  # fmt: skip
RECORDED = Recorded("x.txt", "12", {"tokenizer.json": "34"}, "56", "quantcli 1")


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({}, {}),
        ({"text": "x.txt"}, {"name": None, "text": None}),
        ({"text": {"name": 3, "sha256": "12"}}, {"name": None}),
        ({"text": {"name": "x.txt"}}, {"text": None}),
        ({"statistics": []}, {"statistics": None}),
        ({"tool": 3}, {"tool": None}),
        ({"tokenizer": ["34"]}, {"tokenizer": None}),
        ({"tokenizer": {"a": "b", "c": 3}}, {"tokenizer": None}),
        ({"tokenizer": {}}, {"tokenizer": {}}),
    ],
)
def test_what_a_manifest_says_of_a_calibration(change: Any, lost: dict[str, Any]) -> None:
    """It came with a checkpoint: a value of another type says nothing, and takes nothing else along."""
    recorded = Recorded.of({"calibration": {**CALIBRATION, **change}})
    assert recorded == replace(RECORDED, **lost)


def test_a_manifest_that_says_nothing_of_a_calibration() -> None:
    assert Recorded.of({}) == Recorded.of({"calibration": "x"}) == Recorded()
