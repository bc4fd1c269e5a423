"""No false alarm: whatever quantcli writes, and what the reference producer does, is found sound."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from quantcli.commands.quantize import plan, quantize
from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.tiny_models import make_tiny

DENSE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "olmo2", "stablelm",
         "multimodal")  # fmt: skip
EXPERTS = ("deepseek_v3", "qwen3_moe", "mixtral")
NAMED = ("names:qwen2_tied", "names:qwen2_moe", "names:vlm", "names:deepseek_v3")
SMALL = "max_shard=60KB"

CASES = [
    *((family, "w8a8_dynamic", SMALL) for family in (*DENSE, *EXPERTS, *NAMED)),
    *((family, "fp8_dynamic") for family in ("qwen2", "gemma2", "phi3", "multimodal", *EXPERTS)),
    *((family, "w8a16") for family in DENSE),
    *((family, "w8a8_moe_dynamic") for family in (*EXPERTS, "names:qwen2_moe")),
    *((family, "w8a8_static") for family in ("llama", "qwen2", "gemma3", "phi3", "multimodal")),
    *((family, "w8a8_static_smooth", SMALL) for family in (
        "llama", "qwen2", "qwen3", "gemma3", "phi3", "multimodal")),
    *((family, "w8a8_moe") for family in EXPERTS),
    *((family, "static", SMALL) for family in ("qwen2", "mistral", "llama:float16")),
    *((family, "mix") for family in ("qwen2", "stablelm", "llama:float16")),
    *((family, "smooth") for family in ("qwen2", "gemma2", "llama:float16")),
    *((family, "mixed") for family in ("llama", "gemma2", "qwen2")),
    ("qwen3_moe", "w4a8_experts"), ("qwen3_moe", "w4a16_experts"),
    ("qwen3", "int4"), ("llama", "symmetric"), ("llama", "head"), ("multimodal", "mlp"),
    ("llama:float32", "w8a8_dynamic"),
    ("llama:float16", "w8a8_dynamic"), ("llama", "w8a8_dynamic", "max_shard=1MB"),
    ("llama", "w8a8_dynamic", "max_shard=20KB"),
]  # fmt: skip
GOLDEN = ("w8a8_dynamic", "w8a8_static", "w4a8_dynamic", "w8a8_mxfp8", "w4a4_flatquant_dynamic",
          "w8a8_fp8_dynamic")  # fmt: skip
# The only notes there may be, by the reason for them.
NO_TOKENIZER = "there is no tokenizer, and the source had none"
NO_MANIFEST = "there is no quantcli_manifest.json: sizes and hashes of files are not known"
NO_HASHES = "the manifest holds no hashes: it was written with --no-checksum"
FOREIGN_INDEX = "engines read no index of this name, only model.safetensors.index.json"
OLD_W4A8 = "no known engine loads this: from 2026-08 on, W4A8_DYNAMIC is for experts alone"


def examine(good):
    """All that verification says of a checkpoint, at every depth but --run."""
    report = verify(VerifyOptions(good.path, full=True, against=str(good.source)))
    assert report.depths == ["structure", "full", "against"]
    assert [f for f in report.findings if f.severity == "error"] == []
    assert report.modules
    assert report.format == "ascend"
    return [finding.what for finding in report.findings]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_own(stock, case):
    assert examine(stock.good(*case)) == []


def test_without_hashes(stock):
    assert examine(stock.good("llama", "w8a8_dynamic", checksum=False)) == [NO_HASHES]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(stock, name):
    notes = examine(stock.golden(name))
    assert notes[0] == NO_MANIFEST
    assert [note[: len(OLD_W4A8)] for note in notes[1:]] == [OLD_W4A8] * (name == "w4a8_dynamic")


def halve_and_double(tensors):
    """One row of v in two layers, and one channel of both norms of the first: what reads it doubles."""
    for layer in ("model.layers.0", "model.layers.1"):
        tensors[f"{layer}.self_attn.v_proj.weight"][3] /= 2
        tensors[f"{layer}.self_attn.o_proj.weight"][:, 3] *= 2
    layer = "model.layers.0"
    for norm, readers in (
        ("input_layernorm", [f"self_attn.{letter}_proj" for letter in "qkv"]),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ):
        tensors[f"{layer}.{norm}.weight"][5] /= 2
        for reader in readers:
            tensors[f"{layer}.{reader}.weight"][:, 5] *= 2


def converted(tmp_path, scheme, **sizes):
    """The report on a quantized model with these edits, against the model without them."""
    model = make_tiny(tmp_path / "model", "llama", num_key_value_heads=4, **sizes)
    edited = shutil.copytree(model, tmp_path / "edited")
    tensors = load_file(edited / "model.safetensors")
    halve_and_double(tensors)
    save_file(tensors, edited / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'target: compressed-tensors\nrules: [{{match: "*_proj", scheme: {scheme}}}]\n')
    quantize(plan(recipe, model=str(edited), out=tmp_path / "out"))
    (tmp_path / "out" / "quantcli_manifest.json").unlink()  # it names the edited model
    return verify(VerifyOptions(tmp_path / "out", full=True, against=str(model)))


def test_edits_under_the_noise_of_4_bits(tmp_path):
    report = converted(tmp_path, "w4a16", hidden_size=256, head_dim=64, intermediate_size=256)
    assert [finding.what for finding in report.errors] == []
    edits = {module.module.removeprefix("model.layers."): module.edited for module in report.modules}
    assert edits["0.self_attn.v_proj"] == "1 rows x 0.5..0.5, 1 columns x 2..2"
    assert edits["0.self_attn.o_proj"] is None  # no fit sees its column


def test_edits_of_one_row_and_the_same_of_two_norms(tmp_path):
    """One row in many moves no weight's SQNR below its limit. Both norms have the same factors."""
    report = converted(tmp_path, "w8a8_dynamic")
    assert [finding.what for finding in report.errors] == []
    edits = {module.module.removeprefix("model.layers."): module.edited for module in report.modules}
    assert edits["0.self_attn.v_proj"] == "1 rows x 0.5..0.5, 1 columns x 2..2"
    assert edits["1.self_attn.v_proj"] == "1 rows x 0.5..0.5"
    columns = [name for name, edit in edits.items() if edit == "1 columns x 2..2"]
    readers = ("mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{letter}_proj" for letter in "kqo"))
    assert sorted(columns) == sorted([*(f"0.{reader}" for reader in readers), "1.self_attn.o_proj"])


@pytest.mark.parametrize(("family", "place", "what"), [
    ("llama", "layers", "layer 3 is missing"), ("qwen3_moe", "experts", "expert 8 is missing"),
])  # fmt: skip
def test_a_huge_number_in_a_name_takes_neither_memory_nor_time(tmp_path, family, place, what):
    """A name of a few bytes must not make up more layers or experts than there are."""
    model = make_tiny(tmp_path / "model", family)
    file = next(model.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if f".{place}.0." in name and name.endswith("up_proj.weight"))
    tensors[name.replace(f"{place}.0", f"{place}.{10**20}")] = tensors[name].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text())
    config.pop("num_hidden_layers")  # which would contradict the name
    (model / "config.json").write_text(json.dumps(config))
    few = ("expect.quantizable_pct=>= 1",)
    quantize(plan("w8a8_dynamic", model=str(model), out=tmp_path / "out", overrides=few))
    report = verify(VerifyOptions(tmp_path / "out"))
    assert what in [f.what for f in report.findings if f.check == place]
