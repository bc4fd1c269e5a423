"""Names that could command a terminal, at every command: in paths, headers and config.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcli.cli.app import app
from quantcli.core.untrusted.names import visible_json
from tests.builders import make_model
from tests.e2e.conftest import CONFIG, RECIPE, llama, make_llama, run_cli

TEXT = "\x9b31m\u202e\x1b[2J\r\n\u2028\U000e0041\u200b"
NAME = os.fsdecode(b"n\xff\xc2\x9b\xe2\x80\xae\x1b[2J\r\nx")  # as on a disk: not UTF-8, and worse
COMMANDS = {command.callback.__name__ for command in app.registered_commands}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under a bad path: a good model with odd files, one that is bad within, and a conversion."""
    root = tmp_path_factory.mktemp("hostile") / NAME
    model = make_llama(root / "model")
    for name in (NAME, f"{TEXT}.json"):
        (model / name).write_text("x")
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    config |= {"_name_or_path": TEXT, "architectures": [TEXT], TEXT: TEXT}
    (model / "config.json").write_text(json.dumps(config))
    tensors = {f"{name}{TEXT}": tensor for name, tensor in llama().items()}
    quantization = {"quant_method": TEXT, "format": TEXT, "ignore": [TEXT]}
    within = {**CONFIG, "model_type": TEXT, "dtype": TEXT, "quantization_config": quantization}
    make_model(root / "within", {f"{TEXT}.safetensors": tensors}, config=within)
    shutil.copytree(model, root / "kind")
    kind = {**config, "model_type": TEXT, "quantization_config": quantization}
    (root / "kind" / "config.json").write_text(json.dumps(kind))
    (root / "recipe.yaml").write_text(RECIPE)
    (root / f"{NAME}.txt").write_text("text " * 400)
    result = run_cli(*quantize(root, "model", "out"))
    assert result.code == 0, result
    assert f"f{NAME}" not in (root / "out" / "quantcli_manifest.json").read_text()
    (root / "out" / f"{NAME}.safetensors").write_bytes(b"x")
    (root / "out" / TEXT).write_bytes(b"x")
    return root


def quantize(place: Path, model: str, out: str) -> list[object]:
    return ["quantize", place / "recipe.yaml", "--model", place / model, "--out", place / out]


RUNS: dict[str, Callable[[Path], list[object]]] = {
    "inspect": lambda p: ["inspect", p / "model", "--tensors", "*"],
    "inspect within": lambda p: ["inspect", p / "within"],
    "inspect kind": lambda p: ["inspect", p / "kind"],
    "inspect nothing": lambda p: ["inspect", p / NAME],
    "inspect id": lambda p: ["inspect", f"org/{NAME}"],
    "inspect address": lambda p: ["inspect", f"https://example.com/{NAME}"],
    "inspect store": lambda p: ["inspect", f"s3://bucket/{NAME}"],
    "option": lambda p: ["inspect", p / "model", f"--{NAME}"],
    "plan": lambda p: [*quantize(p, "model", NAME), "--plan"],
    "plan within": lambda p: [*quantize(p, "within", NAME), "--plan"],
    "plan kind": lambda p: [*quantize(p, "kind", NAME), "--plan"],
    "quantize": lambda p: [*quantize(p, "model", "out"), "--force", "--log-file", p / f"log{NAME}"],
    "quantize set": lambda p: [*quantize(p, "model", NAME), "--set", f"{TEXT}{NAME}=1"],
    "quantize data": lambda p: [*quantize(p, "model", NAME), "--data", p / f"{NAME}.txt"],
    "no recipe": lambda p: ["quantize", p / NAME, "--model", p / "model", "--out", p / "o"],
    "calibrate": lambda p: ["calibrate", p / "recipe.yaml", "--model", p / "model", "--out", p / NAME],
    "release": lambda p: ["release", p / "recipe.yaml", "--model", p / "model", "--out", p / NAME],
    "pack": lambda p: ["pack", p / "out", "--target", "compressed-tensors", "--out", p / NAME],
    "merge": lambda p: ["pack", "--merge", p / "out", p / NAME, "--out", p / "merged"],
    "verify": lambda p: ["verify", p / "out"],
    "verify within": lambda p: ["verify", p / "within"],
    "verify kind": lambda p: ["verify", p / "kind"],
    "verify against": lambda p: [
        "verify", p / "out", "--full", "--against", p / "model", "--report", p / f"{NAME}.html",
        "--junit", p / f"{NAME}.xml",
    ],
    "reproduce": lambda p: ["reproduce", p / "out", "--model", p / "kind"],
    "sign": lambda p: ["sign", p / "out", "--key", p / NAME],
    "bom": lambda p: ["bom", p / "within"],
    "recipes": lambda p: ["recipes", "show", NAME],
    "recommend": lambda p: ["recommend", p / "within", "--devices", TEXT],
}  # fmt: skip


def invisible(text: str) -> set[str]:
    return {character for character in text if not character.isprintable()} - {"\n"}


@pytest.mark.parametrize("name", RUNS)
def test_no_name_reaches_the_terminal(place: Path, name: str) -> None:
    for options in ([], ["--json"]):
        result = run_cli(*RUNS[name](place), *options)
        assert result.code in {0, 1, 2, 3}, result
        assert not invisible(result.out + result.err)
        if options:
            assert result.json["exit_code"] == result.code
            result.out.encode()  # UTF-8, whatever the path
    for file in place.iterdir():  # reports, and the log
        if file.suffix in {".html", ".xml"} or file.name.startswith("log"):
            assert not invisible(file.read_text(encoding="utf-8")) - {"\t"}


def test_every_command_is_there(place: Path) -> None:
    assert {RUNS[name](place)[0] for name in RUNS} == COMMANDS


def test_the_path_is_in_the_document(place: Path) -> None:
    document = run_cli("inspect", place / "model", "--json").json
    assert document["path"] == str(place / "model")
    err = run_cli("inspect", place / NAME).err
    assert r"n\xff\x9b\u202e\x1b[2J\r\nx" in err


def test_invisible_characters_of_json_are_escapes() -> None:
    value = {TEXT: [NAME, "ä漢", "\U0001f600"]}
    text = visible_json(json.dumps(value, indent=1, ensure_ascii=False))
    assert json.loads(text) == value
    assert not invisible(text)
    assert "ä漢" in text
    assert r"\udb40\udc41" in text
