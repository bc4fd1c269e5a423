"""vLLM's loader of experts puts each matrix of a split stack where the float stack has it."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.conftest import CT, convert
from tests.engine.harness import PYTHON, ROOT, kept_environment
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.engine

RULES = [{"match": "*_proj", "scheme": "w8a8_dynamic"}]
E, H = 8, 64
TRANSPOSED = ("aria_text", "qwen3_vl_moe", "llama4_text")
LOADERS = {"llama4_text": "llama4", "step3p7": "step3p5"}  # of their own


def shapes(width):
    return {
        "w13_weight": (E, 2 * width, H), "w13_weight_scale": (E, 2 * width, 1),
        "w2_weight": (E, H, width), "w2_weight_scale": (E, H, 1),
    }  # fmt: skip


DTYPES = {name: "float32" if "scale" in name else "int8" for name in shapes(1)}


@pytest.mark.parametrize(("family", "layer", "experts", "gated", "down"), [
    ("granitemoe", "model.layers.1", "block_sparse_moe.experts",
     "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    ("aria_text", "model.layers.1", "mlp.experts", "mlp.experts.fc1.weight",
     "mlp.experts.fc2.weight"),
    ("gemma4_text", "model.layers.1", "experts", "experts.gate_up_proj", "experts.down_proj"),
    ("qwen3_5_moe", "model.language_model.layers.1", "mlp.experts", "mlp.experts.gate_up_proj",
     "mlp.experts.down_proj"),
    ("qwen3_vl_moe", "model.language_model.layers.1", "mlp.experts", "mlp.experts.gate_up_proj",
     "mlp.experts.down_proj"),
    ("llama4_text", "model.layers.1", "feed_forward.experts", "feed_forward.experts.gate_up_proj",
     "feed_forward.experts.down_proj"),
    ("step3p7", "model.layers.1", "moe.experts", "", "moe.down_proj.weight"),
])  # fmt: skip
def test_the_loader_takes_single_experts(environment, tmp_path, family, layer, experts, gated, down):
    transposed = family in TRANSPOSED
    model = make_tiny(tmp_path / "model", family)
    out = convert(tmp_path / "out", model, CT, RULES)
    request, loaded = tmp_path / "request.json", tmp_path / "loaded.safetensors"
    width = load_file(model / "model.safetensors")[f"{layer}.{down}"].shape[1 if transposed else 2]
    assert width == (96 if family in ("granitemoe", "aria_text") else 48)
    asked = {"folder": str(out), "experts": f"{layer}.{experts}", "transposed": transposed,
             "shapes": shapes(width), "dtypes": DTYPES, "loader": LOADERS.get(family)}  # fmt: skip
    request.write_text(json.dumps(asked))
    script = ROOT / "tests" / "engine" / "load_experts.py"
    done = subprocess.run(
        [PYTHON, script, request, loaded], env=kept_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, source = load_file(loaded), load_file(model / "model.safetensors")
    if gated:
        first = source[f"{layer}.{gated}"]
    else:
        first = torch.cat([source[f"{layer}.moe.{name}_proj.weight"] for name in ("gate", "up")], 1)
    for name, stack in (("w13", first), ("w2", source[f"{layer}.{down}"])):
        expected = (stack.mT if transposed else stack).float()
        served = found[f"{name}_weight"].float() * found[f"{name}_weight_scale"]
        assert served.shape == expected.shape
        rows = (served - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert 1e-4 < float(rows.mean()) < 0.01  # NaN if a parameter was not filled
        assert float(rows.max()) < 0.02


def test_the_loader_takes_int4_experts(environment, tmp_path):
    """Of the checkpoint for two engines: one code in a byte, scales in bfloat16, int8 next to them."""
    model = make_tiny(tmp_path / "model", "qwen3_moe")
    rules = [
        {"match": "*.experts.*", "scheme": {"name": "w4a8", "group_size": "channel"}},
        {"match": "*_proj", "scheme": "w8a8_dynamic"},
    ]
    out = convert(tmp_path / "out", model, CT, rules)
    source = load_file(model / "model.safetensors")
    experts = "model.layers.1.mlp.experts"
    single = {side: [source[f"{experts}.{e}.{side}_proj.weight"].float() for e in range(E)]
              for side in ("gate", "up", "down")}  # fmt: skip
    width = len(single["gate"][0])
    dtypes = DTYPES | {name: "bfloat16" for name in DTYPES if "scale" in name}
    request, loaded = tmp_path / "request.json", tmp_path / "loaded.safetensors"
    asked = {"folder": str(out), "experts": experts, "transposed": False, "shapes": shapes(width),
             "dtypes": dtypes, "loader": None}  # fmt: skip
    request.write_text(json.dumps(asked))
    script = ROOT / "tests" / "engine" / "load_experts.py"
    done = subprocess.run(
        [PYTHON, script, request, loaded], env=kept_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(loaded)
    gate_up = torch.stack([torch.cat(pair) for pair in zip(single["gate"], single["up"], strict=True)])
    for name, expected in (("w13", gate_up), ("w2", torch.stack(single["down"]))):
        codes, scale = found[f"{name}_weight"], found[f"{name}_weight_scale"]
        assert (int(codes.min()), int(codes.max())) == (-8, 7)
        assert scale.dtype == torch.bfloat16
        assert bool((scale > 0).all())
        served = codes.float() * scale.float()
        assert served.shape == expected.shape
        rows = (served - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(rows.max()) < 0.2
