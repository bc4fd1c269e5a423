"""`reproduce`: the same bytes again by the recipe in a checkpoint, or the first difference by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import quantcli
from quantcli.checkpoint.manifest import encode_manifest
from quantcli.core.disk import sha256_of
from quantcli.recipe.shipped import is_sample_text
from quantcli.verification.again.whole import Whole
from tests.e2e.calibrating import TEXT, write_tokenizer
from tests.e2e.conftest import run_cli, snapshot
from tests.tiny_models import make_tiny

MANIFEST, RECIPE = "quantcli_manifest.json", "quantcli_recipe.yaml"
SAMPLE = Path(__file__).parents[2] / "examples" / "calibration.txt"
CALIBRATION = {"data": "text.txt", "samples": 4, "length": 16}
GPTQ = {"name": "w4a16", "weight_rounding": "gptq", "group_size": 32}
SCHEMES: dict[str, dict[str, Any]] = {
    "dynamic": {"rules": [{"match": "*_proj", "scheme": "w8a8_dynamic"}], "max_shard": "25KB"},
    "static": {
        "rules": [{"match": "*_proj", "scheme": {"name": "w8a8_static", "observer": "minmax"}}],
        "smooth": {"alpha": 0.5},
        "calibration": CALIBRATION,
    },
    "gptq": {
        "target": "compressed-tensors",
        "rules": [{"match": "*_proj", "scheme": GPTQ}],
        "calibration": CALIBRATION,
    },
}


@dataclass
class Released:
    """A model, its text and checkpoints of it. Tests must not change them: see `copy`."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    def out(self, name: str) -> Path:
        """The checkpoint of a recipe, made once; what was measured is deleted."""
        folder = self.root / name
        if not folder.exists():
            recipe = self.root / f"{name}.yaml"
            recipe.write_text(yaml.safe_dump({"target": "ascend", **SCHEMES[name]}))
            quantcli.quantize(recipe, model=self.model, out=folder)
            shutil.rmtree(f"{folder}.calibration", ignore_errors=True)
        return folder

    def copy(self, name: str, place: Path) -> Path:
        return Path(shutil.copytree(self.out(name), place / "copy"))

    def reproduce(self, out: Path, *more: object) -> Any:
        return run_cli("reproduce", out, "--model", self.model, "--json", *more)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    root = tmp_path_factory.mktemp("released")
    make_tiny(root / "model", "llama", num_hidden_layers=2)
    write_tokenizer(root / "model")
    (root / "text.txt").write_text(TEXT)
    return Released(root)


@contextmanager
def resealed(out: Path) -> Iterator[dict[str, Any]]:
    """The manifest, to be changed and sealed again."""
    table = json.loads((out / MANIFEST).read_text())
    yield table
    (out / MANIFEST).write_bytes(encode_manifest(table))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_same_bytes_again(released: Released, name: str) -> None:
    out = released.out(name)
    before = snapshot(out)
    given = [] if name == "dynamic" else ["--data", released.text]
    result = released.reproduce(out, *given)
    assert (result.code, result.json["difference"], result.json["notes"]) == (0, None, [])
    assert result.json["files"] == len(before)
    statistics = result.json["statistics"]
    assert (statistics is None) == (name == "dynamic")
    if statistics is not None:
        assert statistics["now"] == statistics["recorded"]
        assert f"torch {torch.__version__}" in result.json["here"]
    assert snapshot(out) == before
    assert not out.with_name(f"{name}.reproduction").exists()


def test_a_manifest_says_what_a_calibration_was_made_of(released: Released) -> None:
    block = json.loads((released.out("static") / MANIFEST).read_text())["calibration"]
    digest = sha256_of(released.text)
    assert block["text"] == {"name": "text.txt", "sha256": digest}
    names = ("tokenizer.json", "tokenizer_config.json")
    assert block["tokenizer"] == {name: sha256_of(released.model / name) for name in names}
    recipe = yaml.safe_load((released.out("static") / RECIPE).read_text())
    assert recipe["calibration"] | {"sha256": digest, "data": "text.txt"} == recipe["calibration"]
    assert digest in (released.out("static") / "README.md").read_text()
    assert "calibration" not in json.loads((released.out("dynamic") / MANIFEST).read_text())


def test_statistics_do_not_depend_on_what_else_was_measured(released: Released, tmp_path: Path) -> None:
    """A calibration that has more serves a smaller recipe with the same bytes."""
    recipes = []
    for number, match in enumerate(("*_proj", "*.mlp.*_proj")):
        rule = {"match": match, "scheme": {"name": "w8a8_static", "observer": "minmax"}}
        rest = {"match": "*", "scheme": "keep", "optional": True}
        table = {"target": "ascend", "rules": [rule, rest], "calibration": CALIBRATION}
        recipes.append(released.root / f"part-{number}.yaml")
        recipes[-1].write_text(yaml.safe_dump(table))
    alone = quantcli.quantize(recipes[1], model=released.model, out=tmp_path / "alone")
    shared = tmp_path / "shared"
    quantcli.calibrate(recipes[0], model=released.model, out=shared)
    other = quantcli.quantize(recipes[1], model=released.model, out=tmp_path / "b", calibration=shared)
    assert snapshot(other.out) == snapshot(alone.out)


def test_the_first_difference_is_named(released: Released, tmp_path: Path) -> None:
    out = released.copy("dynamic", tmp_path)
    file = sorted(out.glob("*.safetensors"))[1]
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("_proj.weight"))
    old = int(tensors[name][3, 5])
    tensors[name][3, 5] = old ^ 1
    tensors[name][7, 0] ^= 1
    raw = file.read_bytes()
    changed = tensors[name].numpy().tobytes()
    file.write_bytes(raw.replace(load_bytes(raw, name), changed))
    result = released.reproduce(out)
    assert result.code == 1
    first = result.json["difference"]
    assert (first["file"], first["tensor"], first["index"]) == (file.name, name, [3, 5])
    assert (first["stored"], first["planned"], first["count"]) == (str(old ^ 1), str(old), 2)
    assert f"`{name}`[3, 5]" in result.json["error"]["what"]
    # the manifest lists what this run makes, so it does not differ
    assert [each["file"] for each in result.json["differences"]] == [file.name]
    assert result.json["notes"] == [f"`{file.name}` is not what {MANIFEST} lists: it was changed later"]
    shown = run_cli("reproduce", out, "--model", released.model)
    assert (shown.code, shown.out.splitlines()[-1][:10]) == (1, "DIFFERENT:")
    assert f"`{name}`[3, 5] in `{file.name}` is {old ^ 1}; this run makes {old} (1 more" in shown.out


def load_bytes(raw: bytes, name: str) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + size])[name]["data_offsets"]
    return raw[8 + size + begin : 8 + size + end]


def test_differences_of_other_files(released: Released, tmp_path: Path) -> None:
    out = released.copy("dynamic", tmp_path)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rope_theta": 1.5}))
    description = out / "quant_model_description.json"
    description.write_text(description.read_text().replace("W8A8_DYNAMIC", "W8A8", 1))
    with (out / "README.md").open("a") as card:
        card.write("a last line")
    (out / "tokenizer.json").write_text("{}")
    (out / "generation_config.json").unlink()
    (out / "later.txt").write_text("x")
    with resealed(out) as table:
        table["serving_dtype"] = "F16"
        table["files"][RECIPE]["sha256"] = "0" * 64
    report = released.reproduce(out).json
    found = {each["file"]: each for each in reversed(report["differences"])}
    copied = {"config.json", "tokenizer.json", "generation_config.json"}
    assert found.keys() == copied | {description.name, MANIFEST, "README.md"}
    assert found["README.md"]["stored"].startswith("has 'a last line' in line ")
    assert found["README.md"]["planned"] == "no such line"
    assert "is 'W8A8'" in found[description.name]["stored"]
    assert "W8A8_DYNAMIC" in found[description.name]["planned"]
    assert sha256_of(out / "config.json") in found["config.json"]["stored"]
    assert "has the sha256 44136fa3" in found["tokenizer.json"]["stored"]
    assert found["generation_config.json"]["stored"] == "is missing"
    assert "`serving_dtype` is 'F16'" in found[MANIFEST]["stored"]
    listed = [each for each in report["differences"] if each["file"] == MANIFEST]
    assert listed[1]["stored"] == f"has sha256 {'0' * 64} for `{RECIPE}`"
    assert listed[1]["planned"] == sha256_of(out / RECIPE)
    assert len(listed) == 2  # of files that differ themselves, this run makes no hash
    changed = ["README.md", "config.json", description.name, "tokenizer.json"]
    assert report["notes"] == [
        *(f"`{name}` is not what {MANIFEST} lists: it was changed later" for name in changed),
        "`later.txt`: not in the manifest, and not compared",
    ]


def test_figures_in_the_card_are_a_note(released: Released, tmp_path: Path) -> None:
    out = released.copy("dynamic", tmp_path)
    assert run_cli("verify", out, "--card").code == 0
    report = released.reproduce(out).json
    assert (report["ok"], report["notes"]) == (True, [
        "README.md also has the figures of `quantcli verify --card`"])  # fmt: skip
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("## How to serve it", "## How to serve"))
    first = released.reproduce(out).json["difference"]
    assert (first["file"], "'## How to serve'" in first["stored"]) == ("README.md", True)


def test_another_text_model_or_tokenizer_is_refused(released: Released, tmp_path: Path) -> None:
    out = released.out("static")
    recorded = json.loads((out / MANIFEST).read_text())["calibration"]["text"]["sha256"]
    other = tmp_path / "text.txt"
    other.write_text(TEXT + ".")
    result = released.reproduce(out, "--data", other)
    assert result.code == 2
    assert recorded in result.json["error"]["what"]
    assert sha256_of(other) in result.json["error"]["what"]
    missing = released.reproduce(out)
    assert (missing.code, missing.json["error"]["fix"]) == (2, "give --data FILE")
    assert f"`text.txt` (sha256 {recorded})" in missing.json["error"]["what"]

    model = Path(shutil.copytree(released.model, tmp_path / "model"))
    (model / "tokenizer_config.json").write_text("{}")
    words = "reproduce", out, "--json", "--data", released.text, "--model"
    result = run_cli(*words, model)
    changed = sha256_of(model / "tokenizer_config.json")
    what = f"this is another tokenizer: `tokenizer_config.json` has the sha256 {changed}; in"
    assert (result.code, result.json["error"]["what"][: len(what)]) == (2, what)
    (model / "tokenizer_config.json").unlink()
    assert "`tokenizer_config.json` is not there; in" in run_cli(*words, model).json["error"]["what"]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 2.0}))
    assert run_cli(*words, model).json["error"]["what"].startswith("this is another model: ")
    assert not out.with_name("static.reproduction").exists()


def test_the_recipe_in_a_checkpoint_works_with_its_text_alone(
    released: Released, tmp_path: Path
) -> None:
    out = released.out("static")
    words = "quantize", out / RECIPE, "--model", released.model, "--out", tmp_path / "out", "--json"
    result = run_cli(*words)
    sha256 = sha256_of(released.text)
    assert (result.code, result.json["error"]["what"], result.json["error"]["fix"]) == (
        2, f"text `text.txt` does not exist; its sha256 is {sha256}", "give the file with --data FILE",
    )  # fmt: skip
    other = tmp_path / "other.txt"
    other.write_text(TEXT + ".")
    refused = run_cli(*words, "--data", other)
    assert refused.code == 2
    assert refused.json["error"]["what"] == (
        f"this is another text than the recipe's: its sha256 is {sha256_of(other)}, the recipe's is "
        f"{sha256}"
    )
    assert run_cli(*words, "--data", released.text).code == 0
    assert snapshot(tmp_path / "out") == snapshot(out)


def test_the_sample_text_is_found_by_its_hash(released: Released, tmp_path: Path) -> None:
    """A recipe in a checkpoint has no path of it."""
    assert is_sample_text(str(SAMPLE))
    recipe = {"target": "ascend", **SCHEMES["static"], "calibration": CALIBRATION}
    made = quantcli.quantize(recipe, model=released.model, out=tmp_path / "out", data=SAMPLE)
    assert quantcli.reproduce(made.out, released.model).ok


def test_an_interrupted_run_continues(
    released: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = released.copy("dynamic", tmp_path)
    usual, seen = Whole.shard, list[str]()

    def shard(self: Whole, shard: Any, *rest: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(shard.file)
        return usual(self, shard, *rest)

    monkeypatch.setattr(Whole, "shard", shard)
    assert released.reproduce(out).code == 130
    assert out.with_name("copy.reproduction").is_dir()
    seen.clear()
    monkeypatch.setattr(
        Whole, "shard", lambda self, s, *more: seen.append(s.file) or usual(self, s, *more)
    )
    assert released.reproduce(out).code == 0
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert (len(files) > 3, seen) == (True, files[2:])
    assert not out.with_name("copy.reproduction").exists()


def test_a_folder_that_is_not_ours_is_left_alone(released: Released, tmp_path: Path) -> None:
    out = released.copy("dynamic", tmp_path)
    (tmp_path / "copy.reproduction").mkdir()
    (tmp_path / "copy.reproduction" / "mine.txt").write_text("x")
    result = released.reproduce(out, "--fresh")
    assert (result.code, "it holds `mine.txt`" in result.json["error"]["what"]) == (2, True)
    assert (tmp_path / "copy.reproduction" / "mine.txt").read_text() == "x"


def test_a_given_calibration_takes_the_place_of_the_text(released: Released, tmp_path: Path) -> None:
    out, kept = released.out("static"), tmp_path / "kept"
    made = released.reproduce(out, "--data", released.text, "--calibration", kept)
    assert (made.code, (kept / "calibration.json").is_file()) == (0, True)
    used = released.reproduce(out, "--calibration", kept)
    assert (used.code, used.json["notes"]) == (
        0, [f"the text was not run again: statistics are those of {kept}"],
    )  # fmt: skip


def test_packed_checkpoints_and_other_versions(released: Released, tmp_path: Path) -> None:
    packed = quantcli.pack(released.out("dynamic"), "compressed-tensors", out=tmp_path / "packed")
    report = quantcli.reproduce(packed.out, released.out("dynamic"))
    assert (report.ok, report.notes) == (True, [])
    out = released.copy("dynamic", tmp_path)
    with resealed(out) as table:
        table["tool"]["version"] = "0.0.9"
        table["plan"] = "0" * 64
    report = quantcli.reproduce(out, released.model)
    notes = [
        f"other versions made the checkpoint: quantcli 0.0.9; here are quantcli {quantcli.__version__}"
    ]
    assert (report.ok, report.notes) == (True, notes)


def test_a_manifest_that_does_not_record_the_text(released: Released, tmp_path: Path) -> None:
    out = released.copy("static", tmp_path)
    text, tokenizer, statistics, tool = notes = [
        "which text it was calibrated on is not recorded: this run cannot tell",
        "which tokenizer it was calibrated with is not recorded",
        "the sha256 of its statistics is not recorded",
        "which versions calibrated it is not recorded",
    ]
    words = out, "--data", released.text, "--calibration", tmp_path / "calibration"
    with resealed(out) as table:
        block = table.pop("calibration")
    report = released.reproduce(*words).json
    assert (report["ok"], report["notes"], report["statistics"]["recorded"]) == (True, notes, None)
    for key, note in {
        "text": text,
        "tokenizer": tokenizer,
        "statistics": statistics,
        "tool": tool,
    }.items():
        with resealed(out) as table:
            table["calibration"] = {other: block[other] for other in block if other != key}
        report = released.reproduce(*words).json
        assert (key, report["ok"], report["notes"]) == (key, True, [note])


def reseal_source(out: Path, source: dict[str, Any]) -> None:
    with resealed(out) as table:
        table["source"] = source


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda out: out.rename(out.with_name("moved")), "no such folder"),
        (lambda out: reseal_source(out, {}), f"{MANIFEST} does not say which model it was made of"),
        (lambda out: reseal_source(out, {"files": {"x": 1}}), "`source.files.x` should be an object"),
        (lambda out: (out / MANIFEST).unlink(), f"there is no {MANIFEST}"),
        (lambda out: (out / RECIPE).write_text("target: ascend\n"), f"{RECIPE} is missing, or is not"),
    ],
)
def test_what_does_not_say_how_it_was_made(
    released: Released, tmp_path: Path, change: Any, what: str
) -> None:
    out = released.copy("dynamic", tmp_path)
    change(out)
    result = released.reproduce(out)
    assert (result.code, result.json["error"]["what"].startswith(what)) == (2, True)


def test_verify_compares_the_manifest_with_the_calibration(released: Released, tmp_path: Path) -> None:
    out = released.copy("static", tmp_path)
    assert run_cli("verify", out).code == 0
    with resealed(out) as table:
        table["calibration"]["tokenizer"]["tokenizer.json"] = "0" * 64
        table["calibration"]["text"]["sha256"] = "1" * 64
    findings = run_cli("verify", out, "--json").json["findings"]
    errors = [(each["check"], each["where"]) for each in findings if each["severity"] == "error"]
    assert errors == [("manifest", MANIFEST), ("manifest", "tokenizer.json")]
