"""The headers of DeepSeek-V3 in bf16: 685 billion weights, 1.37 TB.

Sizes are those of config.json of deepseek-ai/DeepSeek-V3 on the Hub. Checkpoints in bf16, such as
unsloth/DeepSeek-V3-bf16, have 163 files of 8.6 GB, with the next-token layer as layer 61.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import write_model
from quantcli.checkpoint.spec import TensorSpec

HIDDEN, WIDTH, EXPERT, EXPERTS, VOCABULARY = 7168, 18432, 2048, 256, 129280
HEADS, NOPE, ROPE, VALUE, QUERY_RANK, KEY_RANK = 128, 128, 64, 128, 1536, 512
LAYERS, DENSE, FILES = 61, 3, 163
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": EXPERT,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": DENSE,
    "moe_layer_freq": 1,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": QUERY_RANK,
    "kv_lora_rank": KEY_RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def tensors() -> list[TensorSpec]:
    """Every tensor, in the order of layers."""
    specs = [_weight("model.embed_tokens", VOCABULARY, HIDDEN)]
    for index in range(LAYERS + 1):
        specs += layer(index)
    return [*specs, _weight("model.norm", HIDDEN), _weight("lm_head", VOCABULARY, HIDDEN)]


def layer(index: int) -> list[TensorSpec]:
    """The tensors of a layer; layer 61 is the next-token layer, with its own embedding and head."""
    name = f"model.layers.{index}"
    specs = []
    if index == LAYERS:
        specs += [_weight(f"{name}.embed_tokens", VOCABULARY, HIDDEN)]
        specs += [_weight(f"{name}.{norm}", HIDDEN) for norm in ("enorm", "hnorm")]
        specs += [_weight(f"{name}.eh_proj", HIDDEN, 2 * HIDDEN)]
        specs += [_weight(f"{name}.shared_head.norm", HIDDEN)]
        specs += [_weight(f"{name}.shared_head.head", VOCABULARY, HIDDEN)]
    specs += [
        _weight(f"{name}.{norm}", HIDDEN) for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    specs += _attention(f"{name}.self_attn")
    if index < DENSE:
        return specs + _mlp(f"{name}.mlp", WIDTH)
    specs.append(_weight(f"{name}.mlp.gate", EXPERTS, HIDDEN))
    specs.append(TensorSpec(f"{name}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)))
    specs += _mlp(f"{name}.mlp.shared_experts", EXPERT)
    for expert in range(EXPERTS):
        specs += _mlp(f"{name}.mlp.experts.{expert}", EXPERT)
    return specs


def _attention(name: str) -> list[TensorSpec]:
    return [
        _weight(f"{name}.q_a_proj", QUERY_RANK, HIDDEN),
        _weight(f"{name}.q_a_layernorm", QUERY_RANK),
        _weight(f"{name}.q_b_proj", HEADS * (NOPE + ROPE), QUERY_RANK),
        _weight(f"{name}.kv_a_proj_with_mqa", KEY_RANK + ROPE, HIDDEN),
        _weight(f"{name}.kv_a_layernorm", KEY_RANK),
        _weight(f"{name}.kv_b_proj", HEADS * (NOPE + VALUE), KEY_RANK),
        _weight(f"{name}.o_proj", HIDDEN, HEADS * VALUE),
    ]


def _mlp(name: str, width: int) -> list[TensorSpec]:
    up = [_weight(f"{name}.{module}", width, HIDDEN) for module in ("gate_proj", "up_proj")]
    return [*up, _weight(f"{name}.down_proj", HIDDEN, width)]


def _weight(module: str, *shape: int) -> TensorSpec:
    return TensorSpec(f"{module}.weight", "BF16", shape)


def write_headers(folder: Path) -> int:
    """The whole model, its weights holes in the files. Returns the bytes that it stands for."""
    nbytes = write_model(folder, tensors(), shards=FILES, sparse=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return nbytes
