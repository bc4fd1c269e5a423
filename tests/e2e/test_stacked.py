"""Experts that are stored together, from the command line: Granite in every way it can go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.header import read_header
from quantcli.planning.block import Calibrated, compute, jobs_of
from quantcli.planning.measured import Edit, Measured
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from tests.builders import tensor, write_safetensors
from tests.e2e.calibrating import (
    LENGTH,
    ROOT,
    SAMPLES,
    Bench,
    Models,
    change_tensors,
    make_bench,
)
from tests.e2e.conftest import Result, run_cli

MOE = "block_sparse_moe"
LAYER = f"model.layers.1.{MOE}"
DYNAMIC = """\
target: compressed-tensors
rules:
  - match: ["*_proj", "*.shared_mlp.*"]
    scheme: w8a8_dynamic
"""
KEPT = """\
target: compressed-tensors
rules:
  - match: "*.experts.*"
    scheme: keep
  - match: "*_proj"
    scheme: w8a8_dynamic
"""
CALIBRATED = f"""\
target: compressed-tensors
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, uncalibrated: dynamic}}
smooth: {{alpha: 0.7, within: 1}}
rules:
  - match: "*.experts.*"
    scheme: {{name: w8a8_dynamic, weight_rounding: gptq}}
  - match: "*_proj"
    scheme: {{name: w8a8_static, observer: minmax}}
"""
FAMILIES = ("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa")
RUN = ("--run", "--data", ROOT / "examples" / "evaluation.txt", "--samples", 2, "--length", 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(tmp_path: Path, models: Models) -> Callable[..., Bench]:
    def made(recipe: str, family: str = "granitemoe") -> Bench:
        recipe = recipe.replace(', "*.shared_mlp.*"', "") if family in FAMILIES[::3] else recipe
        return make_bench(tmp_path, models(family), recipe)

    return made


def verify(bench: Bench, *more: object) -> Any:
    """The JSON report of a verification that passes; its only findings are notes on stacks."""
    found = run_cli("verify", bench.out, "--full", "--against", bench.model, "--json", *more)
    assert found.code == 0, found.out + found.err
    report = found.json
    assert [f for f in report["findings"] if "stored together" not in f["what"]] == []
    return report


def checked(report: Any, name: str) -> int:
    """How many things a check looked at."""
    return int(next(check["checked"] for check in report["checks"] if check["name"] == name))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def done(result: Result) -> None:
    assert result.code == 0, result.err


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_written_one_by_one(make: Callable[..., Bench], family: str) -> None:
    """Under the names that vLLM takes, each quantized from its own rows; routers stay float."""
    bench = make(DYNAMIC, family)
    done(bench.run())
    source, out = tensors_of(bench.model), tensors_of(bench.out)
    stack = source.get(f"{LAYER}.input_linear.weight", source.get(f"{LAYER}.experts.gate_up_proj"))
    assert stack is not None
    for expert in range(8):
        for number, name in enumerate(("gate_proj", "up_proj")):
            path = f"{LAYER}.experts.{expert}.{name}"
            float_rows = stack[expert].chunk(2)[number].float()
            codes = out[f"{path}.weight"].float() * out[f"{path}.weight_scale"].float()
            assert codes.shape == (96, 64)
            assert float((codes - float_rows).norm() / float_rows.norm()) < 0.01
    assert not any(t.dim() == 3 and "conv" not in name for name, t in out.items())
    routers = [name for name in source if ".router." in name]
    assert len(routers) == 4
    assert all(torch.equal(source[name], out[name]) for name in routers)
    report = verify(bench, *RUN)
    assert checked(report, "recomputed") == len(out)
    assert checked(report, "experts") == 4 * 8 * 3
    assert report["run"]["kl"]["mean"] < 0.01


@pytest.mark.parametrize("recipe", [DYNAMIC, CALIBRATED], ids=["dynamic", "calibrated"])
def test_experts_that_are_stored_transposed(make: Callable[..., Bench], recipe: str) -> None:
    """Aria's: [in, out], gate in the first half of the columns."""
    bench = make(recipe.replace(', "*.shared_mlp.*"', ""), "aria_text")
    done(bench.run())
    source, out = tensors_of(bench.model), tensors_of(bench.out)
    path = "model.layers.2.mlp.experts"
    fc1, fc2 = (source[f"{path}.fc{number}.weight"] for number in (1, 2))
    for expert in range(8):
        expected = {"gate_proj": fc1[expert, :, :96], "up_proj": fc1[expert, :, 96:]}
        for name, columns in (expected | {"down_proj": fc2[expert]}).items():
            module = f"{path}.{expert}.{name}"
            codes = out[f"{module}.weight"].float() * out[f"{module}.weight_scale"].float()
            assert codes.shape == columns.t().shape
            if recipe == DYNAMIC:  # else columns and rows are multiplied
                assert float((codes - columns.t().float()).norm() / codes.norm()) < 0.01
    more = ("--calibration", bench.store) if recipe == CALIBRATED else ()
    report = verify(bench, *more, *RUN)
    assert checked(report, "recomputed") == len(out)
    assert (checked(report, "edits") > 0) == (recipe == CALIBRATED)
    assert report["run"]["kl"]["mean"] < 0.02


def test_a_plan_accounts_for_every_expert(make: Callable[..., Bench]) -> None:
    bench = make(DYNAMIC)
    plan = bench.run("--plan", "--json").json["plan"]
    params = sum(t.numel() for t in tensors_of(bench.model).values())
    experts = 4 * 8 * 3 * 96 * 64
    attention = 4 * (64 * 64 * 2 + 32 * 64 * 2)
    assert plan["quantized_params_pct"] == round(100 * (experts + attention) / params, 4)
    assert plan["rules"][0]["modules"] == 4 * (8 * 3 + 4)
    assert plan["bytes_before"] == 2 * params
    table = bench.run("--plan").out
    assert f"rules match names such as `model.layers.0.{MOE}.experts.0.gate_proj`" in table


@pytest.mark.parametrize("target", ["compressed-tensors", "fp8"])
@pytest.mark.parametrize("family", [*FAMILIES, "aria_text"])
def test_float_experts_are_copied_as_they_are(
    make: Callable[..., Bench], family: str, target: str
) -> None:
    scheme = "w8a8_dynamic" if target == "compressed-tensors" else "fp8_tensor"
    recipe = KEPT.replace("compressed-tensors", target).replace("w8a8_dynamic", scheme)
    bench = make(recipe, family)
    done(bench.run())
    source, out = tensors_of(bench.model), tensors_of(bench.out)
    stacks = [name for name, t in source.items() if t.dim() == 3 and "conv" not in name]
    assert len(stacks) == 8
    for name in stacks:
        assert torch.equal(out[name].view(torch.int16), source[name].view(torch.int16))
    assert not any(".experts.0." in name for name in out)
    kept = {
        entry["reason"]: entry
        for entry in bench.run("--plan", "--json", "--force").json["plan"]["kept"]
    }
    assert kept["rules.0: keep"]["tensors"] == len(stacks)
    verify(bench, *RUN)


def test_static_inputs_smoothing_and_gptq_for_single_experts(make: Callable[..., Bench]) -> None:
    bench = make(CALIBRATED)
    done(bench.run())
    report = verify(bench, "--calibration", bench.store, *RUN)
    assert checked(report, "edits") > 8  # norms, routers, v_proj and o_proj
    assert checked(report, "recomputed") == len(tensors_of(bench.out))
    calibrated = json.loads(run_cli("calibrate", *_args(bench), "--json").out)
    experts = {n: m for n, m in calibrated["modules"].items() if ".experts." in n}
    assert len(experts) == 4 * 8 * 3
    seen = {name: module for name, module in experts.items() if module["tokens"]}
    assert sum(module["tokens"] for module in seen.values()) == 4 * 3 * 2 * SAMPLES * LENGTH
    better = [m["output_error"] < m["output_error_nearest"] for m in seen.values()]
    assert sum(better) > 0.9 * len(better)


def _args(bench: Bench) -> list[object]:
    return [bench.recipe, "--model", bench.model, "--out", bench.store]


def test_an_edited_stack_is_written_expert_by_expert(
    make: Callable[..., Bench], tmp_path: Path
) -> None:
    """An edit of one expert's matrix, or codes for it, take apart the stack that it is in."""
    bench = make(KEPT)
    factors = tmp_path / "factors.safetensors"
    write_safetensors(factors, {"rows": tensor("F32", 96, fill=64)})
    (rows,), _ = read_header(factors)
    name = f"{LAYER}.experts.2.up_proj.weight"
    measured = Measured(edits={name: Edit(rows=rows)})
    plan = make_plan(load_recipe(bench.recipe), open_checkpoint(bench.model), measured)
    names = [item.source.spec.name for shard in plan.shards for item in shard.items]
    split = [n for n in names if n.startswith(f"{LAYER}.experts.")]
    assert split == [
        f"{LAYER}.experts.{e}.{p}.weight" for e in range(8) for p in ("gate_proj", "up_proj")
    ]
    assert f"{LAYER}.input_linear.weight" not in names
    assert names.count(f"{LAYER}.output_linear.weight") == 1
    assert len(names) == len(set(names))


# -- damage --------------------------------------------------------------------------------------


def _swapped(tensors: dict[str, Tensor]) -> None:
    """Gate for up, as if the halves were taken for each other."""
    for suffix in ("weight", "weight_scale"):
        gate, up = (f"{LAYER}.experts.3.{p}_proj.{suffix}" for p in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up].clone(), tensors[gate].clone()


def _another(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if f"{LAYER}.experts.3.down_proj" in n]:
        tensors[name] = tensors[name.replace(".3.", ".4.")].clone()


def _lost(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if f"{LAYER}.experts.7." in n]:
        del tensors[name]


@pytest.mark.parametrize(("damage", "check", "says"), [
    (_swapped, "sqnr", f"{LAYER}.experts.3.gate_proj"),
    (_another, "sqnr", f"{LAYER}.experts.3.down_proj"),
    (_lost, "experts", "expert 7 is missing"),
])  # fmt: skip
def test_damaged_experts_are_found(
    make: Callable[..., Bench], damage: Callable[..., None], check: str, says: str
) -> None:
    bench = make(DYNAMIC)
    done(bench.run())
    (bench.out / "model-00001-of-00001.safetensors").rename(bench.out / "model.safetensors")
    change_tensors(bench.out, damage)
    (bench.out / "model.safetensors.index.json").unlink()
    (bench.out / "quantcli_manifest.json").unlink()
    found = run_cli("verify", bench.out, "--against", bench.model, "--json")
    assert found.code == 1
    errors = [f for f in found.json["findings"] if f["severity"] == "error" and f["check"] == check]
    assert errors
    assert any(says in f"{e['what']} {e['where']}" for e in errors)


def test_a_damaged_stack_is_found(make: Callable[..., Bench]) -> None:
    bench = make(KEPT)
    done(bench.run())
    (bench.out / "model-00001-of-00001.safetensors").rename(bench.out / "model.safetensors")
    (bench.out / "model.safetensors.index.json").unlink()
    (bench.out / "quantcli_manifest.json").unlink()

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.input_linear.weight"][5, 100, 7] *= -1

    change_tensors(bench.out, damage)
    found = run_cli("verify", bench.out, "--against", bench.model, "--json")
    assert found.code == 1
    (error,) = [f for f in found.json["findings"] if f["severity"] == "error"]
    assert f"{LAYER}.experts.5.up_proj" in error["where"]  # row 4 of its 96


def test_a_changed_copy_of_a_stack_is_named_by_its_index(make: Callable[..., Bench]) -> None:
    bench = make(KEPT)
    done(bench.run())
    file = bench.out / "model-00001-of-00001.safetensors"
    stored = next(s for s in read_header(file)[0] if s.spec.name == f"{LAYER}.input_linear.weight")
    with file.open("r+b") as raw:
        raw.seek(stored.offset + 2 * (5 * 192 * 64 + 100 * 64 + 7))
        raw.write(b"\x80\x3f")  # 1 in bfloat16
    found = run_cli("verify", bench.out, "--against", bench.model, "--json")
    errors = [f for f in found.json["findings"] if f["check"] == "recomputed"]
    assert [error["where"] for error in errors] == [f"`{LAYER}.input_linear.weight`[5, 100, 7]"]
    assert errors[0]["what"].startswith("is 1; ")


def test_a_stack_is_copied_by_blocks_of_rows(make: Callable[..., Bench]) -> None:
    """Not by experts, each of which may be larger than a block."""
    bench = make(KEPT)
    plan = make_plan(load_recipe(bench.recipe), open_checkpoint(bench.model))
    sizes: dict[str, list[int]] = {}
    for shard in plan.shards:
        for job in jobs_of(shard.items):
            if len(job.item.source.spec.shape) == 3:
                for rows in compute(job, plan.target, Calibrated(), 1000):
                    ((output, _, values),) = rows.outputs
                    sizes.setdefault(output.spec.name, []).append(values.numel())
    assert len(sizes) == 8
    for found in sizes.values():
        assert max(found) <= 2 * 2 * 1000
        assert sum(found) in (8 * 192 * 64, 8 * 96 * 64)


def test_nan_in_a_stack_names_the_expert(make: Callable[..., Bench]) -> None:
    bench = make(DYNAMIC)
    bench.own_model()

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.input_linear.weight"][5, 100, 7] = float("nan")

    change_tensors(bench.model, damage)
    refused = bench.run()
    assert refused.code == 2
    assert f"`{LAYER}.experts.5.up_proj.weight`[4, 7] in model.safetensors" in refused.err


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["granitemoe", "llama4_text"])
def test_ascend_looks_up_the_set_of_a_family_that_it_does_not_list(
    make: Callable[..., Bench], family: str
) -> None:
    """The description has an entry for the set, and the plan says what would happen without it."""
    bench = make(DYNAMIC.replace("compressed-tensors", "ascend"), family)
    told = bench.run()
    done(told)
    assert f"does not list the experts of `{family}`" in " ".join((told.out + told.err).split())
    path = bench.out / "quant_model_description.json"
    description = json.loads(path.read_text())
    sets = [key for key in description if key.endswith(".experts.weight")]
    assert len(sets) >= 2
    assert {description[key] for key in sets} == {"W8A8_DYNAMIC"}
    path.write_text(json.dumps({k: v for k, v in description.items() if k != sets[0]}))
    found = run_cli("verify", bench.out, "--json")
    assert found.code == 1
    assert any(f"does not describe `{sets[0]}`" in one["what"] for one in found.json["findings"])


def test_single_experts_are_quantized_again_for_ascend(
    make: Callable[..., Bench], tmp_path: Path
) -> None:
    """They are not packed: its engine holds scales in bfloat16."""
    bench, out = make(DYNAMIC), tmp_path / "again"
    done(bench.run())
    packed = run_cli("pack", bench.out, "--target", "ascend", "--out", tmp_path / "packed")
    assert packed.code == 2
    assert "would be rounded: ascend holds it in bfloat16" in packed.err
    recipe = bench.root / "again.yaml"
    recipe.write_text(DYNAMIC.replace("compressed-tensors", "ascend"))
    done(run_cli("quantize", recipe, "--model", bench.out, "--out", out))
    done(run_cli("verify", out, "--full"))


def test_a_quantized_model_is_quantized_again(make: Callable[..., Bench], tmp_path: Path) -> None:
    """Decoded experts go through the replay like any others."""
    bench = make(DYNAMIC)
    done(bench.run())
    recipe = bench.root / "again.yaml"
    recipe.write_text(CALIBRATED)
    again = tmp_path / "again"
    done(run_cli("quantize", recipe, "--model", bench.out, "--out", again))
    found = run_cli("verify", again, "--full", "--against", bench.out, "--json", *RUN).json
    assert [f for f in found["findings"] if f["severity"] == "error"] == []
    assert len(found["modules"]) == 4 * (8 * 3 + 4)


def test_a_router_is_not_quantized(make: Callable[..., Bench]) -> None:
    bench = make(DYNAMIC.replace('"*_proj"', '"*_proj", "*.router.layer"'))
    refused = bench.run()
    assert refused.code == 2
    assert "the engine builds routers as float" in refused.err
    assert f"`model.layers.0.{MOE}.router.layer`" in refused.err


def test_other_stacks_are_refused_with_what_to_add(make: Callable[..., Bench]) -> None:
    bench = make(DYNAMIC)
    bench.own_model()
    config = bench.model / "config.json"
    config.write_text(config.read_text().replace('"granitemoe"', '"other_moe"'))
    refused = bench.run()
    assert refused.code == 2
    assert "experts are stored as one 3-D tensor [8, 192, 64]" in refused.err
    assert "add an entry for it to EXPERTS" in refused.err


def test_outliers_are_of_single_experts(make: Callable[..., Bench]) -> None:
    bench = make(DYNAMIC)
    found = run_cli("inspect", bench.model, "--outliers", "--json").json
    names = [module["module"] for module in found["modules"] if ".experts." in module["module"]]
    assert len(names) == 4 * 8 * 3
