"""Each command ends with the ones that follow; they are pasted as they are."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from quantcli.cli.next import shell, show
from quantcli.cli.output import Output
from tests.e2e.conftest import Box, Result, run_cli

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


def steps(result: Result) -> list[str]:
    """The commands that a shell would read, one a line."""
    lines = re.sub(r" \\\n *", " ", result.err).splitlines()
    return [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]


def paste(line: str) -> Result:
    name, *words = shlex.split(line)
    assert name == "quantcli"
    return run_cli(*words)


def test_from_a_recipe_to_a_served_checkpoint_by_pasting(box: Box) -> None:
    shutil.move(box.model, model := box.root / "a model")
    (line,) = steps(run_cli("quantize", box.recipe, "--model", model, "--out", box.out, "--plan"))
    assert "--plan" not in line
    verify, serve = steps(paste(line))
    assert serve == f"vllm serve {box.out} --quantization ascend"
    result = paste(verify)
    assert result.code == 0, result.err
    assert "against" in result.out
    assert steps(result) == [serve, f"hf upload ORG/NAME {box.out}"]
    assert steps(run_cli("verify", box.out)) == [f"quantcli verify {box.out} --full", serve]
    assert steps(run_cli("inspect", box.out)) == [f"quantcli verify {box.out} --full"]
    choose, plan = steps(run_cli("inspect", model))
    assert choose == f"quantcli recommend '{model}' --for DEVICE"
    assert plan == f"quantcli quantize RECIPE --model '{model}' --plan"
    packed = box.root / "packed"
    pack = ["pack", box.out, "--target", "compressed-tensors", "--out", packed]
    verify, serve = steps(run_cli(*pack))
    assert verify == f"quantcli verify {packed} --full --against {box.out}"
    assert serve == f"vllm serve {packed}"
    (packed / "tokenizer.json").unlink()
    page, look = steps(run_cli("verify", packed))
    assert page == f"quantcli verify {packed} --report verify.html"
    assert look == f"quantcli inspect {packed}"
    page, look = steps(run_cli("verify", box.out, packed))
    assert page == f"quantcli verify {box.out} {packed} --report verify.html"
    assert look == f"quantcli verify {packed} --full"


def test_parts_lead_to_the_next_part_and_then_to_the_whole(box: Box) -> None:
    following, merge = steps(box.run("--part", "2/2"))
    assert following == shlex.join(["quantcli", *map(str, box.args("--part", "1/2"))])
    assert steps(paste(following)) == [merge]
    assert merge == f"quantcli pack --merge {box.out}.part-*-of-2 --out {box.out}"
    parts = [str(part) for part in sorted(box.root.glob("out.part-*-of-2"))]
    words = shlex.split(merge)
    result = run_cli(*words[1:3], *parts, *words[4:])
    assert steps(result) == [f"quantcli verify {box.out} --full"]


@pytest.mark.parametrize(("device", "shared"), [("4090", False), ("2x910B", True)])
def test_a_recommendation_explains_its_table(device: str, shared: bool) -> None:
    out = run_cli("recommend", EXAMPLE, "--for", device).out
    assert "\norder         what fits; then by bits" in out
    assert ("\nweights       and cache: on each device\n" in out) == shared


def test_a_recommendation_leads_to_its_plan() -> None:
    plan, run = steps(run_cli("recommend", EXAMPLE, "--for", "4090"))
    assert plan == f"{run} --plan"
    assert paste(plan.replace("TEXT.jsonl", str(EXAMPLE.with_name("calibration.txt")))).code == 0


def test_recipes_lead_to_their_use() -> None:
    assert steps(run_cli("recipes"))[0] == "quantcli recipes show NAME"
    (line,) = steps(run_cli("recipes", "show", "fp8_block"))
    assert line == "quantcli quantize fp8_block --model MODEL --plan"


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_not_with_quiet_or_json(box: Box, option: str) -> None:
    assert not steps(box.run(option))
    assert not steps(run_cli("verify", box.out, option))
    assert not steps(run_cli("inspect", box.out, option))


def test_no_advice_after_an_error(box: Box) -> None:
    box.edit_recipe(box.recipe.read_text() + "expect: {quantizable_pct: '>= 101'}\n")
    for result, code in (
        (box.run(), 1),
        (run_cli("verify", box.model), 2),
        (run_cli("inspect", "x"), 2),
    ):
        assert result.code == code
        assert not steps(result)


def test_lines_are_folded_where_a_shell_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "40")
    words = [
        "quantcli",
        "verify",
        "a folder/with a name",
        "--full",
        "--against",
        "another/folder/of mine",
    ]
    show(Output(as_json=False), shell(*words))
    printed = capsys.readouterr().err
    assert max(map(len, printed.splitlines())) <= 40
    assert len(printed.splitlines()) > 2
    line = printed.replace("next: quantcli", "printf '%s\\n'")
    read = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert read.splitlines() == words[1:]
    show(Output(as_json=False), shell("x\ny\x1b[2J"))
    assert json.dumps(capsys.readouterr().err) == json.dumps("next: 'x\\ny\\x1b[2J'\n")
