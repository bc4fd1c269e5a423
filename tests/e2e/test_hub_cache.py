"""Every command reads what the Hub's client has fetched, however it has linked it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import RECIPE, Box, make_llama, run_cli, snapshot
from tests.hub_cache import cache_model, link_files
from tests.hub_server import Fault, used


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
        hub.faults = [Fault("model.safetensors", cut=5000)]
        command = ["quantize", box.recipe, "--model", "org/name", "--out"]
        done = run_cli(*command, box.root / "fetched")
        assert done.code == 0, done.err
        lines = done.err.splitlines()
        assert lines[:2] == [
            "looking for org/name on the Hub, or in its cache",
            "fetching 2 files of org/name, 7.2 kB",
        ]
        assert any("Error while downloading from a file" in line for line in lines)
        assert [asked.status for asked in hub.fetched("model.safetensors")] == [200, 200]
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
