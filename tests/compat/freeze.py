"""What one version of quantcli writes, frozen for the tests of later ones.

    python -m tests.compat.freeze

writes tests/compat/VERSION: a model of a few kB, a text, a recipe, a release file, a calibration, the
checkpoint, its two parts, an interrupted run, and the keys of the documents of all commands.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import quantcli
from quantcli.checkpoint.files import JOURNAL
from tests.e2e.calibrating import TEXT, write_tokenizer
from tests.e2e.conftest import run_cli
from tests.signing import write_key
from tests.tiny_models import make_tiny

HERE = Path(__file__).parent
STAMP = 1_700_000_000  # seconds: the time of the model's files, which a journal holds
SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
RECIPE = """\
version: 1
target: ascend
max_shard: 20KB
calibration: {data: text.txt, samples: 2, length: 16}
rules:
  - match: "*.mlp.*_proj"
    scheme: w8a8_dynamic
  - match: "*_proj"
    scheme: {name: w8a8_static, observer: minmax}
"""
RELEASE = """\
version: 1
model: model
output: release
checkpoints:
  - {recipe: recipe.yaml, name: static}
  - {recipe: w8a16, set: {expect: {}}}
"""


def shape_of(value: Any) -> Any:
    """The keys of a document with the types of their values; of a list, those of all its items.

    A value of any type may also be null.
    """
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape for shape in [_joined(map(shape_of, value))] if shape is not None]
    return None if value is None else _NAMES[type(value)]


_NAMES = {str: "text", bool: "true or false", int: "number", float: "number"}


def _joined(shapes: Iterable[Any]) -> Any:
    """One shape for all items of a list: keys that some of them lack are left out."""
    found: Any = None
    for shape in shapes:
        if isinstance(found, dict) and isinstance(shape, dict):
            found = {key: _joined([found[key], shape[key]]) for key in found if key in shape}
        elif isinstance(found, list) and isinstance(shape, list):
            inner = _joined([*found, *shape])
            found = [] if inner is None else [inner]
        elif found is None:
            found = shape
        elif shape is not None and shape != found:
            return "anything"
    return found


def documents(place: Path) -> dict[str, Any]:
    """The document of each command by its name in docs/cli.md.

    place: a copy of a frozen folder, in which commands write.
    """
    model, out, recipe = place / "model", place / "out", place / "recipe.yaml"
    given = ["--model", model]
    write_key(place / "key.pem")
    converted = ["quantize", recipe, *given, "--out", place / "again", "--data", place / "text.txt"]
    packed = ["pack", out, "--target", "compressed-tensors", "--out", place / "packed"]
    released = ["release", place / "release.yaml", *given, "--out", place / "release"]
    measured = ["--calibration", place / "calibration"]
    commands: dict[str, list[object]] = {
        "recommend MODEL": ["recommend", model, "--for", "910B"],
        "recommend --devices": ["recommend", "--devices"],
        "inspect MODEL": ["inspect", out],
        "inspect --outliers": ["inspect", model, "--outliers"],
        "inspect --support": ["inspect", "--support", "--for", "cpu"],
        "calibrate": ["calibrate", recipe, *given, "--out", place / "calibration"],
        "quantize --plan": [*converted, *measured, "--plan"],
        "quantize": [*converted, *measured],
        "release --plan": [*released, *measured, "--plan"],
        "release": [*released, *measured],
        "pack --plan": [*packed, "--plan"],
        "pack": packed,
        "verify": ["verify", out, "--full", "--against", model, *measured],
        "verify of several": ["verify", out, place / "packed"],
        "reproduce": ["reproduce", out, *given, *measured],
        "sign": ["sign", place / "again", "--key", place / "key.pem"],
        "recipes": ["recipes"],
        "recipes show": ["recipes", "show", "w8a16"],
        "--version": ["--version"],
    }
    found = {}
    for name, words in commands.items():
        result = run_cli(*words, "--json")
        assert result.code == 0, f"{name}: {result.err}"
        found[name] = result.json
    return found


def stamp(model: Path) -> None:
    """Give the files of the model the time that the journal of the interrupted run has."""
    for path in model.iterdir():
        os.utime(path, (STAMP, STAMP))


def interrupt(place: Path) -> None:
    """A run that ended after its first weight file: place/stopped, which would be OUT.partial."""
    words = {"model": place / "model", "calibration": place / "calibration", "workers": 1}
    stop = patch("quantcli.convert.execute._finish", side_effect=KeyboardInterrupt)
    with suppress(KeyboardInterrupt), stop:
        quantcli.quantize(place / "recipe.yaml", out=place / "stopped", **words)
    partial = place / "stopped.partial"
    head, first, *others = (partial / JOURNAL).read_text().splitlines(keepends=True)
    (partial / JOURNAL).write_text(head + first)
    assert others
    for line in others:
        (partial / json.loads(line)["shard"]).unlink()
    partial.rename(place / "stopped")


def freeze(folder: Path) -> None:
    """Write all of it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_tiny(place / "model", "llama", **SIZES)
        write_tokenizer(place / "model")
        stamp(place / "model")
        for file, text in {"text.txt": TEXT, "recipe.yaml": RECIPE, "release.yaml": RELEASE}.items():
            (place / file).write_text(text)
        recipe, model, kept = place / "recipe.yaml", place / "model", place / "calibration"
        quantcli.calibrate(recipe, model=model, out=kept)
        quantcli.quantize(recipe, model=model, out=place / "out", calibration=kept)
        for part in ("1/2", "2/2"):
            quantcli.quantize(recipe, model=model, out=place / "out", calibration=kept, part=part)
        interrupt(place)
        shutil.copytree(place, folder, ignore=shutil.ignore_patterns(".lock"))
        shapes = {name: shape_of(each) for name, each in documents(place).items()}
    text = json.dumps(shapes, indent=1, sort_keys=True)
    (folder / "documents.json").write_text(text + "\n")


if __name__ == "__main__":
    freeze(HERE / f"v{quantcli.__version__}")
