"""Experts in a calibration: tokens of each, all tokens for all, and those that no token reaches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcli.calibration import session
from quantcli.calibration.methods import hessians
from tests.e2e.calibrating import (
    LENGTH,
    SAMPLES,
    TOKENS,
    Bench,
    Models,
    change_tensors,
    make_bench,
)
from tests.e2e.conftest import snapshot

LAYERS, CHOSEN = 4, 2  # experts of a token
CALIBRATION = f"calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}}}"
GPTQ = f"""\
target: ascend
{CALIBRATION}
rules:
  - match: ["*.experts.*", "*.self_attn.*_proj"]
    scheme: {{name: w8a8_dynamic, weight_rounding: gptq}}
"""
RANGES = f"""\
target: compressed-tensors
{CALIBRATION}
rules:
  - {{match: "*.experts.*", scheme: {{name: fp8_static, observer: minmax}}}}
"""
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj"
PARTS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(tmp_path: Path, models: Models) -> Callable[..., Bench]:
    def bench(recipe: str, **calibration: str) -> Bench:
        more = "".join(f", {key}: {value}" for key, value in calibration.items())
        changed = recipe.replace(CALIBRATION, CALIBRATION[:-1] + more + "}")
        made = make_bench(tmp_path, models("qwen3_moe"), changed)
        change_tensors(made.own_model(), starve)
        return made

    return bench


def starve(tensors: dict[str, torch.Tensor]) -> None:
    """Experts 6 and 7 of each layer are never among the best two, and point where 2 and 1 do."""
    for layer in range(LAYERS):
        router = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        router[1], router[3] = -router[0], -router[2]
        router[6], router[7] = router[2] / 1024, router[1] / 1024


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def test_tokens_of_experts(make: Callable[..., Bench]) -> None:
    bench = make(GPTQ)
    found = bench.calibrate("--json").json
    assert list(found["experts"]) == [f"model.layers.{n}.mlp.experts" for n in range(LAYERS)]
    for layer, table in enumerate(found["experts"].values()):
        counts = table["tokens"]
        assert list(counts) == [str(number) for number in range(8)]
        assert sum(counts.values()) == CHOSEN * TOKENS
        assert table["mean"] == CHOSEN * TOKENS / 8
        assert counts["6"] == counts["7"] == 0
        modules = found["modules"]
        assert all(modules[EXPERT.format(layer, n, "up")]["tokens"] == counts[str(n)] for n in range(8))
        for percent in (5, 10):
            below = [n for n in range(8) if counts[str(n)] < percent / 100 * table["mean"]]
            assert table[f"below_{percent}_pct"] == below
            assert {6, 7} <= set(below)
        assert "shown" not in table
    told = bench.calibrate().out
    assert "tokens by the router" in told
    line = next(x for x in told.splitlines() if x.startswith("model.layers.0.mlp.experts "))
    assert line.split()[1:4] == ["8", f"{CHOSEN * TOKENS / 8:.1f}", "0"]
    planned = bench.run("--plan")
    assert "tokens by the router" in planned.out
    assert "got less than 5 % of the tokens" in planned.out
    plan = bench.run("--json").json["plan"]
    assert plan["experts"] == found["experts"]
    assert plan["taken_from"] == {}


@pytest.mark.parametrize("policy", ["nearest", "group"])
def test_ranges_of_experts_without_tokens(make: Callable[..., Bench], policy: str) -> None:
    bench = make(RANGES, uncalibrated=policy)
    result = bench.run("--json")
    assert result.code == 0, result.err
    plan = result.json["plan"]
    scales = {k: float(t) for k, t in tensors(bench.out).items() if k.endswith(".input_scale")}
    assert len(scales) == LAYERS * 8 * 3
    model = tensors(bench.model)
    dead = 0
    for layer in range(LAYERS):
        router = model[f"model.layers.{layer}.mlp.gate.weight"].double()
        counts = plan["experts"][f"model.layers.{layer}.mlp.experts"]["tokens"]
        reached = [n for n in range(8) if counts[str(n)]]
        for number in sorted(set(range(8)) - set(reached)):
            alike = torch.nn.functional.cosine_similarity(router[number][None], router[reached])
            donor = reached[int(alike.argmax())]
            dead += number == 6 and donor == 2  # as `starve` makes them
            for part in PARTS:
                name = EXPERT.format(layer, number, part)
                stored = {n: scales[f"{EXPERT.format(layer, n, part)}.input_scale"] for n in reached}
                group = policy == "group"
                expected = max(stored.values()) if group else stored[donor]
                assert scales[f"{name}.input_scale"] == expected
                source = EXPERT.format(layer, "*" if group else donor, part)
                assert plan["taken_from"][name] == source
    assert dead
    assert len(plan["taken_from"]) == len(bench.calibrate("--json").json["uncalibrated"])
    (note,) = (note for note in plan["notes"] if "take the statistics" in note)
    assert "no token of the calibration text reached `model.layers.0.mlp.experts." in note


@pytest.mark.parametrize("policy", ["nearest", "group"])
def test_codes_of_experts_without_tokens(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    bench = make(GPTQ, uncalibrated=policy)
    monkeypatch.setattr(session, "BATCH_TOKENS", LENGTH)
    assert bench.run().code == 0
    found = bench.calibrate("--json").json
    made = tensors(bench.out)
    again = bench.at("again")
    with monkeypatch.context() as patch:
        patch.setattr(hessians, "HESSIANS_NBYTES", 1)  # a pass for each matrix
        assert again.run("--workers", "3").code == 0
    assert snapshot(again.out) == snapshot(bench.out)
    plain = bench.at("plain")
    plain.edit_recipe(GPTQ)
    assert plain.run().code == 0
    usual = tensors(plain.out)
    changed = 0
    for name, module in found["modules"].items():
        if not module["tokens"]:
            assert "rounded_to_nearest" not in module
            assert module["output_error"] <= module["output_error_nearest"]
            changed += not torch.equal(made[f"{name}.weight"], usual[f"{name}.weight"])
        elif ".experts." in name:
            assert torch.equal(made[f"{name}.weight"], usual[f"{name}.weight"])
    assert changed > 3 * LAYERS


def test_all_tokens(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(GPTQ)
    assert bench.run().code == 0
    usual = bench.calibrate("--json").json
    everywhere = bench.at("all")
    recipe = bench.recipe.read_text()
    bench.edit_recipe(recipe.replace("samples:", "all_tokens: true, samples:"))
    result = everywhere.run("--json")
    assert result.code == 0, result.err
    assert not any("less than 5 %" in note for note in result.json["plan"]["notes"])
    found = everywhere.calibrate("--json").json
    for name, module in found["modules"].items():
        assert module["tokens"] == TOKENS
        if ".experts." in name:
            assert module["routed"] == usual["modules"][name]["tokens"]
            assert "rounded_to_nearest" not in module
        else:
            assert module == usual["modules"][name]  # what flows on is the router's choice
    for layer, table in found["experts"].items():
        assert table["shown"] == TOKENS
        assert {**table, "shown": 0} == {**usual["experts"][layer], "shown": 0}
    assert found["no_tokens"] == []
    one, two = tensors(bench.out), tensors(everywhere.out)
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert {name for name in one if ".experts." not in name} <= same
    assert f"{EXPERT.format(0, 6, 'up')}.weight" not in same
    again = bench.at("again")
    monkeypatch.setattr(hessians, "HESSIANS_NBYTES", 1)  # a pass for each matrix
    assert again.run("--workers", "3").code == 0
    assert snapshot(again.out) == snapshot(everywhere.out)


def test_all_tokens_and_running_ranges_are_refused(make: Callable[..., Bench]) -> None:
    bench = make(RANGES, all_tokens="true", inputs="running")
    result = bench.run()
    assert result.code == 2
    assert "`all_tokens` does not go together with `inputs: running`" in result.err
    assert "recipe.yaml:2" in result.err


def test_all_tokens_without_experts(tmp_path: Path, models: Models) -> None:
    recipe = GPTQ.replace('"*.experts.*", ', "").replace("samples:", "all_tokens: true, samples:")
    bench = make_bench(tmp_path, models("qwen3"), recipe)
    assert "calibration.all_tokens has no effect: the model has no experts" in bench.run("--plan").out
