"""Recipes by name: listed, shown, converted with, and what a name that is none gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from tests.e2e.conftest import Box, make_llama, run_cli, snapshot
from tests.golden.short import DATA

RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))}
MIXTURE = DATA / "model_moe"  # experts as wide as MX formats need them
SHOW = "quantcli recipes show NAME"
LISTED = "`quantcli recipes` lists the shipped ones"


def test_the_list_has_every_recipe() -> None:
    listed = run_cli("recipes", "--json")
    assert (listed.code, listed.err) == (0, "")
    table = {entry["name"]: entry for entry in listed.json["recipes"]}
    assert [*table] == [*RECIPES]
    assert table["w8a8_dynamic"] == {
        "name": "w8a8_dynamic",
        "purpose": "W8A8 dynamic: int8 weights per channel, int8 inputs per token",
        "target": "ascend",
        "calibration": False,
    }
    assert table["w4a4_flatquant_tp1"]["target"] == "ascend"  # written as a mapping there
    assert table["fp8_static"]["calibration"] is True
    shown = run_cli("recipes")
    assert shown.code == 0
    assert all(line.startswith("next: ") for line in shown.err.splitlines())
    header, *lines = shown.out.splitlines()
    assert header.split() == ["recipe", "target", "calibrates", "for"]
    for line, entry in zip(lines, table.values(), strict=True):
        name, target, calibrates, purpose = line.split(maxsplit=3)
        assert (name, target, purpose) == (entry["name"], entry["target"], entry["purpose"])
        assert calibrates == ("yes" if entry["calibration"] else "no")
        assert 20 < len(purpose) <= 105, "the first sentence of a recipe is its line in the list"


@pytest.mark.parametrize("name", RECIPES)
def test_the_list_knows_what_calibrates(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    model = MIXTURE if "moe" in name else make_llama(folder, side=128)
    if load_recipe(name).cache is not None:  # the cache needs a config with heads
        model = RECIPES[name].parents[1] / "examples" / "tiny-qwen3"
    plan = make_plan(load_recipe(name), open_checkpoint(model))
    table = {entry["name"]: entry for entry in run_cli("recipes", "--json").json["recipes"]}
    assert table[name]["calibration"] == plan.needs_calibration
    if plan.needs_calibration:
        assert Path(plan.recipe.data_path()).is_file()


@pytest.mark.parametrize("name", RECIPES)
def test_show_prints_the_file(name: str) -> None:
    shown = run_cli("recipes", "show", name)
    usage = f"next: quantcli quantize {name} --model MODEL --plan\n"
    assert (shown.code, shown.err) == (0, usage)
    assert shown.out.encode() == RECIPES[name].read_bytes()
    document = run_cli("recipes", "show", name, "--json").json
    assert (document["name"], document["text"]) == (name, RECIPES[name].read_text())


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["show", "w8a8_dynmic"], "there is no recipe `w8a8_dynmic`", "did you mean `w8a8_dynamic`, "),
        (["show"], "`quantcli recipes show` takes one name", f"{SHOW}; "),
        (["show", "a", "b"], "`quantcli recipes show` takes one name", f"{SHOW}; "),
        (["w8a16"], "`quantcli recipes` has no part `w8a16`", f"did you mean `{SHOW}`?"),
        (["shwo"], "`quantcli recipes` has no part `shwo`", f"did you mean `{SHOW}`?"),
        (["all"], "`quantcli recipes` has no part `all`", f"leave it out, or {SHOW}"),
    ],
)  # fmt: skip
def test_misspelt_words(words: list[str], what: str, fix: str) -> None:
    result = run_cli("recipes", *words)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {what}\n  fix: {fix}")
    assert run_cli("recipes", *words, "--json").json["error"]["what"] == what


def test_by_name_the_bytes_are_those_of_the_file(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """From anywhere: no folder `recipes` is near."""
    monkeypatch.chdir(box.root)
    by_name = run_cli("quantize", "w8a8_dynamic", "--model", box.model, "--out", box.out)
    assert by_name.code == 0, by_name.err
    copied = box.root / "other" / "name.yaml"
    copied.parent.mkdir()
    copied.write_bytes(RECIPES["w8a8_dynamic"].read_bytes())
    by_file = run_cli("quantize", copied, "--model", box.model, "--out", box.root / "second")
    assert by_file.code == 0, by_file.err
    assert snapshot(box.out) == snapshot(box.root / "second")
    assert "quantcli_recipe.yaml" in snapshot(box.out)


def test_out_is_named_after_the_recipe(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(box.root)
    for recipe in ("w8a16", RECIPES["w8a16"]):
        planned = run_cli("quantize", recipe, "--model", box.model, "--plan", "--json").json
        assert planned["plan"]["out"] == "model-w8a16"


def test_a_file_wins_over_a_name(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(box.root)
    (box.root / "w8a16").write_text(box.recipe.read_text())
    planned = run_cli("quantize", "w8a16", "--model", box.model, "--plan", "--json").json
    assert {rule["scheme"] for rule in planned["plan"]["rules"]} == {"w8a8_dynamic"}


def test_a_name_wins_over_a_folder(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an OUT of the same name may be there."""
    monkeypatch.chdir(box.root)
    make_llama(box.root / "w8a16")
    assert run_cli("quantize", "w8a16", "--model", box.model, "--plan").code == 0
    refused = run_cli("quantize", "./w8a16", "--model", box.model, "--plan")
    assert refused.err.startswith("error: `./w8a16` is a model, not a recipe\n")


@pytest.mark.parametrize(
    ("recipe", "what", "fix"),
    [
        ("w8a8_dynmic", "there is no recipe `w8a8_dynmic`", "did you mean `w8a8_dynamic`, "),
        ("nonsense", "there is no recipe `nonsense`", f"check the path; {LISTED}"),
        ("w8a8_dynamic.yaml", "the recipe does not exist", f"did you mean `w8a8_dynamic`? {LISTED}"),
        ("recipes/w8a16.yaml", "the recipe does not exist", f"did you mean `w8a16`? {LISTED}"),
        ("recipes/w8a16", "the recipe does not exist", f"did you mean `w8a16`? {LISTED}"),
        ("org/my.yaml", "the recipe does not exist", f"check the path; {LISTED}"),
        ("here/w", "the recipe does not exist", f"check the path; {LISTED}"),
        ("here", "the recipe is a directory, not a YAML file", f"name a file in it; {LISTED}"),
        ("my model", "`my model` is a model, not a recipe",
         f"quantcli quantize w8a8_dynamic --model 'my model'; {LISTED}"),
        ("org/name", "`org/name` looks like a model of the Hub, not a recipe",
         f"quantcli quantize w8a8_dynamic --model org/name; {LISTED}"),
    ],
)  # fmt: skip
def test_what_is_not_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, what: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    make_llama(tmp_path / "my model")
    result = run_cli("quantize", recipe, "--json")
    assert result.code == 2
    error = json.loads(result.out)["error"]
    assert error["what"] == what
    assert error["fix"].startswith(fix)
    assert error["where"] == (recipe if what.startswith("the recipe") else None)


def test_a_recipe_that_no_system_can_open(box: Box) -> None:
    refused = run_cli("quantize", "x" * 300, "--model", box.model)
    assert refused.code == 3
    assert refused.err.startswith("error: cannot read the recipe: File name too long\n")


def test_calibrate_takes_names_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_llama(tmp_path / "model")
    refused = run_cli("calibrate", "w8a8_dynamic", "--model", model)
    assert (refused.code, refused.later) == (
        2,
        "error: nothing in this recipe needs a calibration\n  --> w8a8_dynamic\n"
        "  fix: `quantcli quantize` converts with it as it is\n",
    )
    swapped = run_cli("calibrate", "model")
    assert swapped.err == (
        "error: `model` is a model, not a recipe\n"
        f"  fix: quantcli calibrate w8a8_static --model model; {LISTED}\n"
    )


def test_calibration_by_the_sample_text_is_noted(tmp_path: Path) -> None:
    """Unless somebody chose it."""
    model = RECIPES["w8a8_static"].parents[1] / "examples" / "tiny-qwen3"
    words = ["quantize", "w8a8_static", "--model", model, "--out", tmp_path / "out", "--plan"]
    sample = "the calibration text is the sample that comes with quantcli, for a trial only"
    result = run_cli(*words)
    assert result.code == 0
    assert sample in result.out
    chosen = run_cli(*words, "--set", f"calibration.data={model.with_name('calibration.txt')}")
    assert chosen.code == 0
    assert sample not in chosen.out
    without = run_cli("quantize", "w8a8_dynamic", *words[2:])
    assert without.code == 0
    assert sample not in without.out
