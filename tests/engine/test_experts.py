"""vLLM's loader of experts puts each matrix of a split stack where the float stack has it."""

import json
import subprocess

import pytest
from safetensors.torch import load_file

from tests.engine.conftest import CT, convert
from tests.engine.harness import PYTHON, ROOT, kept_environment
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.engine

RULES = [{"match": "*_proj", "scheme": "w8a8_dynamic"}]
E, H, I = 8, 64, 96  # noqa: E741
SHAPES = {
    "w13_weight": (E, 2 * I, H), "w13_weight_scale": (E, 2 * I, 1),
    "w2_weight": (E, H, I), "w2_weight_scale": (E, H, 1),
}  # fmt: skip
DTYPES = {name: "float32" if "scale" in name else "int8" for name in SHAPES}


@pytest.mark.parametrize(("family", "experts", "gated", "down"), [
    ("granitemoe", "block_sparse_moe.experts", "block_sparse_moe.input_linear.weight",
     "block_sparse_moe.output_linear.weight"),
    ("aria_text", "mlp.experts", "mlp.experts.fc1.weight", "mlp.experts.fc2.weight"),
])  # fmt: skip
def test_the_loader_takes_single_experts(environment, tmp_path, family, experts, gated, down):
    layer, transposed = "model.layers.1", family == "aria_text"
    model = make_tiny(tmp_path / "model", family)
    out = convert(tmp_path / "out", model, CT, RULES)
    request, loaded = tmp_path / "request.json", tmp_path / "loaded.safetensors"
    asked = {"folder": str(out), "experts": f"{layer}.{experts}", "transposed": transposed,
             "shapes": SHAPES, "dtypes": DTYPES}  # fmt: skip
    request.write_text(json.dumps(asked))
    script = ROOT / "tests" / "engine" / "load_experts.py"
    done = subprocess.run(
        [PYTHON, script, request, loaded], env=kept_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, source = load_file(loaded), load_file(model / "model.safetensors")
    for name, stack in (("w13", source[f"{layer}.{gated}"]), ("w2", source[f"{layer}.{down}"])):
        expected = (stack.mT if transposed else stack).float()
        served = found[f"{name}_weight"].float() * found[f"{name}_weight_scale"]
        assert served.shape == expected.shape
        rows = (served - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert 1e-4 < float(rows.mean()) < 0.01  # NaN if a parameter was not filled
        assert float(rows.max()) < 0.02
