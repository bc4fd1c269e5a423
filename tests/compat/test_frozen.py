"""What earlier versions wrote: it is read, or refused with the version by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import quantcli
from tests.compat.freeze import HERE, documents, shape_of, stamp
from tests.e2e.conftest import snapshot

VERSIONS = sorted(folder.name for folder in HERE.glob("v*"))


@pytest.fixture(scope="module", params=VERSIONS)
def frozen(request: pytest.FixtureRequest) -> Path:
    """The folder of a version. Nothing in it may change."""
    return HERE / str(request.param)


@pytest.fixture(scope="module")
def place(frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, in which commands write."""
    copy = tmp_path_factory.mktemp("frozen") / frozen.name
    shutil.copytree(frozen, copy)
    (copy / "stopped").rename(copy / "stopped.partial")
    stamp(copy / "model")
    return copy


@pytest.fixture(scope="module")
def now(place: Path) -> dict[str, Any]:
    """The documents of all commands on what that version wrote."""
    return documents(place)


def test_this_version_is_frozen() -> None:
    assert f"v{quantcli.__version__}" in VERSIONS, "run python -m tests.compat.freeze"
    sizes = [path.stat().st_size for path in HERE.rglob("*") if path.is_file()]
    assert sum(sizes) < 300_000 * len(VERSIONS)


def lost(shape: Any, now: Any, place: str = "") -> Iterator[str]:
    """The keys of a frozen shape that a document has not, or with another type."""
    if shape is None or now is None or "anything" in (shape, now) or shape == now:
        return
    if type(shape) is not type(now) or isinstance(shape, str):
        yield f"{place}: was {shape}, is {now}"
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if key not in now:
                yield f"{place}.{key} is not there"
            else:
                yield from lost(inner, now[key], f"{place}.{key}")
    elif shape and now:
        yield from lost(shape[0], now[0], f"{place}[]")


def test_documents_keep_their_keys(frozen: Path, now: dict[str, Any]) -> None:
    shapes = json.loads((frozen / "documents.json").read_text())
    assert shapes.keys() <= now.keys()
    for command, shape in shapes.items():
        missing = [*lost(shape, shape_of(now[command]))]
        assert not missing, f"{command}: {missing[:5]}"


def test_a_key_that_is_lost_or_changed_is_seen() -> None:
    rows = {"a": [{"b": 1, "c": "x"}, {"b": None, "c": "y"}], "d": True, "e": None}
    assert [*lost(shape_of(rows), shape_of(rows))] == []
    assert [*lost(shape_of(rows), shape_of({**rows, "new": 1, "e": 3, "a": []}))] == []
    changed = {"a": [{"b": "1"}], "e": 3}
    assert [*lost(shape_of(rows), shape_of(changed))] == [
        ".a[].b: was number, is text", ".a[].c is not there", ".d is not there",
    ]  # fmt: skip


def test_a_checkpoint_is_verified_and_made_again(now: dict[str, Any]) -> None:
    verified, again = now["verify"], now["reproduce"]
    assert (verified["ok"], verified["not_checked"]) == (True, [])
    checked = {check["name"]: check["checked"] for check in verified["checks"]}
    assert (checked["recomputed"], checked["hashes"]) == (again["tensors"], again["files"] - 1)
    assert (again["ok"], again["difference"]) == (True, None)


def test_a_calibration_is_used(frozen: Path, place: Path, now: dict[str, Any]) -> None:
    assert now["quantize"]["plan"]["calibration"]["complete"] is True
    kept = {n: h for n, h in snapshot(place / "calibration").items() if n.endswith(".safetensors")}
    assert kept.items() <= snapshot(frozen / "calibration").items()
    weights = {n: h for n, h in snapshot(frozen / "out").items() if n.endswith(".safetensors")}
    assert len(weights) == 2
    assert weights.items() <= snapshot(place / "again").items()


def test_parts_are_joined(frozen: Path, place: Path) -> None:
    parts = sorted(place.glob("out.part-*"))
    merged = quantcli.pack(parts, merge=True, out=place / "merged")
    assert snapshot(merged.out) == snapshot(frozen / "out")


def test_an_interrupted_run_continues_or_names_the_version(frozen: Path, place: Path) -> None:
    words = {"model": place / "model", "calibration": place / "calibration", "data": place / "text.txt"}
    stopped = place / "stopped"
    if frozen.name == f"v{quantcli.__version__}":
        # with `data`, the recipe has the name of the text alone, as in the frozen run
        resumed = quantcli.quantize(place / "recipe.yaml", out=stopped, **words)
        assert resumed.shards_reused == 1
        assert snapshot(resumed.out) == snapshot(frozen / "out")
        return
    with pytest.raises(quantcli.InputError, match="the recipe or version has changed since"):
        quantcli.quantize(place / "recipe.yaml", out=stopped, **words)
    fresh = quantcli.quantize(place / "recipe.yaml", out=stopped, fresh=True, **words)
    assert fresh.shards_reused == 0
