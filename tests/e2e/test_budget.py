"""`budget` in a recipe, and `quantcli inspect --sensitivity`."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest
import yaml

import quantcli
from quantcli.calibration.resources import Resources
from quantcli.calibration.sensitivity.passes import FloatModel
from quantcli.commands.budget.options import name_of
from quantcli.commands.budget.sensitivity import SensitivityOptions, sensitivity
from quantcli.core.errors import InputError
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from tests.e2e.calibrating import Bench, Models, make_bench
from tests.e2e.conftest import run_cli

RECIPE = """\
target: compressed-tensors
budget:
  bits_per_quantizable: 6.0
  schemes: [{name: w4a16, group_size: 32}, w8a16]
calibration: {data: text.txt, samples: 40, length: 64, dtype: float32}
rules:
  - match: "*.layers.0.*.o_proj"
    scheme: keep
  - role: [attention, mlp, expert]
    scheme: budget
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"), num_hidden_layers=2)


@pytest.fixture
def bench(tmp_path: Path, models: Models) -> Bench:
    bench = make_bench(tmp_path, models("qwen3"), RECIPE)
    text = (Path(__file__).parents[2] / "examples" / "calibration.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:6000])
    return bench


def written(bench: Bench) -> dict:
    return yaml.safe_load(bench.root.joinpath("out.recipe.yaml").read_text())


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def test_a_budget_is_spent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    done = bench.run()
    assert done.code == 0, done.err
    assert "held-out text" in done.err
    recipe = written(bench)
    assert "budget" not in recipe
    assert "calibration" not in recipe  # no scheme needs it
    assert recipe["rules"][0] == {"match": ["*.layers.0.*.o_proj"], "scheme": "keep"}
    schemes = [rule["scheme"]["name"] for rule in recipe["rules"][1:]]
    assert schemes == ["w4a16", "w8a16"]
    page = bench.root.joinpath("out.budget.html").read_text()
    assert "bits for each weight" in page
    assert page.count("<circle") >= 2

    # the recipe that was written gives the same checkpoint
    again = bench.root / "again"
    recipe_file = bench.root / "out.recipe.yaml"
    assert run_cli("quantize", recipe_file, "--model", bench.model, "--out", again).code == 0
    assert weights(again) == weights(bench.out)

    # the measurement is kept: the same budget again runs no float model but for held-out text
    measured = list(bench.root.glob("out.sensitivity/sensitivity-*.json"))
    assert len(measured) == 2
    assert not list(bench.root.glob("out.sensitivity/*states*"))
    first = recipe_file.read_bytes()
    monkeypatch.setattr(FloatModel, "begin_backward", None)
    shutil.rmtree(bench.out)
    assert bench.run("--plan").code == 0
    assert recipe_file.read_bytes() == first


def test_data_driven_schemes(bench: Bench) -> None:
    bench.edit_recipe(RECIPE.replace("group_size: 32}", "group_size: 32, weight_rounding: gptq}"))
    done = bench.run()
    assert done.code == 0, done.err
    recipe = written(bench)
    assert recipe["calibration"]["data"] == "text.txt"
    assert recipe["rules"][1]["scheme"]["weight_rounding"] == "gptq"


def test_a_limit_of_perplexity(bench: Bench) -> None:
    bench.edit_recipe(RECIPE.replace("bits_per_quantizable: 6.0", "max_ppl_ratio: 1.5"))
    done = bench.run()
    assert done.code == 0, done.err
    assert {rule["scheme"]["name"] for rule in written(bench)["rules"][1:]} == {"w4a16"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("6.0", "4.0"), "smallest schemes take 4.5"),
        (("bits_per_quantizable: 6.0", "output_gib: 0.00001"), "the budget does not choose"),
        (("    scheme: budget", "    scheme: w8a16"), "no rule takes part in it"),
        (("bits_per_quantizable: 6.0", "{}"), "a budget has one limit"),
        (("w8a16]", "w8a16, w8a16]"), "is there twice"),
        (("w8a16]", "w4a4_dynamic]"), "w4a4_dynamic"),
        (("w8a16]", "w9]"), "unknown scheme `w9`"),
        (("calibration:", "smooth: {}\ncalibration:"), "`smooth` changes weights"),
        (("samples: 40", "samples: 1"), "too few to measure on"),
        (("[{name: w4a16, group_size: 32}, w8a16]", "[keep]"), "no scheme to choose but keep"),
        (("role: [attention, mlp, expert]", "role: ssm\n    optional: true"), "takes any of its"),
        (("calibration:", "rotate: {learn: {}}\ncalibration:"), "a rotation is learned for one choice"),
    ],
)
def test_what_cannot_be(bench: Bench, change: tuple[str, str], message: str) -> None:
    text = RECIPE.replace(*change)
    if change[1] == "{}":
        text = RECIPE.replace("  bits_per_quantizable: 6.0\n", "")
    bench.edit_recipe(text)
    done = bench.run()
    assert done.code == 2
    assert message in done.err
    assert not bench.root.joinpath("out.recipe.yaml").exists()


def test_what_the_conversion_refuses_is_refused_first(bench: Bench) -> None:
    done = bench.run("--calibration", bench.root / "calibrated")
    assert done.code == 2
    assert "needs a calibration" in done.err
    bench.out.mkdir()
    done = bench.run()
    assert done.code == 2
    assert "output directory exists" in done.err
    assert not list(bench.root.glob("out.*"))


def test_a_calibration_that_the_choice_does_not_need(bench: Bench) -> None:
    bench.edit_recipe(RECIPE.replace("w8a16]", "{name: w8a16, weight_rounding: gptq}]"))
    place = bench.root / "calibrated"
    done = bench.run("--calibration", place, "--set", "budget.bits_per_quantizable=64", "--plan")
    assert done.code == 0, done.err
    assert place.is_dir()
    assert [rule["scheme"] for rule in written(bench)["rules"]] == ["keep", "keep"]


def test_a_rotated_model_is_measured_rotated(bench: Bench) -> None:
    folder = bench.root / "kept"
    words = ["inspect", "--sensitivity", bench.model, "--recipe", bench.recipe, "--json"]
    first = run_cli(*words, "--folder", folder).json
    notes = folder / "notes.txt"
    notes.touch()
    errors = [first]
    for seed in (0, 1):
        bench.edit_recipe(RECIPE.replace("calibration:", f"rotate: {{seed: {seed}}}\ncalibration:"))
        done = run_cli(*words, "--folder", folder)
        assert "holds another measurement: it is replaced" in done.err
        errors.append(done.json)
    assert notes.exists()
    with (folder / "sensitivity.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run_cli(*words, "--folder", folder)
    assert done.code == 3
    assert "another run is writing here" in done.err
    (folder / "sensitivity-00001.json").write_text("{")
    done = run_cli(*words, "--folder", folder)
    assert done.code == 2
    assert "delete the file" in done.err
    total, turned, again = (report["schemes"][0]["error"] for report in errors)
    assert len({total, turned, again}) == 3
    assert turned == pytest.approx(total, rel=0.9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--folder", "{root}/kept"), "without a text"),
        (("--recipe", "{recipe}", "--folder", "{root}/text.txt"), "`text.txt` is not a directory"),
        (("--recipe", "{recipe}", "--folder", "{root}"), "the folder is not a measurement"),
        (("--recipe", "{turned}", "--only", "weights"), "transforms weights and inputs together"),
        (("--recipe", "{kept}"), "no scheme to choose but keep"),
    ],
)
def test_what_cannot_be_measured(bench: Bench, words: tuple[str, ...], message: str) -> None:
    names = {"root": bench.root, "recipe": bench.recipe}
    schemes = {"kept": "[keep]", "turned": "[w4a4_flatquant]"}
    for name, listed in schemes.items():
        names[name] = bench.root / f"{name}.yaml"
        recipe = RECIPE.replace("compressed-tensors", "ascend")
        names[name].write_text(recipe.replace("[{name: w4a16, group_size: 32}, w8a16]", listed))
    given = (word.format(**names) for word in words)
    done = run_cli("inspect", "--sensitivity", bench.model, *given)
    assert done.code == 2
    assert message in done.err
    assert "measuring 14" not in done.err


def test_other_commands_do_not_spend(bench: Bench) -> None:
    done = bench.calibrate()
    assert done.code == 2
    assert "which only `quantcli quantize` spends" in done.err
    bench.edit_recipe('target: compressed-tensors\nrules: [{match: "*", scheme: budget}]\n')
    done = bench.run()
    assert done.code == 2
    assert "the recipe has none" in done.err


def test_sensitivity_on_text(bench: Bench) -> None:
    folder = bench.root / "kept"
    words = ["inspect", "--sensitivity", bench.model, "--recipe", bench.recipe, "--json"]
    report = run_cli(*words, "--folder", folder).json
    assert report["on_text"]
    units = {unit["unit"]: unit for unit in report["units"]}
    attention = units["model.layers.1.self_attn.q_proj+k_proj+v_proj"]
    assert attention["modules"] == [f"model.layers.1.self_attn.{m}_proj" for m in "kqv"]
    int4, int8 = (scheme["name"] for scheme in report["schemes"][:2])
    for unit in units.values():
        assert 0 < unit["errors"][int8] < unit["errors"][int4] / 20
        assert unit["errors"]["keep"] == 0
    assert "model.layers.0.self_attn.o_proj" not in units
    total = report["schemes"][0]["error"]
    assert attention["left_float"][int4] == pytest.approx(total - attention["errors"][int4])

    # layers that are there are not measured again, and those that are not are
    next(iter(sorted(folder.glob("sensitivity-*.json")))).unlink()
    assert run_cli(*words, "--folder", folder).json == report
    # float inputs have no error of their own
    inputs = run_cli(*words, "--only", "inputs").json
    assert all(unit["errors"][int4] < 1e-12 for unit in inputs["units"])


def test_sensitivity_of_experts(bench: Bench, models: Models) -> None:
    model = models("qwen3_moe")
    words = ["inspect", "--sensitivity", model, "--recipe", bench.recipe, "--json"]
    report = run_cli(*words).json
    experts = [unit for unit in report["units"] if unit["unit"].endswith(".experts")]
    assert len(experts) == 2
    assert all(len(unit["modules"]) == 24 for unit in experts)
    int4 = report["schemes"][0]["name"]
    assert all(unit["errors"][int4] > 0 for unit in experts)


def test_from_python(bench: Bench) -> None:
    """`plan` spends as the command does."""
    planned = quantcli.plan(bench.recipe, model=bench.model, out=bench.out)
    first = bench.root.joinpath("out.recipe.yaml").read_bytes()
    assert {rule["scheme"] for rule in planned.rules} == {"w4a16", "w8a16"}
    assert bench.run("--plan").code == 0
    assert bench.root.joinpath("out.recipe.yaml").read_bytes() == first
    with pytest.raises(InputError, match="files"):
        quantcli.plan(bench.recipe, model=bench.model, example_inputs=["some text"])


def test_workers_change_nothing(bench: Bench) -> None:
    options = SensitivityOptions(recipe=bench.recipe)
    one, two = (sensitivity(str(bench.model), options, Resources(workers=n)) for n in (1, 2))
    assert one == two


def test_int4_in_bytes_counts_as_int4(bench: Bench) -> None:
    ascend = RECIPE.replace("compressed-tensors", "ascend")
    recipe, text = ascend.split("calibration:")
    schemes = "schemes: [w4a4_dynamic, w8a8_dynamic]\n"
    recipe = "".join(
        f"  {schemes}" if "schemes" in line else line for line in recipe.splitlines(keepends=True)
    )
    bench.edit_recipe(recipe + text.partition("\n")[2])
    done = bench.run("--plan")
    assert done.code == 0, done.err
    assert {rule["scheme"]["name"] for rule in written(bench)["rules"][1:]} == {
        "w4a4_dynamic",
        "w8a8_dynamic",
    }


def test_options_of_schemes_are_named_as_recipes_write_them() -> None:
    schemes = discover(Scheme)
    scheme = schemes["w4a16"].model_validate({"group_size": 32, "symmetric": False})
    assert name_of(scheme) == "w4a16 group_size=32 symmetric=false"
    assert name_of(schemes["w8a16"](clip="inputs")) == "w8a16 clip=inputs"
    assert name_of(None) == "keep"


def test_sensitivity_without_text(bench: Bench) -> None:
    page = bench.root / "page.html"
    done = run_cli("inspect", "--sensitivity", bench.model, "--report", page)
    assert done.code == 0, done.err
    assert "of weights alone" in done.out
    assert "Nothing is known of inputs" in page.read_text()
    refused = run_cli("inspect", "--sensitivity", bench.model, "--only", "inputs")
    assert refused.code == 2
    assert run_cli("inspect", bench.model, "--only", "inputs").code == 2
