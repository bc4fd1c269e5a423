"""The JSON document of every command at every kind of end. `Result.json` checks what all have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import RECIPE, Result, make_llama, run_cli


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, recipes of it, a good conversion, and a damaged one."""
    folder = tmp_path_factory.mktemp("envelope")
    make_llama(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    limits = "expect: {quantized_modules: '>= 7', bits_per_param: '< 1'}\n"
    (folder / "strict.yaml").write_text(RECIPE + limits)
    done = run_cli(*quantize(folder, "good"), "--json")
    assert (done.code, set(done.json) - ENVELOPE) == (
        0,
        {"out", "bytes", "shards_reused", "files", "plan"},
    )
    shutil.copytree(folder / "good", folder / "damaged")
    (folder / "damaged" / "quant_model_description.json").unlink()
    return folder


def quantize(place: Path, out: str, recipe: str = "recipe.yaml") -> list[object]:
    return ["quantize", place / recipe, "--model", place / "model", "--out", place / out]


ENVELOPE = {"ok", "schema_version", "error", "exit_code"}
# the command, its exit code, and keys that its document has next to those of every document
ENDS: dict[str, tuple[Callable[[Path], list[object]], int, set[str]]] = {
    "version": (lambda p: ["--version"], 0, {"version"}),
    "recipes": (lambda p: ["recipes"], 0, {"recipes"}),
    "show": (lambda p: ["recipes", "show", "w8a8_dynamic"], 0, {"name", "text"}),
    "support": (lambda p: ["inspect", "--support"], 0, {"support"}),
    "inspect": (lambda p: ["inspect", p / "model"], 0, {"groups", "parameters", "problems"}),
    "outliers": (lambda p: ["inspect", "--outliers", p / "model"], 0, {"modules", "advice"}),
    "plan": (lambda p: [*quantize(p, "out"), "--plan"], 0, {"plan"}),
    "pack": (lambda p: ["pack", p / "good", "--target", "compressed-tensors", "--out", p / "packed",
                        "--plan"], 0, {"plan"}),
    "verify": (lambda p: ["verify", p / "good"], 0, {"checks", "findings", "depths"}),
    "failed": (lambda p: ["verify", p / "damaged"], 1, {"checks", "findings", "depths"}),
    "expect": (lambda p: quantize(p, "out", "strict.yaml"), 1, {"plan"}),
    "no command": (lambda p: ["nothing"], 2, set()),
    "no recipe": (lambda p: ["recipes", "show", "nothing"], 2, set()),
    "no model": (lambda p: ["calibrate", "w8a8_static", "--model", p / "nothing"], 2, set()),
    "no checkpoint": (lambda p: ["verify", p / "nothing"], 2, set()),
    "no target": (lambda p: ["pack", p / "good", "--target", "nothing", "--out", p / "out"], 2, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_every_command(place: Path, name: str) -> None:
    arguments, code, keys = ENDS[name]
    result = run_cli(*arguments(place), "--json")
    assert result.code == code, result.err
    assert set(result.json) >= ENVELOPE | keys
    if not keys:
        assert set(result.json) == ENVELOPE
        assert result.err.endswith(str(result.json["error"]["fix"] or "") + "\n")


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
