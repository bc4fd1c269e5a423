"""Conversions from end to end, on tiny models of several families."""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.spec import torch_dtype
from quantcli.commands import quantize as commands
from quantcli.commands.job import JobOptions
from quantcli.convert.execute import RunOptions, execute
from quantcli.convert.folder import LocalFolder
from quantcli.core.errors import InputError
from quantcli.planning.plan import Copy, Quantize
from tests.builders import make_model, tensor
from tests.families import FAMILIES, make_family, shapes

ROOT = Path(__file__).parents[2]
RECIPES = ("w8a8_dynamic", "fp8_dynamic", "w8a16")


def convert(recipe, model, out, *sets, **options):
    job = commands.plan(
        ROOT / "recipes" / f"{recipe}.yaml",
        model=str(model),
        out=out,
        overrides=sets,
        options=JobOptions(**options),
    )
    commands.quantize(job)
    return job


def loaded(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def combinations():
    for family in FAMILIES:
        for recipe in RECIPES:
            if recipe != "w8a16" or not any("experts." in name for name in shapes(family)):
                yield family, recipe


@pytest.mark.parametrize(("family", "recipe"), list(combinations()))
def test_plan_is_what_is_written(tmp_path, family, recipe):
    model = make_family(tmp_path / "model", family)
    job = convert(recipe, model, tmp_path / "out", "max_shard=20000")
    plan, source, written = job.plan, loaded(model), loaded(tmp_path / "out")
    assert len(plan.shards) > 3

    # every source tensor is consumed exactly once
    consumed = [item.source.spec.name for shard in plan.shards for item in shard.items]
    assert sorted(consumed) == sorted(source)

    # headers on disk are the plan's, and the index lists them
    checkpoint = open_checkpoint(tmp_path / "out")
    planned = {spec.name: spec for shard in plan.shards for spec in shard.tensors}
    assert {s.name: s for s in checkpoint.specs()} == planned
    assert [(s.file, s.nbytes) for s in plan.shards] == [
        (name, (tmp_path / "out" / name).stat().st_size) for name in checkpoint.shards
    ]

    # copies are equal; codes are what the scheme gives on the whole matrix
    for item in (item for shard in plan.shards for item in shard.items):
        name = item.source.spec.name
        if isinstance(item, Copy):
            assert torch.equal(written[name], source[name])
        else:
            parts = item.scheme.quantize(source[name], torch_dtype(item.engine_dtypes.weight_scale))
            for part, tensor in parts.items():
                assert torch.equal(written[f"{item.module}.{part}"].float(), tensor.float())

    # every .weight is described, and nothing is described that is not there but what the engine asks
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert set(written) <= description.keys()
    extra = {k for k in description if k.endswith(".weight")} - set(written)
    only_looked_up = ("lm_head.weight", ".experts.weight", "qkv_proj.weight", "gate_up_proj.weight")
    assert all(name.endswith(only_looked_up) for name in extra), extra


def test_what_families_keep_and_quantize(tmp_path):
    names = {}
    for family in FAMILIES:
        model = make_family(tmp_path / family, family)
        job = commands.plan(ROOT / "recipes/w8a8_dynamic.yaml", model=str(model), out=tmp_path / "o")
        names[family] = {
            item.module.split("layers.")[-1]
            for shard in job.plan.shards
            for item in shard.items
            if isinstance(item, Quantize)
        }
    assert len(names["llama"]) == 14
    assert not any("visual" in name for name in names["vlm"])
    assert {n.rpartition(".")[2] for n in names["mixtral"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3",
    }  # fmt: skip
    deepseek = {n.rpartition(".")[2] for n in names["deepseek_v3"]}
    assert {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"} <= deepseek
    assert not deepseek & {"kv_b_proj", "gate", "eh_proj"}
    assert "shared_expert_gate" not in {n.rpartition(".")[2] for n in names["qwen2_moe"]}


def test_same_bytes_for_any_workers_block_path_and_run(tmp_path):
    model = make_family(tmp_path / "model", "qwen3_moe")
    seen = set()
    for number, (workers, block) in enumerate(
        [(1, 2**19), (2, 2**19), (8, 2**19), (2, 100), (3, 1000)]
    ):
        out = tmp_path / f"{number}" / ("deep/" * number) / "out"
        job = commands.plan(
            ROOT / "recipes/w8a8_dynamic.yaml",
            model=str(model),
            out=out,
            overrides=("max_shard=30000",),
        )
        execute(job.plan, LocalFolder(out), RunOptions(workers, block_elements=block))
        seen.add(json.dumps(hashes(out)))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("dtype", "serving"),
    [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "bfloat16")],
)
def test_source_dtypes(tmp_path, dtype, serving):
    model = make_family(tmp_path / "model", "llama", dtype=dtype)
    job = convert("w8a8_dynamic", model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == serving
    assert any("float32" in note for note in job.plan.notes) == (dtype == torch.float32)
    written, source = loaded(tmp_path / "out"), loaded(model)
    name = "model.layers.0.mlp.up_proj.weight"
    scale = written[f"{name}_scale"]
    assert torch.equal(scale, scale.to(getattr(torch, serving)).float())
    error = (written[name].double() * scale.double() - source[name].double()).abs()
    assert bool((error <= scale.double() / 2 * (1 + 2**-23)).all())
    assert written["model.norm.weight"].dtype == dtype


def test_source_files_go_along_byte_for_byte(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    extras = {
        "tokenizer.model": b"\x00\x01", "chat_template.jinja": b"{{x}}", "modeling_x.py": b"x = 1\n",
        "unheard_of.xyz": b"?", "assets/logo.png": b"png", "1_Pooling/config.json": b"{}",
    }  # fmt: skip
    for name, content in extras.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)
        (model / name).chmod(0o600)
    stale = ["pytorch_model.bin", "hf_quant_config.json", "quant_model_description.json", "x.gguf"]
    for name in stale:
        (model / name).write_bytes(b"{}")
    job = convert("w8a8_dynamic", model, tmp_path / "out")
    for name, content in extras.items():
        assert (tmp_path / "out" / name).read_bytes() == content
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o644
    assert {n for n in stale if (tmp_path / "out" / n).exists()} == {"quant_model_description.json"}
    for name in stale:
        assert any(f"`{name}`" in note for note in job.plan.notes)
    assert (tmp_path / "out/config.json").read_bytes() == (model / "config.json").read_bytes()


def test_manifest_accounts_for_every_file(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    job = convert("w8a8_dynamic", model, tmp_path / "out")
    text = (tmp_path / "out" / "quantcli_manifest.json").read_text()
    manifest = json.loads(text)
    actual = hashes(tmp_path / "out")
    del actual["quantcli_manifest.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == actual
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (tmp_path / "out" / name).stat().st_size
    assert manifest["plan"] == job.plan.digest
    assert manifest["source"]["fingerprint"] == open_checkpoint(model).fingerprint
    assert str(tmp_path) not in text


def test_without_checksum_the_weights_are_the_same(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    convert("w8a8_dynamic", model, tmp_path / "a")
    convert("w8a8_dynamic", model, tmp_path / "b", checksum=False)
    a, b = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    assert a.pop("quantcli_manifest.json") != b.pop("quantcli_manifest.json")
    assert a == b
    manifest = json.loads((tmp_path / "b" / "quantcli_manifest.json").read_text())
    assert all("sha256" not in entry for entry in manifest["files"].values())


def test_the_effective_recipe_makes_the_same_plan(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    job = convert("w8a8_dynamic", model, tmp_path / "out", "rules.0.scheme=fp8_dynamic")
    again = commands.plan(
        tmp_path / "out" / "quantcli_recipe.yaml", model=str(model), out=tmp_path / "again"
    )
    assert again.plan.digest == job.plan.digest


def test_mixed_schemes_are_described_per_module(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "target: ascend\nrules:\n"
        "  - {match: '*.0.mlp.*', scheme: keep}\n"
        "  - {match: '*.mlp.*', scheme: w8a8_dynamic}\n"
        "  - {match: 're:.*self_attn\\.[qkvo]_proj', scheme: w8a16}\n"
    )
    job = commands.plan(recipe, model=str(model), out=tmp_path / "out")
    commands.quantize(job)
    table = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    kinds = {k: v for k, v in table.items() if k.endswith("_proj.weight")}
    assert {v for k, v in kinds.items() if ".0.mlp." in k} == {"FLOAT"}
    assert {v for k, v in kinds.items() if ".1.mlp." in k} == {"W8A8_DYNAMIC"}
    assert {v for k, v in kinds.items() if "self_attn" in k} == {"W8A16"}
    assert [(line.modules, line.label) for line in job.plan.rules] == [
        (3, "W8A8_DYNAMIC"),
        (8, "W8A16"),
    ]
    assert job.plan.kept[-1].reason == "rules.0: keep"


def test_plan_reads_no_weights(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    file = model / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size
    with file.open("r+b") as handle:  # a sparse file of the right size, with no data at all
        handle.truncate(header)
        handle.truncate(size)
    job = commands.plan(ROOT / "recipes/w8a8_dynamic.yaml", model=str(model), out=tmp_path / "out")
    assert job.plan.quantized_modules == 14
    assert not (tmp_path / "out.partial").exists()


def notes(recipe, model, out, *sets):
    return commands.plan(recipe, model=str(model), out=out, overrides=sets).plan.notes


def test_what_deserves_a_word_is_said(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    recipe = ROOT / "recipes/w8a8_dynamic.yaml"
    assert notes(recipe, model, tmp_path / "out") == ()
    nothing = ("rules.0.scheme=keep", "expect.quantizable_pct=< 1")
    (word,) = notes(recipe, model, tmp_path / "out", *nothing)
    assert "nothing is quantized" in word
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(config))
    (word,) = notes(recipe, model, tmp_path / "out")
    assert word == "`quantization_config` in config.json is stale: the weights are float"
    job = convert("w8a8_dynamic", model, tmp_path / "out", "verify.min_sqnr=20")
    assert not any("verify" in note for note in job.plan.notes), "it is for another command"
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_transposed_weights_are_refused(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(InputError, match="stored transposed"):
        commands.plan(ROOT / "recipes/w8a8_dynamic.yaml", model=str(model), out=tmp_path / "out")
    (model / "config.json").write_text(json.dumps({**config, "model_type": ["gpt2"]}))
    with pytest.raises(InputError, match="`model_type` should be text, not a list"):
        commands.plan(ROOT / "recipes/w8a8_static.yaml", model=str(model), out=tmp_path / "out")


def test_experts_that_stay_float_are_described_by_their_set_too(tmp_path):
    model = make_family(tmp_path / "model", "mixtral")
    convert("w8a16", model, tmp_path / "out", "rules.0.role=attention", "expect.quantizable_pct=>= 1")
    table = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    asked = {k: v for k, v in table.items() if k.endswith(".experts.weight")}
    assert asked == {f"model.layers.{n}.block_sparse_moe.experts.weight": "FLOAT" for n in (0, 1)}


def test_planning_does_not_import_a_compiler():
    # binary operations on the meta device would: 70 MB and a second for every command
    code = (
        "import sys; from quantcli.commands.inspect import support; support();"
        "sys.exit('sympy' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_a_reader_that_has_gone_does_not_stop_the_work(tmp_path, command):
    model = make_family(tmp_path / "model", "llama")
    out = tmp_path / "out"
    words = {
        "inspect": ["inspect", str(model)],
        "quantize": ["quantize", "recipes/w8a8_dynamic.yaml", "--model", str(model), "--out", str(out)],
    }[command]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "quantcli", *words],
        stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, check=False, text=True,
    )  # fmt: skip
    os.close(writer)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert out.exists() == (command == "quantize")


@pytest.mark.parametrize("shape", [(4, 64), (4, 3), (8,), (2, 5, 2), (3_000_000,)])
def test_elements_of_half_a_byte_are_copied(tmp_path, shape):
    """A row may end within a byte, so that rows cannot be copied."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    count = math.prod(shape) // 2
    data = random.Random(count).randbytes(count)
    model = make_model(
        tmp_path / "m",
        {
            "model.safetensors": {
                "model.layers.0.self_attn.q_proj.weight": tensor("BF16", 16, 16),
                "model.t": ("F4", shape, data),
            }
        },
        config=config,
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('target: compressed-tensors\nrules: [{match: "*q_proj", scheme: w8a8_dynamic}]\n')
    job = commands.plan(recipe, model=str(model), out=tmp_path / "out", options=JobOptions(workers=2))
    commands.quantize(job)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])["model.t"]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    assert (entry["dtype"], entry["shape"], raw[begin:end]) == ("F4", list(shape), data)
