"""Models that are elsewhere: the same bytes as from a copy here, whatever servers do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quantcli.checkpoint.remote import objects as remote_objects
from tests.builders import make_model
from tests.e2e.conftest import CONFIG, RECIPE, llama, run_cli, snapshot
from tests.hub_server import Fault, Hub, used
from tests.object_server import KEYS, Objects
from tests.web_server import served

CARD = "---\nlicense: mit\n---\n# The source\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with org/name: a model in two shards with an index, and what is next to one."""
    tensors = llama(layers=3, side=64)
    names = sorted(tensors)
    halves = names[::2], names[1::2]
    root = tmp_path_factory.mktemp("served")
    make_model(
        root / "org" / "name",
        {SHARDS[i]: {name: tensors[name] for name in half} for i, half in enumerate(halves)},
        config=CONFIG,
        index=True,
        files={
            "README.md": CARD, "tokenizer.json": '{"version": "1.0"}' + " " * 1_100_000,
            "assets/a picture.png": b"png", "pytorch_model.bin": b"pickle",
        },
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def expected(models: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a conversion of the folder gives."""
    return convert(models / "org" / "name", recipe, tmp_path_factory.mktemp("local") / "out")


def convert(model: object, recipe: Path, out: Path, *more: object) -> dict[str, str]:
    done = run_cli("quantize", recipe, "--model", model, "--out", out, *more)
    assert done.code == 0, done.err
    return snapshot(out)


@pytest.fixture
def web(models: Path) -> Iterator[Hub]:
    with served(models) as web:
        yield web


@pytest.fixture
def hub(models: Path, tmp_path: Path) -> Iterator[Hub]:
    with used(models, tmp_path / "cache") as hub:
        yield hub


def test_from_a_web_server(web: Hub, recipe: Path, expected: dict[str, str], tmp_path: Path) -> None:
    assert convert(f"{web.address}/org/name/", recipe, tmp_path / "out") == expected
    assert not web.fetched("pytorch_model.bin")


def test_from_a_web_server_without_pages(
    models: Path, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    with served(models, listed=False, tagged=False) as web:
        found = convert(f"{web.address}/org/name", recipe, tmp_path / "out")
    assert found == {name: digest for name, digest in expected.items() if "assets" not in name} | {
        name: found[name] for name in ("README.md", "quantcli_manifest.json")
    }


def test_from_object_storage(
    objects: Objects, models: Path, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    objects.bucket("remote")
    address = objects.upload(models / "org" / "name", "remote", "team/name")
    assert convert(address, recipe, tmp_path / "out") == expected


def test_from_the_hub(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    downloaded = convert("org/name", recipe, tmp_path / "downloaded")
    shutil.rmtree(tmp_path / "cache")
    assert convert("hf://org/name", recipe, tmp_path / "streamed") == downloaded
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def cuts(number: int) -> list[Fault]:
    """Connections that end after 1 to 3,000 bytes of weights."""
    random = np.random.default_rng(0)
    return [Fault(SHARDS[n % 2], cut=int(random.integers(1, 3000))) for n in range(number)]


def test_a_hundred_cut_connections(
    web: Hub, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    web.faults = cuts(100)
    assert convert(f"{web.address}/org/name", recipe, tmp_path / "out") == expected
    assert not any(fault.times for fault in web.faults)


def test_cut_connections_to_object_storage(
    web: Hub, recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {**KEYS, "AWS_ENDPOINT_URL": web.address}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(remote_objects, "_CHUNK", 1)  # a cut costs no more than that
    web.faults = cuts(30)
    assert convert("s3://org/name", recipe, tmp_path / "out") == expected
    assert not any(fault.times for fault in web.faults)
    web.faults = [Fault("config.json", status=403)]
    done = run_cli("quantize", recipe, "--model", "s3://org/name", "--out", tmp_path / "no")
    assert done.code == 2
    assert "error: object storage refuses access (the server answers 403)\n" in done.err
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in done.err


def test_other_commands_take_addresses(
    web: Hub, models: Path, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    address, folder = f"{web.address}/org/name", models / "org" / "name"
    local, remote = (run_cli("inspect", model, "--json").json for model in (folder, address))
    assert remote == local | {"path": address}
    local, remote = (
        run_cli("inspect", "--outliers", model, "--json").json for model in (folder, address)
    )
    assert remote == local | {"path": address}
    convert(folder, recipe, models / "org" / "quantized")
    quantized = f"{web.address}/org/quantized"
    done = run_cli("verify", quantized, "--full", "--against", address, "--json")
    assert done.code == 0, done.err
    assert (done.json["checkpoint"], done.json["against"]) == (quantized, address)
    checked = {check["name"]: check["checked"] for check in done.json["checks"]}
    assert (checked["hashes"], checked["sqnr"]) == (8, 21)
    (models / "org" / "quantized" / "README.md").write_text("other")
    done = run_cli("verify", quantized, "--full")
    assert done.code == 1
    assert "/tmp" not in done.out + done.err


def test_an_unfinished_conversion_goes_on_with_the_same_content_alone(
    web: Hub, models: Path, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    model = shutil.copytree(models / "org" / "name", models / "again" / "name")
    arguments = ("quantize", recipe, "--model", f"{web.address}/again/name", "--out", tmp_path / "out")
    web.faults = [Fault(SHARDS[1]), Fault(SHARDS[1], times=99, status=404)]  # after its header
    assert run_cli(*arguments).code == 2
    assert (tmp_path / "out.partial").is_dir()
    web.faults.clear()
    with (model / SHARDS[1]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(b"\x00" if last != b"\x00" else b"\x01")
    done = run_cli(*arguments)
    assert done.code == 2
    assert "the model has changed since" in done.err
    shutil.copy2(models / "org" / "name" / SHARDS[1], model)
    assert convert(f"{web.address}/again/name", recipe, tmp_path / "out") == expected
