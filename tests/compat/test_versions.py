"""A file of ours in a form that this version does not read: refused, with both versions and a fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcli.calibration.store import read_head
from quantcli.checkpoint.manifest import encode_manifest, read_manifest
from quantcli.convert.part_folder import read_part
from quantcli.core.errors import InputError
from quantcli.core.text import UPGRADE
from quantcli.recipe.recipe import load_recipe
from quantcli.recipe.release import read_release

RECIPE = "target: ascend\nrules:\n  - {match: '*', scheme: keep}\n"
RELEASE = "checkpoints: [w8a8_dynamic]\n"
AGAIN = "make it again with this version of quantcli"


def file_with(content: str) -> Callable[[Path, str], Path]:
    def write(folder: Path, version: str) -> Path:
        (folder / "file.yaml").write_text(f"{content}version: {version}\nkey_of_tomorrow: 1\n")
        return folder / "file.yaml"

    return write


def sealed(name: str, key: str) -> Callable[[Path, str], Path]:
    def write(folder: Path, version: str) -> Path:
        (folder / name).write_bytes(encode_manifest({key: json.loads(version), "files": {}}))
        return folder

    return write


def calibration(folder: Path, version: str) -> Path:
    (folder / "calibration.json").write_text(f'{{"version": {version}, "layers": 1}}')
    return folder


READERS: dict[str, tuple[Callable[[Path, str], Path], Callable[[Any], object], int]] = {
    "recipe": (file_with(RECIPE), load_recipe, 1),
    "release file": (file_with(RELEASE), read_release, 1),
    "manifest": (sealed("quantcli_manifest.json", "manifest_version"), read_manifest, 1),
    "description of the part": (sealed("quantcli_part.json", "part_version"), read_part, 1),
    "calibration": (calibration, read_head, 2),
}


@pytest.mark.parametrize(
    ("version", "fix"), [("7", UPGRADE), ('"2"', AGAIN), ("true", AGAIN), ("[1]", AGAIN)]
)
@pytest.mark.parametrize("noun", READERS)
def test_another_version_is_named(tmp_path: Path, noun: str, version: str, fix: str) -> None:
    write, read, reads = READERS[noun]
    with pytest.raises(InputError) as caught:
        read(write(tmp_path, version))
    shown = repr(json.loads(version))
    assert caught.value.what == f"the {noun} has version {shown}; this quantcli reads version {reads}"
    written = noun in {"recipe", "release file"}  # by hand
    assert caught.value.fix == (
        "write `version: 1`, and what that takes" if written and fix == AGAIN else fix
    )
    line = {"recipe": ":4", "release file": ":2"}.get(noun, "")
    assert (caught.value.where or "").endswith(line)


def test_the_version_of_today_and_none_are_the_same(tmp_path: Path) -> None:
    for number, more in enumerate(("", "version: 1\n", "version: null\n")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(RECIPE + more)
        assert load_recipe(path).file.max_shard == 5 * 10**9
        path.write_text(RELEASE + more)
        assert read_release(path).entries[0].name == "w8a8_dynamic"
