"""`weight_rounding: gptq` as a user meets it: the same bytes whatever, never worse, nothing silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli.calibration.methods import hessians
from quantcli.calibration.methods.rounding import RoundingPass
from quantcli.calibration.session import Resources
from quantcli.commands import quantize as commands
from quantcli.core.events import Progress
from quantcli.schemes.arithmetic import gptq
from tests.e2e.calibrating import (
    LENGTH,
    SAMPLES,
    TOKENS,
    Bench,
    Models,
    change_tensors,
    make_bench,
    small_jobs,
    tensors,
)
from tests.e2e.conftest import run_cli, snapshot

LAYERS = 4
LAYER = "model.layers.{}."
RECIPE = f"""\
target: compressed-tensors
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, inputs: quantized}}
rules:
  - match: "*.mlp.*_proj"
    scheme: {{name: w8a8_static, observer: minmax, symmetric: true, weight_rounding: gptq}}
  - match: "*_proj"
    scheme: {{name: w4a16, group_size: 32, weight_rounding: gptq}}
"""
LEARNED = f"""\
target: compressed-tensors
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, inputs: quantized}}
rules:
  - match: "*.mlp.*_proj"
    scheme: {{name: mxfp4, weight_rounding: {{name: learned, steps: 24, batch: 2, lr: 0.01}}}}
  - match: "*_proj"
    scheme:
      name: w4a16
      group_size: 32
      weight_rounding: {{name: learned, steps: 24, batch: 2, lr: 0.01}}
"""
EXPERTS = """\
target: ascend
calibration: {data: text.txt, samples: 4, length: 16}
rules:
  - match: ["*.experts.*", "*.self_attn.*_proj"]
    scheme: {name: w8a8_dynamic, weight_rounding: gptq}
"""
FLOAT = RECIPE.replace(", inputs: quantized", "")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(tmp_path: Path, models: Models) -> Callable[..., Bench]:
    return lambda recipe=RECIPE, family="qwen3": make_bench(tmp_path, models(family), recipe)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, and several jobs even for tiny matrices."""
    small_jobs(monkeypatch)


def report(bench: Bench, layer: int) -> dict[str, dict[str, Any]]:
    found = json.loads((bench.store / f"layer-{layer:05d}.json").read_text())["modules"]
    assert isinstance(found, dict)
    return found


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("recipe", [RECIPE, FLOAT], ids=["quantized", "float"])
def test_same_bytes_with_any_workers_and_memory(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    bench = make(recipe)
    assert bench.run("--workers", 1).code == 0
    for workers in (2, 8):
        other = bench.at(f"out{workers}")
        monkeypatch.setattr(hessians, "HESSIANS_NBYTES", 1)  # a pass for each matrix
        result = other.run("--workers", workers)
        assert result.code == 0, result.err
        assert snapshot(other.store) == snapshot(bench.store)
        assert snapshot(other.out) == snapshot(bench.out)


@pytest.mark.usefixtures("small")
def test_what_was_interrupted_goes_on(make: Callable[..., Bench]) -> None:
    wanted = make()
    assert wanted.run().code == 0
    bench = wanted.at("again")

    class Stops(Progress):
        def layer(self, name: str, index: int, note: str = "") -> None:
            if index == 1:
                raise KeyboardInterrupt

    job = commands.plan(bench.recipe, model=str(bench.model), out=bench.out)
    with pytest.raises(KeyboardInterrupt):
        commands.quantize(job, Stops(), Resources(workers=2))
    result = bench.run("--workers", 2)
    assert result.code == 0, result.err
    assert "layer 2/4" not in result.err
    assert "layer 3/4" in result.err
    assert snapshot(bench.store) == snapshot(wanted.store)
    assert snapshot(bench.out) == snapshot(wanted.out)


@pytest.mark.usefixtures("small")
def test_learned_rounding(make: Callable[..., Bench]) -> None:
    """Codes and scales of its own, the same for any number of workers; never worse on the samples."""
    bench = make(LEARNED)
    assert bench.run("--workers", 1).code == 0
    other = bench.at("again")
    assert other.calibrate("--workers", 3).code == 0
    assert snapshot(other.store) == snapshot(bench.store)
    lower = 0
    for layer in range(LAYERS):
        for found in report(bench, layer).values():
            assert found["layer_error"] <= found["layer_error_before"]
            assert "output_error" not in found
            lower += found["layer_error"] < 0.9 * found["layer_error_before"]
    assert lower
    for options in (("--calibration", bench.store), ()):
        checked = run_cli("verify", bench.out, "--against", bench.model, "--full", *options)
        assert checked.code == 0, checked.out + checked.err
    assert "scales that data chose were not recomputed in 28 modules" in checked.out


def test_options_of_learning_in_one_layer(make: Callable[..., Bench]) -> None:
    bench = make(LEARNED.replace("lr: 0.01", "lr: 0.02", 1))
    refused(bench.calibrate(), "rounding learns with different options", "give their rules the same")


def test_codes_are_in_the_checkpoint_with_the_scales_of_nearest(make: Callable[..., Bench]) -> None:
    unclipped = RECIPE.replace("symmetric: true,", "symmetric: true, clip: none,")
    nearest_recipe = unclipped.replace("gptq", "nearest")
    int4 = "group_size: 32, weight_rounding: gptq"
    assert int4 in unclipped
    kept = "group_size: 32, weight_rounding: {name: gptq, ranges: kept}"
    unclipped = unclipped.replace(int4, kept)
    bench = make(unclipped)
    told = bench.run("--plan").out
    assert (
        "runs first: ranges of 12 modules, clips of 16 modules and codes of 28 modules from 4 samples"
        in told
    )
    result = bench.run()
    assert result.code == 0, result.err
    assert "rounded to nearest" not in result.err
    again = bench.run("--plan", "--force").out
    asked = "ranges of 12 modules, clips of 16 modules and codes of 28 modules"
    assert f"calibration  {bench.store}, {asked}\n" in again
    other = bench.at("nearest")
    other.edit_recipe(nearest_recipe)
    assert other.run().code == 0
    mine, nearest, stored = tensors(bench.out), tensors(other.out), tensors(bench.store)
    changed = 0
    for layer in range(LAYERS):
        for module, found in report(bench, layer).items():
            codes = stored[f"stats.{module}.codes"]
            assert codes.dtype == torch.int8
            assert found["output_error"] <= found["output_error_nearest"]
            assert found["tokens"] == TOKENS
            if ".mlp." in module:
                assert torch.equal(mine[f"{module}.weight"], codes)
                # ranges of inputs come into it by a rounding of float32
                scales = mine[f"{module}.weight_scale"], nearest[f"{module}.weight_scale"]
                assert torch.allclose(*scales, rtol=1e-6)
                changed += int((codes != nearest[f"{module}.weight"]).sum())
            elif layer == 0:  # later ones see other inputs, but scales are of weights alone
                scale, packed = f"{module}.weight_scale", f"{module}.weight_packed"
                assert torch.equal(mine[scale], nearest[scale])
                assert not torch.equal(mine[packed], nearest[packed])
    assert changed > 1000
    checked = run_cli("verify", bench.out, "--against", bench.model, "--full")
    assert checked.code == 0, checked.out + checked.err


def test_rounded_in_the_order_of_data_flow(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group on what those before it make of it: their weights are no longer float then."""
    rounded: list[tuple[list[str], int]] = []
    real = RoundingPass._round_all

    def spied(self: RoundingPass, modules: Any, *rest: Any) -> None:
        engine = self._engine()
        pieces = [] if engine is None else engine._pieces.values()
        done = sum(piece.scheme is not None for matrix in pieces for piece in matrix)
        rounded.append((sorted(m.rpartition(".")[2] for m in modules), done))
        real(self, modules, *rest)

    monkeypatch.setattr(RoundingPass, "_round_all", spied)
    bench = make()
    assert bench.calibrate().code == 0
    groups = [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert rounded == list(zip(groups, [0, 3, 4, 6], strict=True)) * LAYERS
    quantized = tensors(bench.store)
    rounded.clear()
    other = bench.at("float")
    other.edit_recipe(FLOAT)
    assert other.calibrate().code == 0
    assert sorted(rounded) == sorted([(group, 0) for group in groups] * LAYERS)
    floats = tensors(other.store)
    name = f"stats.{LAYER.format(0)}self_attn.{{}}_proj.codes"
    assert torch.equal(quantized[name.format("q")], floats[name.format("q")])
    assert not torch.equal(quantized[name.format("o")], floats[name.format("o")])


@pytest.mark.parametrize("family", ["phi3", "mixtral", "stablelm"])
def test_families(make: Callable[..., Bench], family: str) -> None:
    """Fused q, k, v; stacked experts; biases. On smoothed weights, with a static scheme, too."""
    scheme = "w8a8_dynamic" if family == "mixtral" else "w8a8_static, observer: minmax"
    match = '["*_proj"]' if family != "mixtral" else '["*_proj", "*.experts.*"]'
    smooth = "smooth: {alpha: 0.5}\n" if family != "mixtral" else ""
    bench = make(
        f"target: ascend\n{smooth}"
        "calibration: {data: text.txt, samples: 4, length: 16, inputs: quantized}\n"
        f"rules:\n  - match: {match}\n    scheme: {{name: {scheme}, weight_rounding: gptq}}\n",
        family,
    )
    result = bench.run()
    assert result.code == 0, result.err
    checked = run_cli("verify", bench.out, "--against", bench.model, "--full")
    assert checked.code == 0, checked.out + checked.err
    made, stored = tensors(bench.out), tensors(bench.store)
    better = 0
    for layer in range(LAYERS):
        for module, found in report(bench, layer).items():
            if "output_error" not in found:
                continue
            assert torch.equal(made[f"{module}.weight"], stored[f"stats.{module}.codes"])
            assert found["output_error"] <= found["output_error_nearest"]
            better += found["output_error"] < 0.9 * found["output_error_nearest"]
    assert better >= 2 * LAYERS


def test_experts_without_tokens_are_rounded_to_nearest_and_named(make: Callable[..., Bench]) -> None:
    bench = make(EXPERTS, "qwen3_moe")

    def starve(found: dict[str, torch.Tensor]) -> None:
        """Experts 6 and 7 of layer 1 are never among the best two."""
        router = found["model.layers.1.mlp.gate.weight"]
        router[1], router[3] = -router[0], -router[2]
        router[6:] = 0

    change_tensors(bench.own_model(), starve)
    result = bench.run()
    assert result.code == 0, result.err
    expert = "model.layers.1.mlp.experts.{}.{}_proj"
    line = next(x for x in result.err.splitlines() if x.startswith("rounded to nearest, as no token"))
    assert line.startswith("rounded to nearest, as no token reached it: `model.layers.")
    found = report(bench, 1)
    nearest = bench.at("nearest")
    nearest.edit_recipe(EXPERTS.replace("gptq", "nearest"))
    assert nearest.run().code == 0
    made, plain = tensors(bench.out), tensors(nearest.out)
    for number in range(8):
        for part in ("gate", "up", "down"):
            name = expert.format(number, part)
            if number > 5:
                assert found[name] == {"rounded_to_nearest": "no token reached it", "tokens": 0}
                assert torch.equal(made[f"{name}.weight"], plain[f"{name}.weight"])
            elif found[name]["tokens"]:
                assert "rounded_to_nearest" not in found[name]


def test_what_cannot_be_factorized_is_named(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "factorize", lambda *_: False)
    bench = make()
    result = bench.calibrate()
    assert result.code == 0, result.err
    assert "rounded to nearest, as its inputs are linearly dependent beyond damping: " in result.err
    for found in report(bench, 0).values():
        assert found["rounded_to_nearest"].startswith("its inputs")
        assert found["output_error"] == found["output_error_nearest"]


# refused


def refused(result: Any, what: str, fix: str) -> None:
    assert result.code == 2
    assert what in result.err
    assert f"fix: {fix}" in result.err


def test_without_data(make: Callable[..., Bench]) -> None:
    bench = make("".join(line for line in RECIPE.splitlines(True) if "calibration" not in line))
    for result in (bench.run(), bench.run("--plan"), bench.calibrate()):
        refused(result, "_proj` needs calibration data, and the recipe names none", "give the recipe")


def test_inputs_that_depend_on_order(make: Callable[..., Bench]) -> None:
    bench = make(RECIPE.replace("inputs: quantized", "inputs: running"))
    refused(bench.run("--plan"), "is rounded by data, which does not go together", "set calibration")


def test_lm_head_is_outside_of_the_stack(make: Callable[..., Bench]) -> None:
    bench = make(FLOAT.replace('"*_proj"', '["*_proj", lm_head]'))
    refused(bench.run(), "no token reached `lm_head`, and its scheme needs data", "`keep` them")
    bench.edit_recipe(bench.recipe.read_text().replace("length:", "uncalibrated: dynamic, length:"))
    result = bench.run("--fresh")
    assert result.code == 0, result.err
    note = "no token reached `lm_head`: their weights are clipped and rounded as without calibration"
    assert f"note: {note}" in result.err
    assert tensors(bench.out)["lm_head.weight_packed"].dtype == torch.int32


def test_codes_are_of_one_scheme(make: Callable[..., Bench]) -> None:
    """Its scales are what they were chosen against, unlike ranges of inputs: another scheme gets codes
    of its own, next to those that are there."""
    bench = make(EXPERTS.replace('"*.experts.*", ', ""))
    assert bench.calibrate().code == 0
    before = snapshot(bench.store)
    bench.edit_recipe(bench.recipe.read_text().replace("w8a8_dynamic", "w8a16"))
    assert bench.calibrate().code == 0
    after = snapshot(bench.store)
    assert before.items() <= after.items()
    (further,) = bench.store.glob("further-*")
    assert snapshot(further).keys() == before.keys()
    measured = {name.rpartition(".")[2] for name in tensors(further)}
    assert "codes" in measured
    assert f"--calibration {bench.store}\n" in bench.calibrate().err
