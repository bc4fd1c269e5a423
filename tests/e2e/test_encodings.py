"""Text as editors on Windows save it: with a byte order mark, in UTF-16, with other ends of lines."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from tests.builders import INDEX
from tests.e2e.calibrating import RECIPE as CALIBRATED
from tests.e2e.calibrating import Models, make_bench
from tests.e2e.conftest import RECIPE, Box, llama, run_cli, snapshot

MARK = codecs.BOM_UTF8


def mark(file: Path) -> None:
    file.write_bytes(MARK + file.read_bytes())


def converted(box: Box, out: str) -> dict[str, str]:
    """The files of a conversion and their hashes, without the manifest, which tells of the source."""
    done = run_cli(*box.args()[:-1], box.root / out)
    assert done.code == 0, done.err
    files = snapshot(box.root / out)
    del files["quantcli_manifest.json"]
    return files


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: MARK + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.replace("\n", "\r\n").encode("utf-16-be"),
    ],
    ids=["utf-8 with a mark", "ends of lines", "utf-16", "utf-16, the other order"],
)
def test_recipes_in_other_encodings_convert_the_same(box: Box, encode) -> None:
    expected = converted(box, "expected")
    box.recipe.write_bytes(encode(RECIPE + "# Schlüssel: 重み\n"))
    assert converted(box, "out") == expected


def test_a_recipe_in_broken_utf16(box: Box) -> None:
    box.recipe.write_bytes(RECIPE.encode("utf-16") + b"\n")
    refused = run_cli(*box.args())
    assert refused.code == 2
    assert refused.err.startswith(f"error: the recipe is not UTF-16 (byte {2 + 2 * len(RECIPE)})\n")


def test_marked_files_of_a_model_are_read(box: Box) -> None:
    (box.model / "generation_config.json").write_text('{\n  "temperature": 0.5\n}\n')
    index = {"weight_map": dict.fromkeys(llama(), "model.safetensors")}
    (box.model / INDEX).write_text(json.dumps(index, indent=2))
    expected = converted(box, "expected")
    for name in ("config.json", INDEX, "generation_config.json"):
        mark(box.model / name)
    got = converted(box, "out")
    assert got.keys() == expected.keys()
    # copied as it is; what we write has no mark, and the card names the source by its fingerprint
    assert (box.root / "out/generation_config.json").read_bytes()[:3] == MARK
    differ = [name for name in got if got[name] != expected[name]]
    assert differ == ["README.md", "generation_config.json"]
    note = "`generation_config.json` begins with a byte order mark, at which engines stop"
    assert run_cli("inspect", box.model, "--json").json["notes"] == [note]
    assert f"note         {note}" in run_cli(*box.args("--plan", "--force")).out
    verified = run_cli("verify", box.root / "out", "--full", "--against", box.model)
    assert verified.code == 0, verified.out


def test_a_marked_config_calibrates(tmp_path: Path) -> None:
    """Transformers would stop at the mark."""
    bench = make_bench(tmp_path, Models(tmp_path / "models")("llama"), CALIBRATED)
    assert bench.run().code == 0
    mark(bench.own_model() / "config.json")
    marked = bench.at("marked")
    done = marked.run()
    assert done.code == 0, done.err
    weights = "model-00001-of-00001.safetensors"
    assert (marked.out / weights).read_bytes() == (bench.out / weights).read_bytes()


def test_a_marked_config_in_another_encoding_is_refused(box: Box) -> None:
    text = (box.model / "config.json").read_text()
    (box.model / "config.json").write_bytes(text.encode("utf-16"))
    refused = run_cli(*box.args())
    assert refused.err.startswith(f"error: not UTF-8 (byte 0)\n  --> {box.model}/config.json\n")
