"""`weight_rounding: gptq` for four-bit floats: the same bytes, scales of nearest, less error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantcli.calibration.methods import hessians
from quantcli.core.numerics import Stats
from quantcli.schemes.arithmetic.fp4 import LEAST_GLOBAL
from quantcli.schemes.fp4 import NvFp4Weights
from tests.e2e.calibrating import (
    LENGTH,
    SAMPLES,
    Bench,
    Models,
    change_tensors,
    make_bench,
    small_jobs,
    tensors,
)
from tests.e2e.conftest import run_cli, snapshot

LAYERS = 4
RECIPE = f"""\
target: compressed-tensors
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, inputs: quantized}}
rules:
  - match: "*.mlp.*_proj"
    scheme: {{name: mxfp4, weight_rounding: gptq}}
  - match: "*.o_proj"
    scheme: {{name: nvfp4a16, weight_rounding: gptq}}
  - match: "*_proj"
    scheme: {{name: nvfp4, weight_rounding: gptq}}
"""
EXPERTS = """\
target: compressed-tensors
calibration: {data: text.txt, samples: 4, length: 16}
rules:
  - match: ["*.experts.*", "*.self_attn.*_proj"]
    scheme: {name: nvfp4a16, weight_rounding: gptq}
"""


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


def reports(bench: Bench) -> dict[str, dict[str, float]]:
    files = sorted(bench.store.glob("layer-*.json"))
    return {name: found for f in files for name, found in json.loads(f.read_text())["modules"].items()}


@pytest.mark.usefixtures("small")
def test_same_bytes_with_any_workers_and_memory(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    result = bench.run("--workers", 1)
    assert result.code == 0, result.err
    monkeypatch.setattr(hessians, "HESSIANS_NBYTES", 1)  # a pass for each matrix
    other = bench.at("out3")
    assert other.run("--workers", 3).code == 0
    assert snapshot(other.store) == snapshot(bench.store)
    assert snapshot(other.out) == snapshot(bench.out)


def test_one_scale_of_siblings_while_calibrating(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v have different maxima. Codes are chosen, and layers run, with one scale of them."""
    bench = make()

    def grow(found: dict[str, torch.Tensor]) -> None:
        for name, tensor in found.items():
            if "k_proj.weight" in name:
                tensor *= 5

    change_tensors(bench.own_model(), grow)
    seen: list[float] = []
    real = NvFp4Weights.whole

    def spied(self: NvFp4Weights, constants: Stats, device: torch.device) -> torch.Tensor:
        scale = real(self, constants, device)
        seen.append(float(scale))
        return scale

    monkeypatch.setattr(NvFp4Weights, "whole", spied)
    result = bench.calibrate()
    assert result.code == 0, result.err
    calibrating = {scale for scale in seen if scale != LEAST_GLOBAL}  # which is that of no data
    assert bench.run().code == 0
    stored = {name: t for name, t in tensors(bench.out).items() if name.endswith("weight_global_scale")}
    assert calibrating == {float(1 / divisor) for divisor in stored.values()}
    assert len(calibrating) == 2 * LAYERS


def test_scales_are_those_of_nearest_and_errors_smaller(make: Callable[..., Bench]) -> None:
    kept = "weight_rounding: {name: gptq, ranges: kept}"
    bench = make(RECIPE.replace("weight_rounding: gptq", kept))
    result = bench.run()
    assert result.code == 0, result.err
    other = bench.at("nearest")
    other.edit_recipe(RECIPE.replace("gptq", "nearest"))
    assert other.run().code == 0
    mine, nearest, stored = tensors(bench.out), tensors(other.out), tensors(bench.store)
    changed = total = 0
    for module, found in reports(bench).items():
        assert found["output_error"] <= found["output_error_nearest"]
        packed = f"{module}.weight_packed"
        assert torch.equal(mine[packed], stored[f"stats.{module}.codes"])
        assert stored[f"stats.{module}.codes"].dtype == torch.uint8
        scales = [name for name in mine if name.startswith(f"{module}.weight_") and name != packed]
        assert scales
        for name in scales:
            assert torch.equal(mine[name].view(torch.uint8), nearest[name].view(torch.uint8))
        changed += int((mine[packed] != nearest[packed]).sum())
        total += mine[packed].numel()
    assert changed > total / 10
    gains = [each["output_error"] / each["output_error_nearest"] for each in reports(bench).values()]
    assert sum(gains) < 0.85 * len(gains)
    checked = run_cli("verify", bench.out, "--against", bench.model, "--full")
    assert checked.code == 0, checked.out + checked.err


def test_verify_computes_codes_again(make: Callable[..., Bench]) -> None:
    """With the calibration; without it, they are taken as they are."""
    bench = make()
    assert bench.run().code == 0
    words = ("verify", bench.out, "--against", bench.model, "--full")
    again = run_cli(*words, "--calibration", bench.store)
    assert again.code == 0, again.out + again.err
    assert "not recomputed" not in again.out
    taken = run_cli(*words)
    assert taken.code == 0, taken.out + taken.err
    assert "codes that data chose were not recomputed in 28 modules" in taken.out


@pytest.mark.parametrize("family", ["qwen3_moe", "phi3"])
def test_families(make: Callable[..., Bench], family: str) -> None:
    """Experts, whose w1 and w3 share a scale; weights that lie in one matrix, smoothed."""
    recipe = EXPERTS
    if family == "phi3":
        recipe = EXPERTS.replace('["*.experts.*", "*.self_attn.*_proj"]', '"*_proj"').replace(
            "calibration:", "smooth: {alpha: 0.5}\ncalibration:"
        )
    bench = make(recipe, family)
    result = bench.run()
    assert result.code == 0, result.err
    mine, stored = tensors(bench.out), tensors(bench.store)
    found = reports(bench)
    better = 0
    for module, each in found.items():
        if "output_error" in each:
            assert torch.equal(mine[f"{module}.weight_packed"], stored[f"stats.{module}.codes"])
            assert each["output_error"] <= each["output_error_nearest"]
            better += each["output_error"] < 0.95 * each["output_error_nearest"]
    assert better >= 8
    assert run_cli("verify", bench.out, "--against", bench.model, "--full").code == 0


def test_modules_outside_of_the_stack(make: Callable[..., Bench]) -> None:
    bench = make(EXPERTS.replace('"*.experts.*"', "lm_head"))
    refused = bench.run()
    assert refused.code == 2
    assert "no token reached `lm_head`, and its scheme needs data" in refused.err
    bench.edit_recipe(bench.recipe.read_text().replace("length:", "uncalibrated: dynamic, length:"))
    result = bench.run("--fresh")
    assert result.code == 0, result.err
    assert tensors(bench.out)["lm_head.weight_packed"].dtype == torch.uint8


def test_siblings_in_several_layers_are_refused(make: Callable[..., Bench]) -> None:
    """Their one scale would depend on edits of a layer that comes later."""
    siblings = "siblings: ['model.layers.*(self_attn.o_proj)']\n"
    recipe = EXPERTS.replace('"*.experts.*", ', "").replace("rules:", f"{siblings}rules:")
    refused = make(recipe).run()
    assert refused.code == 2
    assert "which are in different layers" in refused.err
