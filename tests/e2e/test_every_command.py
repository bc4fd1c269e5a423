"""Every command at every kind of end: its JSON document, and the width of what it prints.

`Result.json` checks what all documents have.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantcli.cli.app import app
from quantcli.cli.terminal.fold import cells_of
from tests.e2e.conftest import RECIPE, Result, make_llama, run_cli
from tests.pages import script

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
COMMANDS = [command.callback.__name__ for command in app.registered_commands]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, recipes of it, a good conversion, and a damaged one."""
    folder = tmp_path_factory.mktemp("模型" * 12)  # wide characters in a long path
    make_llama(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    limits = "expect: {quantized_modules: '>= 7', bits_per_param: '< 1'}\n"
    (folder / "strict.yaml").write_text(RECIPE + limits)
    assert run_cli(*quantize(folder, "good")).code == 0
    shutil.copytree(folder / "good", folder / "damaged")
    (folder / "damaged" / "quant_model_description.json").unlink()
    return folder


def quantize(place: Path, out: str, recipe: str = "recipe.yaml") -> list[object]:
    return ["quantize", place / recipe, "--model", place / "model", "--out", place / out]


def pack(place: Path) -> list[object]:
    target = ["--target", "compressed-tensors"]
    return ["pack", place / "good", *target, "--out", place / "packed"]


GENERATED = script("generate")
ENVELOPE = {"ok", "schema_version", "error", "exit_code"}
# the command, its exit code, and the part of docs/cli.md that lists the keys of its document
ENDS: dict[str, tuple[Callable[[Path], list[object]], int, str | None]] = {
    "version": (lambda p: ["--version"], 0, "--version"),
    "recipes": (lambda p: ["recipes"], 0, "recipes"),
    "show": (lambda p: ["recipes", "show", "w8a8_dynamic"], 0, "recipes show"),
    "support": (lambda p: ["inspect", "--support"], 0, "inspect --support"),
    "inspect": (lambda p: ["inspect", p / "model", "--tensors", "*"], 0, "inspect MODEL"),
    "outliers": (lambda p: ["inspect", "--outliers", p / "model"], 0, "inspect --outliers"),
    "plan": (lambda p: [*quantize(p, "out"), "--plan"], 0, "quantize --plan"),
    "again": (lambda p: [*quantize(p, "good"), "--force"], 0, "quantize"),
    "pack plan": (lambda p: [*pack(p), "--plan"], 0, "pack --plan"),
    "pack": (lambda p: [*pack(p), "--force"], 0, "pack"),
    "verify": (lambda p: ["verify", p / "good"], 0, "verify"),
    "several": (lambda p: ["verify", p / "good", p / "damaged"], 1, "verify of several"),
    "failed": (lambda p: ["verify", p / "damaged"], 1, "verify"),
    "expect": (lambda p: quantize(p, "out", "strict.yaml"), 1, "quantize --plan"),
    "recommend": (lambda p: ["recommend", TINY, "--for", "2x910B"], 0, "recommend MODEL"),
    "nothing fits": (lambda p: ["recommend", TINY, "--for", "4090:1GB"], 1, "recommend MODEL"),
    "reproduce": (lambda p: ["reproduce", p / "good", "--model", p / "model"], 0, "reproduce"),
    "devices": (lambda p: ["recommend", "--devices"], 0, "recommend --devices"),
    "served": (lambda p: ["inspect", "--support", "--for", "310P"], 0, "inspect --support"),
    "auto": (lambda p: ["quantize", "auto", "--model", TINY, "--for", "4090", "--out", p / "out",
                        "--plan"], 0, "quantize --plan"),
    "no device": (lambda p: ["recommend", TINY, "--for", "4900"], 2, None),
    "auto alone": (lambda p: ["quantize", "auto", "--model", TINY], 2, None),
    "no command": (lambda p: ["nothing"], 2, None),
    "no recipe": (lambda p: ["recipes", "show", "nothing"], 2, None),
    "no model": (lambda p: ["calibrate", "w8a8_static", "--model", p / "nothing"], 2, None),
    "no checkpoint": (lambda p: ["verify", p / "nothing"], 2, None),
    "no target": (lambda p: ["pack", p / "good", "--target", "nothing", "--out", p / "out"], 2, None),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_the_document(place: Path, name: str) -> None:
    arguments, code, part = ENDS[name]
    result = run_cli(*arguments(place), "--json")
    assert result.code == code, result.err
    document = result.json
    if part is None:
        assert set(document) == ENVELOPE
        assert result.err.endswith(f"{document['error']['fix'] or ''}\n")
        return
    keys = GENERATED.keys_of(GENERATED.DOCUMENTS[part])
    assert set(document) == ENVELOPE | keys.keys()
    if "plan" in keys:
        (plan,) = (
            set(GENERATED.keys_of(plan))
            for plan in GENERATED.PLANS
            if plan.__name__ == ("Repacked" if "pack" in part else "Planned")
        )
        assert set(document["plan"]) == plan


# command lines that print more than those above
LONG: dict[str, Callable[[Path], list[object]]] = {
    "help": lambda p: ["--help"],
    **{f"{name} help": lambda p, name=name: [name, "--help"] for name in COMMANDS},
    "quantized": lambda p: ["inspect", p / "good"],
    "compared": lambda p: ["verify", p / "good", "--full", "--against", p / "model"],
    "converted": lambda p: [*quantize(p, "again"), "--force", "--verbose"],
    "parts": lambda p: ["pack", "--merge", p / "good", "--out", p / "merged"],
    "several compared": lambda p: ["verify", p / "good", p / "packed", "--against", p / "model"],
    "option": lambda p: ["quantize", "--cheksum", p / "model"],
    "long word": lambda p: ["recipes", "show", "x" * 100],
}


@pytest.mark.parametrize("name", [*ENDS, *LONG])
def test_no_line_is_wider_than_the_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "show":  # the text of a file stays as it is
        return
    arguments = LONG[name] if name in LONG else ENDS[name][0]
    monkeypatch.setenv("COLUMNS", "60")
    result = run_cli(*arguments(place))
    widest = max((result.out + result.err).splitlines(), key=cells_of)
    assert cells_of(widest) <= 60, widest


@pytest.mark.parametrize("columns", ["1", "20", "-1", "x", "²", "9" * 5000, ""])
def test_a_width_that_is_none(place: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for arguments, code in ((["inspect", place / "model"], 0), (["--help"], 0), (["verify", "x"], 2)):
        result = run_cli(*arguments)
        assert result.code == code, result.err
        widest = max(map(cells_of, (result.out + result.err).splitlines()))
        assert columns not in {"1", "20"} or arguments == ["--help"] or widest <= 20


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [(KeyboardInterrupt(), 130, "interrupted"), (RuntimeError("oops"), 70, "RuntimeError('oops')"),
     (PermissionError(13, "Permission denied", "/x"), 3, "permission denied")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("arguments", "function"),
    [
        (["inspect", "x"], "commands.inspect.inspect"),
        (["calibrate", "w8a8_static"], "commands.calibrate.plan_calibration"),
        (["quantize", "w8a8_dynamic"], "commands.quantize.plan"),
        (["pack", "x", "--target", "fp8", "--out", "y"], "commands.pack.plan_pack"),
        (["verify", "x"], "commands.verify.run"),
        (["recipes"], "recipe.shipped.shipped_recipes"),
    ],
)
def test_what_no_command_answers(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    function: str,
    error: BaseException,
    code: int,
    what: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"quantcli.{function}", fail)
    result = run_cli(*arguments, "--json")
    assert result.code == code, result.err
    assert set(result.json) == ENVELOPE
    assert result.json["error"]["what"] == what


def test_a_missed_limit_comes_with_the_values(place: Path) -> None:
    result: Result = run_cli(*quantize(place, "out", "strict.yaml"), "--json")
    expected = result.json["plan"]["expected"]
    bits = 8 * result.json["plan"]["bytes_after"] / 3088  # the model's parameters
    assert expected == [
        {"key": "quantized_modules", "limit": ">= 7", "value": 7, "ok": True},
        {"key": "bits_per_param", "limit": "< 1", "value": pytest.approx(bits), "ok": False},
    ]
    assert result.json["error"]["what"] == f"expected bits_per_param < 1; the plan has {bits:.4g}"
    assert not (place / "out").exists()


def test_a_suspicious_checkpoint(place: Path, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00003.safetensors")
    result = run_cli("inspect", model, "--json")
    problems = result.json["problems"]
    assert (result.code, result.err, len(problems) > 0) == (1, "", True)
    assert result.json["error"]["what"].startswith(
        f"the checkpoint is suspicious: {problems[0]['what']}"
    )
