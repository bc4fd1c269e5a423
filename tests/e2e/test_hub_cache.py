"""Every command reads what the Hub's client has fetched, however it has linked it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import RECIPE, make_llama, run_cli, snapshot
from tests.hub_cache import cache_model, link_files


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
