"""Target gptq end to end: rows in columns, to disk and back, whatever the blocks, workers and stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.commands import quantize as commands
from quantcli.convert import shards
from quantcli.planning import block
from tests.e2e.calibrating import LENGTH, SAMPLES, Models, make_bench
from tests.e2e.conftest import Box, Faults, Killed, make_llama, run_cli, snapshot
from tests.e2e.test_pack import pack, there_and_back
from tests.tiny_models import make_tiny

RECIPE = """\
target: {target}
rules:
  - match: "*.0.self_attn.*"
    scheme: keep
  - match: "*.down_proj"
    scheme: w8a16
  - match: "*.o_proj"
    scheme: {{name: w4a16, group_size: channel}}
  - match: "*_proj"
    scheme: {{name: w4a16, group_size: 32}}
"""
MIXED = RECIPE.format(target="gptq")
SHARDED = ("--set", "max_shard=30000")


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A llama of two layers, 64 columns wide."""
    model = make_llama(tmp_path / "model", layers=2, side=64)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (tmp_path / "recipe.yaml").write_text(MIXED)
    return Box(tmp_path, model, tmp_path / "recipe.yaml", tmp_path / "out")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the rows of a job and of a block, of a matrix with 64 columns."""

    def set_rows(job: int, rows: int) -> None:
        monkeypatch.setattr(block, "JOB_BYTES", job * 64 * 2)
        monkeypatch.setattr(block, "BLOCK_ELEMENTS", rows * 64)
        real = block.compute

        def compute(job, target, calibrated):  # type: ignore[no-untyped-def]
            return real(job, target, calibrated, rows * 64)

        monkeypatch.setattr(
            shards, "compute", lambda job, target, given, _: compute(job, target, given)
        )

    return set_rows


def files_of(folder: Path) -> dict[str, str]:
    return {k: v for k, v in snapshot(folder).items() if k != "quantcli_manifest.json"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint of one file."""
    (file,) = folder.glob("*.safetensors")
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


def test_blocks_jobs_and_workers_change_nothing(box: Box, small: Callable[[int, int], None]) -> None:
    assert box.run(*SHARDED, "--workers", 1).code == 0
    wanted = files_of(box.out)
    assert sum(name.endswith(".safetensors") for name in wanted) > 2
    assert "quantize_config.json" in wanted
    for job, rows, workers in ((8, 8, 1), (24, 8, 4), (40, 16, 3), (64, 1, 2)):
        small(job, rows)
        out = box.root / f"{job}-{rows}-{workers}"
        assert Box(box.root, box.model, box.recipe, out).run(*SHARDED, "--workers", workers).code == 0
        assert files_of(out) == wanted
        checked = run_cli("verify", out, "--full", "--against", box.model, "--workers", workers)
        assert checked.code == 0, checked.out


def test_memory_of_gathered_columns_is_estimated(box: Box, small: Callable[[int, int], None]) -> None:
    """A worker holds the columns of one job: those of 8 rows, or of the whole of the largest weight."""
    plan = commands.plan(box.recipe, model=str(box.model), out=box.out).plan
    whole = shards.memory_estimate(plan, 3)
    small(8, 8)
    few = shards.memory_estimate(plan, 3)
    columns = [
        sum(output.spec.nbytes for output in item.outputs if output.axis)
        for shard in plan.shards
        for item in shard.items
    ]
    assert max(columns) == 128 * 64 + 64 * 2 + 64  # down_proj: int8 codes, scales, zero points
    assert 0 < 3 * max(columns) - (whole - few) < 3 * max(columns) / 4


def test_columns_hold_the_rows_of_the_other_format(box: Box, small: Callable[[int, int], None]) -> None:
    """Code by code and scale by scale what compressed-tensors has, transposed."""
    small(24, 8)
    assert box.run().code == 0
    other = Box(box.root, box.model, box.root / "other.yaml", box.root / "other")
    other.edit_recipe(RECIPE.format(target="compressed-tensors"))
    assert other.run().code == 0
    ours, theirs = tensors(box.out), tensors(other.out)
    seen = 0
    for name, packed in theirs.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            assert torch.equal(ours[f"{module}.qweight"], packed.T), module
            assert torch.equal(ours[f"{module}.scales"], theirs[f"{module}.weight_scale"].T)
            seen += 1
        elif ".weight_" not in name:
            assert torch.equal(ours[name], packed)
    assert seen == 10
    negative = [bool((t < 0).any()) for n, t in ours.items() if n.endswith(".scales")]
    assert sum(negative) >= 7


ALL_OF = 'target: {{target}}\nrules: [{{{{match: "*_proj", scheme: {}}}}}]\n'
INT4, INT8 = ALL_OF.format("{{name: w4a16, group_size: 32}}"), ALL_OF.format("w8a16")


@pytest.mark.parametrize(
    ("home", "recipe"),
    [("gptq", RECIPE), ("gptq", INT4), ("compressed-tensors", INT4), ("compressed-tensors", INT8)],
    ids=["mixed", "gptq", "int4", "int8"],
)
def test_there_and_back(box: Box, small: Callable[[int, int], None], home: str, recipe: str) -> None:
    """Lossless in both directions, scales of both signs included; also in small blocks."""
    box.edit_recipe(recipe.format(target=home))
    assert box.run(*SHARDED).code == 0
    small(24, 8)
    away = {"gptq": "compressed-tensors", "compressed-tensors": "gptq"}[home]
    there = there_and_back(box.out, away, home)
    checked = run_cli("verify", there, "--full", "--against", box.model)
    assert checked.code == 0, checked.out
    assert "recomputed" in checked.out
    assert run_cli("verify", there, "--full", "--against", box.out).code == 0


def test_there_and_back_of_several_kinds(box: Box) -> None:
    """Weight files byte for byte; the order of groups in config.json is that of the files."""
    box.edit_recipe(RECIPE.format(target="compressed-tensors"))
    assert box.run(*SHARDED).code == 0
    there, back = box.root / "there", box.root / "back"
    assert pack(box.out, "gptq", there).code == 0
    assert pack(there, "compressed-tensors", back).code == 0
    before, after = snapshot(box.out), snapshot(back)
    files = [name for name in before if name.endswith((".safetensors", ".index.json"))]
    assert len(files) > 3
    assert all(before[name] == after[name] for name in files)
    assert run_cli("verify", back, "--full", "--against", box.model).code == 0


def test_other_formats_refuse_negative_scales(box: Box) -> None:
    box.edit_recipe('target: gptq\nrules: [{match: "*_proj", scheme: w8a16}]\n')
    assert box.run().code == 0

    def negate(found: dict[str, torch.Tensor]) -> None:
        for name in found:
            if name.endswith(".scales"):
                found[name][:, ::2] *= -1

    change_tensors(box.out, negate)
    assert pack(box.out, "compressed-tensors", box.root / "there").code == 0
    result = pack(box.out, "ascend", box.root / "ascend")
    assert result.code == 2
    assert "ascend is not known to take negative scales" in result.err
    assert ".scales`[:, 0]" in result.err


@pytest.mark.parametrize("nth", [3, 9, 20, 31, 44, 60])
def test_a_stopped_run_goes_on(box: Box, small: Callable[[int, int], None], nth: int) -> None:
    small(24, 8)
    other = Box(box.root, box.model, box.recipe, box.root / "undisturbed")
    assert other.run(*SHARDED, "--workers", 1).code == 0
    faults = Faults(box.root, nth, Killed, sticky=False)
    with faults.armed(), pytest.raises(Killed):
        box.run(*SHARDED, "--workers", 1)
    assert faults.fired
    assert not box.out.exists()
    assert box.run(*SHARDED, "--workers", 1).code == 0
    assert snapshot(box.out) == snapshot(other.out)


def test_parts_make_what_one_run_writes(box: Box) -> None:
    other = Box(box.root, box.model, box.recipe, box.root / "whole")
    assert other.run(*SHARDED).code == 0
    for number in (1, 2, 3):
        assert box.run(*SHARDED, "--part", f"{number}/3").code == 0
    folders = [box.out.with_name(f"out.part-{number}-of-3") for number in (1, 2, 3)]
    assert run_cli("pack", "--merge", *folders, "--out", box.out).code == 0
    assert snapshot(box.out) == snapshot(other.out)


def test_its_checkpoints_are_sources(box: Box) -> None:
    """Kinds by name: `dynamic` tells the bits and groups of each module."""
    assert box.run().code == 0
    recipe = box.root / "int8.yaml"
    recipe.write_text('target: ascend\nrules: [{match: "*_proj", scheme: w8a8_dynamic}]\n')
    again = box.root / "again"
    made = run_cli("quantize", recipe, "--model", box.out, "--out", again)
    assert made.code == 0, made.err
    assert "decoded from gptq int4 in groups of 32" in made.out
    checked = run_cli("verify", again, "--full", "--against", box.out)
    assert checked.code == 0, checked.out


def test_a_side_that_words_do_not_divide_is_refused_before_work(box: Box) -> None:
    model = make_llama(box.root / "odd", side=36)
    box.edit_recipe('target: gptq\nrules: [{match: "*_proj", scheme: w8a16}]\n')
    assert run_cli("quantize", box.recipe, "--model", model, "--out", box.out).code == 0
    box.edit_recipe(
        'target: gptq\nrules: [{match: "*_proj", scheme: {name: w4a16, group_size: channel}}]\n'
    )
    other = box.out.with_name("other")
    result = run_cli("quantize", box.recipe, "--model", model, "--out", other, "--plan")
    assert result.code == 2
    assert "packs 8 columns together; there are 36" in result.err


def test_experts_and_float_experts(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "moe", "qwen3_moe")
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    scheme = "{name: w4a16, group_size: 32}"
    for experts in (scheme, "keep"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f'target: gptq\nrules:\n  - {{match: "*.experts.*", scheme: {experts}}}\n'
            f'  - {{match: "*_proj", scheme: {scheme}}}\n'
        )
        out = tmp_path / f"out-{experts == 'keep'}"
        assert run_cli("quantize", recipe, "--model", model, "--out", out).code == 0
        checked = run_cli("verify", out, "--full", "--against", model)
        assert checked.code == 0, checked.out
        names = [n for n in tensors(out) if n.endswith("experts.0.up_proj.qweight")]
        assert bool(names) == (experts != "keep")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def test_codes_that_data_chose(tmp_path: Path, models: Models) -> None:
    """Calibrated: verified with the calibration, and without it by the stored codes."""
    recipe = (
        f"target: gptq\ncalibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}}}\n"
        'rules: [{match: "*_proj", scheme: {name: w4a16, group_size: 32, weight_rounding: gptq}}]\n'
    )
    bench = make_bench(tmp_path, models("qwen3"), recipe)
    result = bench.run()
    assert result.code == 0, result.err
    checked = run_cli("verify", bench.out, "--against", bench.model, "--full")
    assert checked.code == 0, checked.out + checked.err
    assert "codes that data chose were not recomputed" in checked.out
    again = run_cli(
        "verify", bench.out, "--against", bench.model, "--full", "--calibration", bench.store
    )
    assert again.code == 0, again.out + again.err
    assert "not recomputed" not in again.out
    name = next(n for n in tensors(bench.out) if n.endswith("up_proj.qweight"))

    def harm(found: dict[str, torch.Tensor]) -> None:
        found[name][1, 17] ^= 1 << 20

    change_tensors(bench.out, harm)
    worse = run_cli(
        "verify", bench.out, "--against", bench.model, "--full", "--calibration", bench.store
    )
    assert worse.code == 1
    assert f"`{name}`[1, 17]" in worse.out
