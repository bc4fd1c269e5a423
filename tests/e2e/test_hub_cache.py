"""Every command reads what the Hub's client has fetched, however it has linked it."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantcli
from tests.e2e.conftest import RECIPE, Box, make_llama, run_cli, snapshot
from tests.hub_cache import cache_model, link_files
from tests.hub_server import Fault, Hub, used

SHARDED = ("--set", "max_shard=2KB")
disk = namedtuple("disk", "total used free")


@pytest.mark.parametrize("shared", [False, True], ids=["blobs", "shared store"])
@pytest.mark.parametrize("local", [False, True], ids=["snapshot", "local_dir"])
def test_commands_read_the_cache(tmp_path: Path, shared: bool, local: bool) -> None:
    plain = make_llama(tmp_path / "plain")
    model = cache_model(make_llama(tmp_path / "model"), tmp_path / "hub", shared=shared)
    assert (model / "model.safetensors").is_symlink()
    assert (model / "model.safetensors").resolve().parts[-3] == (
        "blobs" if shared else "models--org--name"
    )
    if local:
        model = link_files(model, tmp_path / "local")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    for source, out in ((plain, "expected"), (model, "out")):
        done = run_cli("quantize", recipe, "--model", source, "--out", tmp_path / out)
        assert done.code == 0, done.err
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    assert run_cli("inspect", model).code == 0
    verified = run_cli("verify", tmp_path / "out", "--full", "--against", model)
    assert verified.code == 0, verified.out + verified.err


def test_a_model_by_its_id_is_fetched_and_converted(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a connection that is cut; the bytes are those of a conversion of the folder, and the second
    time nobody is asked."""
    assert box.run().code == 0
    expected = snapshot(box.out)
    box.model.rename((box.root / "served" / "org").mkdir(parents=True) or box.root / "served/org/name")
    with used(box.root / "served", box.root / "cache") as hub:
        hub.faults = [Fault("model.safetensors", times=3, cut=5000)]  # two for the header
        command = ["quantize", box.recipe, "--model", "org/name", "--out"]
        done = run_cli(*command, box.root / "fetched")
        assert done.code == 0, done.err
        lines = done.err.splitlines()
        assert lines[:2] == [
            "no folder org/name here: looking for it on the Hub, or in its cache",
            "reading the headers of org/name: 1 shard",
        ]
        assert "fetching 3 files of org/name, 7.3 kB" in lines
        assert any("Error while downloading from a file" in line for line in lines)
        assert [asked.sent < 7000 for asked in hub.fetched("model.safetensors")] == [True] * 3 + [False]
        hub.asked.clear()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert run_cli(*command, box.root / "offline").code == 0
        assert hub.asked == []
    fetched = snapshot(box.root / "fetched")
    assert fetched == snapshot(box.root / "offline")
    assert "base_model: org/name" in (box.root / "fetched" / "README.md").read_text()
    named = {"README.md", "quantcli_manifest.json"}  # the card, and its hash
    assert {k: v for k, v in fetched.items() if k not in named} == {
        k: v for k, v in expected.items() if k not in named
    }


@pytest.fixture
def hub(box: Box) -> Iterator[Hub]:
    """It has the model as org/name, and nothing is in the cache."""
    (box.root / "served" / "org").mkdir(parents=True)
    shutil.copytree(box.model, box.root / "served" / "org" / "name")
    with used(box.root / "served", box.root / "cache") as hub:
        yield hub


def test_a_plan_needs_no_weights(box: Box, hub: Hub) -> None:
    """Nor does a plan that misses what is expected."""
    command = ["quantize", box.recipe, "--model", "org/name", "--out", box.out]
    done = run_cli(*command, "--plan", "--json")
    assert done.json["plan"]["download"] == 7283
    shown = run_cli(*command, "--plan").out
    assert "download     7.3 kB of org/name first, into the Hub's cache" in shown
    box.edit_recipe(box.recipe.read_text() + "expect: {quantized_params_pct: '>= 99'}\n")
    assert run_cli(*command).code == 1
    assert not (box.root / "cache").exists()
    assert not box.out.exists()


def test_without_room_the_weights_are_streamed(
    box: Box, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room for the model, and for the output, but not for both. The bytes are the same."""
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: disk(10**6, 0, 15_000))
        done = run_cli("quantize", box.recipe, "--model", "org/name", "--out", box.out)
    assert done.code == 0, done.err
    assert (
        "streaming org/name: its weights take 7.3 kB next to 12.8 kB of other files, 15.0 kB are free "
        "in the Hub's cache"
    ) in done.err.splitlines()
    assert not (box.root / "cache").exists()
    fetched = box.root / "fetched"
    assert run_cli("quantize", box.recipe, "--model", "org/name", "--out", fetched).code == 0
    assert snapshot(box.out) == snapshot(fetched)


def test_an_interrupted_run_that_streamed_goes_on_streaming(
    box: Box, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though there is room by then: the journal knows the files by their hashes."""
    command = ["quantize", box.recipe, "--model", "org/name", "--out", box.out, *SHARDED]

    def stop(event: quantcli.Event) -> None:
        if event.kind == "file":
            raise KeyboardInterrupt

    options = {"model": "org/name", "out": box.out, "set": {"max_shard": "2KB"}}
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: disk(10**6, 0, 15_000))
        with pytest.raises(KeyboardInterrupt):
            quantcli.quantize(box.recipe, on_progress=stop, **options)
    again = run_cli(*command, "--json")
    assert "streaming org/name, as the interrupted run did" in again.err
    assert again.json["shards_reused"] > 0
    assert not (box.root / "cache").exists()
    assert run_cli(*command[:5], box.root / "whole", *SHARDED).code == 0
    assert snapshot(box.out) == snapshot(box.root / "whole")
