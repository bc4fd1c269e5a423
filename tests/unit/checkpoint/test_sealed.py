"""Manifests, descriptions of parts and journals whose seals are right and whose content is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcli.calibration.replay.states import load_states
from quantcli.checkpoint.files import MANIFEST, PART
from quantcli.checkpoint.header import encode_header
from quantcli.checkpoint.manifest import encode_manifest, read_manifest, whole_manifest
from quantcli.checkpoint.spec import TensorSpec
from quantcli.convert.journal import parse_journal
from quantcli.convert.part_folder import read_part
from quantcli.core.errors import InputError

NAMES = {
    "absolute": "/etc/passwd",
    "above": "../x",
    "above, below": "a/../../x",
    "long": "x" * 300,
    "deep": "a/" * 3000 + "x",
    "nul": "x\0",
    "escape": "x\x1b[2J",
    "c1": "x\x9b",
    "bidi": "x\u202e",
    "newline": "x\n",
    "empty": "",
    "folder": "x/",
}
MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no files": ({"files": None}, "`files` should be an object, not null"),
    "files are a list": ({"files": []}, "`files` should be an object, not a list"),
    "entry is a number": ({"files": {"x": 1}}, "`files.x` should be an object"),
    "no size": ({"files": {"x": {}}}, "`files.x.bytes` is missing"),
    "size is text": ({"files": {"x": {"bytes": "1"}}}, "`files.x.bytes` should be a whole number"),
    "size is negative": ({"files": {"x": {"bytes": -1}}}, "should be at least 0, not -1"),
    "size is true": ({"files": {"x": {"bytes": True}}}, "should be a whole number, not true or false"),
    "hash is a list": ({"files": {"x": {"bytes": 1, "sha256": []}}}, "sha256` should be text"),
    "recipe is a number": ({"recipe": 1}, "`recipe` should be text"),
    "target is a list": ({"target": ["x"]}, "`target` should be text, not a list"),
    "source is text": ({"source": "x"}, "`source` should be an object"),
    "packages are a list": ({"tool": {"packages": []}}, "`tool.packages` should be an object"),
    "version is an object": ({"tool": {"version": {}}}, "`tool.version` should be text"),
    **{
        f"name: {word}": ({"files": {name: {"bytes": 1}}}, "file name `")
        for word, name in NAMES.items()
    },
}


def manifest(**changes: Any) -> dict[str, Any]:
    return {"manifest_version": 1, "files": {"a/b": {"bytes": 1, "sha256": "1" * 64}}, **changes}


@pytest.mark.parametrize(("changes", "what"), MANIFESTS.values(), ids=[*MANIFESTS])
def test_a_sealed_manifest_is_read_by_types(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    content = encode_manifest(manifest(**changes))
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_manifest(tmp_path)
    assert what in caught.value.what
    assert caught.value.where == str(tmp_path / MANIFEST)
    assert caught.value.what.isprintable()
    sizes = dict.fromkeys(changes.get("files") or (), 1)
    assert whole_manifest(content, sizes) is None


def test_a_sound_manifest_is_read(tmp_path: Path) -> None:
    content = encode_manifest(manifest())
    (tmp_path / MANIFEST).write_bytes(content)
    assert encode_manifest(read_manifest(tmp_path)) == content
    assert whole_manifest(content, {"a/b": 1}) is not None
    assert whole_manifest(content, {"a/b": 2}) is None
    assert whole_manifest(content.replace(b"1", b"2"), {"a/b": 2}) is None


def part() -> dict[str, Any]:
    entry = {"bytes": 1, "sha256": "1" * 64, "blake3": "2" * 64}
    return {
        "part_version": 1,
        "part": 1,
        "of": 2,
        "checksum": True,
        "shards": {"a.safetensors": 1, "b.safetensors": 2},
        "carried": ["x/y"],
        "manifest": {"plan": "p", "recipe": "r", "tool": {}, "source": {}},
        "files": {"a.safetensors": entry, "x/y": entry},
    }


def put(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            table = table[key]
        table[last] = to

    return change


PARTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "part is text": (put("part", to="1"), "`part` should be a whole number, not text"),
    "part is too high": (put("part", to=3), "`part` is 3, and there are 2"),
    "no part": (put("part", to=0), "`part` should be at least 1"),
    "shards are a list": (put("shards", to=["a"]), "`shards` should be an object"),
    "shard of text": (put("shards", "a.safetensors", to="1"), "should be a whole number"),
    "shard below": (put("shards", "c/d.safetensors", to=2), "is not the name of a weight file"),
    "carried is an object": (put("carried", to={}), "`carried` should be a list of texts"),
    "carried a manifest": (put("carried", to=[MANIFEST]), "is a file of another use"),
    "file more": (put("files", "z", to={"bytes": 1}), "`files` and the part differ in `z`"),
    "entry of no hash": (put("files", "x/y", to={"bytes": 1}), "is missing"),
    "entry of a list": (put("files", "x/y", to=[]), "`files.x/y` should be an object"),
    "manifest is text": (put("manifest", to="x"), "`manifest` should be an object"),
    "recipe is a list": (put("manifest", "recipe", to=[]), "`manifest.recipe` should be text"),
    "checksum is text": (put("checksum", to="yes"), "`checksum` should be true or false"),
    **{
        f"name: {word}": (put("carried", to=["x/y", name]), "file name `")
        for word, name in NAMES.items()
    },
}


@pytest.mark.parametrize(("change", "what"), PARTS.values(), ids=[*PARTS])
def test_a_sealed_part_is_read_by_types(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    table = part()
    (tmp_path / PART).write_bytes(encode_manifest(table))
    assert [*read_part(tmp_path).files] == ["a.safetensors", "x/y"]
    change(table)
    (tmp_path / PART).write_bytes(encode_manifest(table))
    with pytest.raises(InputError) as caught:
        read_part(tmp_path)
    assert what in caught.value.what
    assert caught.value.what.isprintable()
    assert caught.value.where == str(tmp_path / PART)


LINE = {"shard": "a.safetensors", "nbytes": 1, "sha256": None}


@pytest.mark.parametrize(
    "change",
    [
        {"nbytes": "1"}, {"nbytes": -1}, {"nbytes": True}, {"sha256": 1}, {"blake3": []}, {"shard": []},
        {"more": 1}, *({"shard": name} for name in NAMES.values()),
    ],
    ids=repr,
)  # fmt: skip
def test_a_journal_ends_before_a_line_that_no_run_writes(change: dict[str, Any]) -> None:
    head = {"plan": "p", "checksum": True, "source": {}}
    text = "".join(json.dumps(line) + "\n" for line in (head, LINE))
    lines, nbytes = parse_journal((text + json.dumps({**LINE, **change}) + "\n").encode())
    assert (lines, nbytes) == ([head, LINE], len(text))


@pytest.mark.parametrize("head", [{"plan": 1}, {"checksum": "yes"}, {"source": []}], ids=repr)
def test_a_journal_needs_its_head(head: dict[str, Any]) -> None:
    line = {"plan": "p", "checksum": True, "source": {}, **head}
    assert parse_journal((json.dumps(line) + "\n").encode()) == ([], 0)


@pytest.mark.parametrize(
    "carried",
    ["[]", '{"0": []}', '{"0": {"x": 1}}', '{"0": {"x": [["y", {}]]}}', '{"0": {"x": "../out"}}',
     '{"0": {"x": ["/out"]}}', "[" * 5000, '{"0": {"x": "\\u0000"}}'],
)  # fmt: skip
def test_states_whose_list_of_files_is_of_no_use(tmp_path: Path, carried: str) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    spec = TensorSpec("batch.000000", "F32", (1,))
    (folder / "states-00001.safetensors").write_bytes(encode_header([spec]) + bytes(4))
    (tmp_path / "out").write_bytes(encode_header([TensorSpec("x", "F32", (1,))]) + bytes(4))
    assert load_states(folder, "states-00001.safetensors", [spec], 0) is not None
    (folder / "states-00001.carried.json").write_text(carried)
    assert load_states(folder, "states-00001.safetensors", [spec], 0) is None
