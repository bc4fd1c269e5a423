"""`quantcli bom`: a valid document that says what a checkpoint was made of, and the same each time."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import quantcli
from quantcli.checkpoint.files import CARD, MANIFEST, RECIPE_FILE
from quantcli.checkpoint.manifest import encode_manifest
from tests.e2e.conftest import Box, make_box, run_cli

CARD_TEXT = "---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n# A model\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Box:
    """A conversion of a model with a card, under a name on the Hub."""
    box = make_box(tmp_path_factory.mktemp("bom"))
    (box.model / CARD).write_text(CARD_TEXT)
    assert box.run().code == 0
    return box


@pytest.fixture
def out(made: Box, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.out, tmp_path / "out"))


def sealed(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and seal it again."""
    table = json.loads((out / MANIFEST).read_bytes())
    change(table)
    (out / MANIFEST).write_bytes(encode_manifest(table))


def with_card(out: Path, front: str) -> None:
    """Give a checkpoint another card."""
    content = f"---\n{front}---\n".encode()
    (out / CARD).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sealed(out, lambda table: table["files"].update({CARD: entry}))


def document(out: Path) -> dict[str, Any]:
    """The document, which the schema of the reference library holds for."""
    result = run_cli("bom", out)
    assert result.code == 0, result.err
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(result.out) is None
    return json.loads(result.out)


def test_it_names_what_the_checkpoint_was_made_of(made):
    bom = document(made.out)
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert model["modelCard"]["modelParameters"] == {
        "task": "text-generation",
        "architectureFamily": "llama",
        "modelArchitecture": "LlamaForCausalLM",
    }
    tools = bom["metadata"]["tools"]["components"]
    assert tools == [{"type": "application", "name": "quantcli", "version": quantcli.__version__}]
    manifest = json.loads((made.out / MANIFEST).read_bytes())
    (base,) = model["pedigree"]["ancestors"]
    assert base["licenses"] == model["licenses"]
    facts = {entry["name"]: entry["value"] for entry in base["properties"]}
    assert facts["quantcli:fingerprint"] == manifest["source"]["fingerprint"]
    (recipe,) = bom["components"]
    content = recipe["data"][0]["contents"]["attachment"]["content"]
    assert content.encode() == (made.out / RECIPE_FILE).read_bytes()
    own = {entry["name"]: entry["value"] for entry in model["properties"]}
    assert own["quantcli:target"] == "ascend"


def test_it_has_the_hash_of_every_file(made):
    files = document(made.out)["metadata"]["component"]["components"]
    listed = {file["name"]: {h["alg"]: h["content"] for h in file["hashes"]} for file in files}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made.out.iterdir()}
    assert {name: hashes["SHA-256"] for name, hashes in listed.items()} == found


def test_the_same_checkpoint_gives_the_same_document(made, out, tmp_path):
    printed = run_cli("bom", made.out).out
    assert run_cli("bom", out).out == printed
    file = tmp_path / "bom.json"
    assert run_cli("bom", out, "--out", file).out == ""
    assert file.read_text() == printed
    assert run_cli("bom", out, "--json").json["bom"] == json.loads(printed)
    assert quantcli.bom(out).text == printed
    assert (
        quantcli.bom(f"{out}/../{out.name}/.").text == printed
    )  # the folder's name, however it is given
    sealed(out, lambda table: table.update(plan="another"))
    assert document(out)["serialNumber"] != json.loads(printed)["serialNumber"]


def test_the_base_model_is_that_of_the_manifest_or_the_card(out):
    with_card(out, "base_model: acme/llama\nbase_model_relation: quantized\n")
    (base,) = document(out)["metadata"]["component"]["pedigree"]["ancestors"]
    assert (base["name"], base["purl"]) == ("acme/llama", "pkg:huggingface/acme/llama")
    sealed(out, lambda table: table["source"].update(id="acme/other@v1/rc"))
    (base,) = document(out)["metadata"]["component"]["pedigree"]["ancestors"]
    assert (base["name"], base["version"]) == ("acme/other", "v1/rc")
    assert base["purl"] == "pkg:huggingface/acme/other@v1%2Frc"


LICENSES = {
    "license: mit\n": [{"license": {"id": "MIT"}}],
    "license: llama3\n": [{"license": {"name": "llama3"}}],
    "license: other\nlicense_name: ours\nlicense_link: https://a.example/l\n": [
        {"license": {"name": "ours", "url": "https://a.example/l"}}
    ],
    "license: other\nlicense_name: ours\nlicense_link: 'https://a b'\n": [
        {"license": {"name": "ours"}}
    ],
    "tags: [x]\n": None,
}


@pytest.mark.parametrize("front", LICENSES)
def test_the_licence_is_that_of_the_card(out, front):
    with_card(out, front)
    assert document(out)["metadata"]["component"].get("licenses") == LICENSES[front]
    assert ("names no licence" in run_cli("bom", out).err) == (LICENSES[front] is None)


def test_it_names_the_text_of_the_calibration(out):
    sha256 = hashlib.sha256(b"text").hexdigest()
    text = {"text": {"name": "a.txt", "sha256": sha256}, "statistics": "5" * 64}
    sealed(out, lambda table: table.update(calibration=text))
    bom = document(out)
    (data,) = [part for part in bom["components"] if part["bom-ref"] == "calibration-text"]
    assert (data["name"], data["hashes"]) == ("a.txt", [{"alg": "SHA-256", "content": sha256}])
    assert "calibration-text" in bom["dependencies"][0]["dependsOn"]


def test_without_hashes_it_says_so(out):
    sealed(out, lambda t: t.update(files={n: {"bytes": e["bytes"]} for n, e in t["files"].items()}))
    files = document(out)["metadata"]["component"]["components"]
    assert [file["name"] for file in files if "hashes" in file] == [MANIFEST]
    assert "written with --no-checksum" in run_cli("bom", out).err


REFUSED: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no manifest": (lambda out: (out / MANIFEST).unlink(), 2, "what it was made of is not known"),
    "a file is missing": (lambda out: (out / "tokenizer.json").unlink(), 1, "`tokenizer.json` is not"),
    "a file has grown": (lambda out: (out / CARD).write_text("x"), 1, "`README.md` is not there as"),
    "target is a list": (lambda out: sealed(out, lambda t: t.update(target=[])), 2, "should be text"),
    "no tool": (lambda out: sealed(out, lambda t: t.pop("tool")), 2, "`tool` is missing"),
    "source is a number": (lambda out: sealed(out, lambda t: t.update(source=1)), 2, "an object"),
    "fingerprint is a list": (lambda out: sealed(out, lambda t: t["source"].update(fingerprint=[])), 2,
                              "should be text"),
    "a hash is none": (lambda out: sealed(out, lambda t: t["files"][CARD].update(sha256="x")), 2,
                       "64 hexadecimal digits"),
    "text of a calibration is a list": (lambda out: sealed(out, lambda t: t.update(calibration=[])), 2,
                                        "should be an object"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused(out, why):
    change, code, words = REFUSED[why]
    change(out)
    result = run_cli("bom", out)
    assert (result.code, result.out) == (code, "")
    assert words in result.err


def test_it_is_not_written_into_the_checkpoint(out):
    result = run_cli("bom", out, "--out", out / "bom.json")
    assert result.code == 2
    assert "would become part of the checkpoint" in result.err


def test_without_the_package_the_message_says_what_to_install(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyclonedx", None)
    monkeypatch.setitem(sys.modules, "cyclonedx.spdx", None)
    result = run_cli("bom", out)
    assert result.code == 3
    assert "pip install 'quantcli[sbom]" in result.err
