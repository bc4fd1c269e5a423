"""`--hash-model`: the manifest knows the weights that were converted, not only their headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blake3 import blake3

import quantcli
from quantcli.checkpoint.files import MANIFEST
from quantcli.core.errors import InputError
from tests.e2e.conftest import Box, make_box, make_llama, run_cli, snapshot

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Box:
    box = make_box(tmp_path_factory.mktemp("hashed"))
    assert box.run("--hash-model").code == 0
    return box


@pytest.fixture(scope="module")
def other(made: Box) -> Path:
    """A model with the same headers, and other weights."""
    return make_llama(made.root / "other", seed=1)


def source(out: Path) -> dict:
    return json.loads((out / MANIFEST).read_bytes())["source"]


def test_the_manifest_has_the_hashes_of_the_weight_files(made, tmp_path):
    content = (made.model / WEIGHTS).read_bytes()
    entry = {"bytes": len(content), "blake3": blake3(content).hexdigest()}
    assert source(made.out)["files"] == {WEIGHTS: entry}
    plain = tmp_path / "plain"
    quantize = ["quantize", made.recipe, "--model", made.model]
    assert run_cli(*quantize, "--out", plain).code == 0
    assert "files" not in source(plain)
    assert source(plain)["fingerprint"] == source(made.out)["fingerprint"]
    hashed, usual = snapshot(made.out), snapshot(plain)
    assert {name for name in hashed if hashed[name] != usual[name]} == {MANIFEST}


def test_verify_tells_the_model_from_another_with_its_headers(made, other):
    verify = ["verify", made.out, "--json", "--against"]
    assert run_cli(*verify, made.model).code == 0
    result = run_cli(*verify, other)
    assert result.code == 1
    errors = [finding for finding in result.json["findings"] if finding["check"] == "source"]
    assert [(each["where"], each["severity"]) for each in errors] == [(WEIGHTS, "error")]
    assert "is not the one that was converted" in errors[0]["what"]


def test_reproduce_refuses_another_model_with_the_same_headers(made, other):
    assert run_cli("reproduce", made.out, "--model", made.model).code == 0
    result = run_cli("reproduce", made.out, "--model", other)
    assert result.code == 2
    assert f"its file `{WEIGHTS}` is not what was converted" in result.err


def test_pack_records_what_it_packed(made, tmp_path):
    packed = tmp_path / "packed"
    pack = ["pack", made.out, "--target", "compressed-tensors", "--out", packed, "--hash-model"]
    assert run_cli(*pack).code == 0
    (entry,) = source(packed)["files"].values()
    content = next(made.out.glob("*.safetensors")).read_bytes()
    assert entry["blake3"] == blake3(content).hexdigest()


def test_options_that_exclude_it(made):
    refused = made.run("--force", "--hash-model", "--no-checksum")
    assert (refused.code, "--hash-model needs the hashes" in refused.err) == (2, True)
    refused = made.run("--hash-model", "--part", "1/2")
    assert (refused.code, "a part only its share" in refused.err) == (2, True)
    refused = run_cli("pack", "--merge", made.out, "--out", made.out, "--hash-model")
    assert (refused.code, "--merge does not take --hash-model" in refused.err) == (2, True)


def test_python_takes_it_too(made):
    with pytest.raises(InputError, match="--hash-model needs the hashes"):
        quantcli.plan(made.recipe, model=made.model, hash_model=True, checksum=False)
