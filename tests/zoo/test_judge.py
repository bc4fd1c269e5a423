"""The judge, on checkpoints whose tensors can be told by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.zoo.judge import UnknownModelError, judge, linears_of, share_quantized, write_headers
from tests.zoo.make import make

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return make("qwen2_moe", tmp_path_factory.mktemp("judge") / "qwen2_moe")


def test_kinds_of_a_mixture(mixture):
    kinds = linears_of(mixture)
    layer = "model.layers.1"
    assert {name.removeprefix(f"{layer}."): kind for name, kind in kinds.items()
            if name.startswith(layer) and ".experts.1." not in name and ".experts.2." not in name
            and ".experts.3." not in name} == {
        "input_layernorm.weight": "other", "post_attention_layernorm.weight": "other",
        "self_attn.q_proj.weight": "linear", "self_attn.k_proj.weight": "linear",
        "self_attn.v_proj.weight": "linear", "self_attn.o_proj.weight": "linear",
        "self_attn.q_proj.bias": "other", "self_attn.k_proj.bias": "other",
        "self_attn.v_proj.bias": "other", "mlp.gate.weight": "router",
        "mlp.shared_expert_gate.weight": "router", "mlp.shared_expert.gate_proj.weight": "linear",
        "mlp.shared_expert.up_proj.weight": "linear", "mlp.shared_expert.down_proj.weight": "linear",
        "mlp.experts.0.gate_proj.weight": "expert", "mlp.experts.0.up_proj.weight": "expert",
        "mlp.experts.0.down_proj.weight": "expert"}  # fmt: skip
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["lm_head.weight"] == "head"


@pytest.mark.parametrize(("name", "tensor", "kind", "count"), [
    ("qwen3_5_moe_pub", "model.language_model.layers.0.mlp.experts.gate_up_proj", "expert",
     4 * 2 * 128 * 256),
    ("qwen3_5_moe_pub", "mtp.layers.0.self_attn.q_proj.weight", "linear", 2 * 256 * 256),
    ("qwen3_5_moe_pub", "mtp.fc.weight", "linear", 256 * 512),
    ("gpt_oss_mxfp4", "model.layers.0.mlp.experts.down_proj_blocks", "expert", 4 * 256 * 384),
    ("gpt_oss_mxfp4", "model.layers.0.mlp.experts.down_proj_scales", "other", 4 * 256 * 12),
    ("kimi_k2_int4", "model.layers.1.mlp.experts.0.up_proj.weight_packed", "expert", 128 * 256),
    ("lfm2", "model.layers.0.conv.conv.weight", "conv", 256 * 3),
])  # fmt: skip
def test_kinds_by_name(tmp_path, name, tensor, kind, count):
    found = judge(make(name, tmp_path / name))[tensor]
    assert (found.kind, found.count) == (kind, count)


def test_a_model_that_only_its_own_code_builds_is_not_judged(tmp_path):
    with pytest.raises(UnknownModelError, match="bailing_moe"):
        linears_of(make("ling_v2", tmp_path / "ling_v2"))


def test_the_share_is_that_of_weights(mixture, tmp_path):
    """q_proj of one layer as codes: 256 x 256 of all linears and experts."""
    changed = "model.layers.1.self_attn.q_proj.weight"
    tensors = {name: t for file in mixture.glob("*.safetensors") for name, t in load_file(file).items()}
    tensors[changed] = tensors[changed].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((mixture / "config.json").read_text())
    layer = 2 * 256 * 256 + 2 * 128 * 256 + 5 * 3 * 128 * 256
    assert share_quantized(mixture, tmp_path) == pytest.approx(256 * 256 / (3 * layer))
    assert share_quantized(mixture, mixture) == 0.0


def test_a_default_model_is_written_as_headers_alone(tmp_path):
    shapes = write_headers("mixtral", tmp_path)
    stored = linears_of(tmp_path)
    assert set(stored) == set(shapes)
    assert stored["model.layers.0.block_sparse_moe.experts.7.w2.weight"] == "expert"
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 4
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 2**21  # holes
