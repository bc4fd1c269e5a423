"""Tiny random drafts in the layouts in which they are published, and models that they draft for.

transformers has no classes for them: config.json and names of tensors are as on the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY, REDUCED, HIDDEN, INNER, HEADS, KV_HEADS, SIDE = 160, 96, 64, 96, 4, 2, 16
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIDE,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LATENT: dict[str, Any] = LLAMA | {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": 24,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": HEADS, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def attention(prefix: str, width: int = HIDDEN) -> Shapes:
    """Projections of inputs of a width."""
    rows = {"q_proj": HEADS * SIDE, "k_proj": KV_HEADS * SIDE, "v_proj": KV_HEADS * SIDE}
    shapes: Shapes = {f"{prefix}.self_attn.{name}": (n, width) for name, n in rows.items()}
    return shapes | {f"{prefix}.self_attn.o_proj": (HIDDEN, HEADS * SIDE)}


def latent_attention(prefix: str, width: int = HIDDEN) -> Shapes:
    """Projections of multi-head latent attention."""
    rope, nope, rank, q_rank = 16, 16, LATENT["kv_lora_rank"], LATENT["q_lora_rank"]
    return {
        f"{prefix}.self_attn.q_a_proj": (q_rank, width),
        f"{prefix}.self_attn.q_a_layernorm": (q_rank,),
        f"{prefix}.self_attn.q_b_proj": (HEADS * (nope + rope), q_rank),
        f"{prefix}.self_attn.kv_a_proj_with_mqa": (rank + rope, width),
        f"{prefix}.self_attn.kv_a_layernorm": (rank,),
        f"{prefix}.self_attn.kv_b_proj": (HEADS * (nope + 16), rank),
        f"{prefix}.self_attn.o_proj": (HIDDEN, HEADS * 16),
    }


def mlp(prefix: str) -> Shapes:
    """A gated MLP."""
    return {
        f"{prefix}.mlp.gate_proj": (INNER, HIDDEN),
        f"{prefix}.mlp.up_proj": (INNER, HIDDEN),
        f"{prefix}.mlp.down_proj": (HIDDEN, INNER),
    }


def norms(prefix: str, *names: str) -> Shapes:
    """Norms of hidden states."""
    return {f"{prefix}.{name}": (HIDDEN,) for name in names}


def _eagle3(layer: str) -> Shapes:
    """EAGLE3: one layer that reads embeddings next to hidden states, and a smaller vocabulary."""
    after = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    own: Shapes = {"fc": (HIDDEN, 3 * HIDDEN), "norm": (HIDDEN,), "lm_head": (REDUCED, HIDDEN)}
    return own | attention(layer, 2 * HIDDEN) | mlp(layer) | norms(layer, *after)


_EAGLE: Shapes = {
    "embed_tokens": (VOCABULARY, HIDDEN),
    "fc": (HIDDEN, 2 * HIDDEN),
    **attention("layers.0"),
    **mlp("layers.0"),
    **norms("layers.0", "post_attention_layernorm"),
}
_QK_NORMS: Shapes = {f"layers.0.self_attn.{name}": (SIDE,) for name in ("q_norm", "k_norm")}
_DEEPSEEK: Shapes = {
    "fc": (HIDDEN, 2 * HIDDEN),
    "enorm": (HIDDEN,),
    "hnorm": (HIDDEN,),
    **latent_attention("layers.0"),
    **mlp("layers.0"),
    **norms("layers.0", "input_layernorm", "post_attention_layernorm"),
    "lm_head": (VOCABULARY, HIDDEN),
}
_DEEPSEEK_EAGLE3: Shapes = {
    "fc": (HIDDEN, 3 * HIDDEN),
    "norm": (HIDDEN,),
    "lm_head": (REDUCED, HIDDEN),
    **latent_attention("midlayer", 2 * HIDDEN),
    **mlp("midlayer"),
    **norms("midlayer", "hidden_norm", "input_layernorm", "post_attention_layernorm"),
}


def _dflash_layer(layer: str) -> Shapes:
    """A layer of Qwen3, as DFlash has several of them."""
    norms_of_heads: Shapes = {f"{layer}.self_attn.{name}": (SIDE,) for name in ("q_norm", "k_norm")}
    after = norms(layer, "input_layernorm", "post_attention_layernorm")
    return attention(layer) | mlp(layer) | after | norms_of_heads


_DFLASH: Shapes = {
    "fc": (HIDDEN, 3 * HIDDEN),
    "hidden_norm": (HIDDEN,),
    "norm": (HIDDEN,),
    **_dflash_layer("layers.0"),
    **_dflash_layer("layers.1"),
}
_SPECULATORS: dict[str, Any] = {
    "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
    "speculators_version": "0.1.0", "draft_vocab_size": REDUCED, "norm_before_residual": True,
    "target_hidden_size": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "speculators_config": {
        "algorithm": "eagle3", "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "target"},
    },
    "transformer_layer_config": {k: v for k, v in LLAMA.items() if k != "architectures"},
}  # fmt: skip
_EAGLE3: dict[str, Any] = {"draft_vocab_size": REDUCED}
_MEDUSA: dict[str, Any] = {
    "model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": HIDDEN, "num_heads": 2,
    "num_hidden_layers": 1, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16",
}  # fmt: skip
# config.json and weights [out, in], or [width] of norms, by the name of a module
DRAFTS: dict[str, tuple[dict[str, Any], Shapes]] = {
    # of SafeAILab: classes as those of the target
    "eagle": (LLAMA, _EAGLE),
    "eagle3": (LLAMA | _EAGLE3, _eagle3("midlayer")),
    # of SGLang, NVIDIA and others
    "eagle3_named": (
        LLAMA | _EAGLE3 | {"architectures": ["LlamaForCausalLMEagle3"]},
        _eagle3("midlayer"),
    ),
    # of the project speculators
    "eagle3_speculators": (
        _SPECULATORS,
        _eagle3("layers.0") | {"embed_tokens": (VOCABULARY, HIDDEN)},
    ),
    "eagle3_qwen3": (
        LLAMA | _EAGLE3 | {"model_type": "qwen3", "architectures": ["Eagle3Qwen3ForCausalLM"]},
        _eagle3("layers.0") | _QK_NORMS,
    ),
    "eagle3_deepseek": (
        LATENT
        | _EAGLE3
        | {"model_type": "deepseek_v2", "architectures": ["Eagle3DeepseekV2ForCausalLM"]},
        _DEEPSEEK_EAGLE3,
    ),
    "eagle_deepseek": (LATENT | {"architectures": ["EagleDeepSeekMTPModel"]}, _DEEPSEEK),
    "dflash": (
        LLAMA
        | {
            "model_type": "qwen3",
            "architectures": ["DFlashDraftModel"],
            "num_hidden_layers": 2,
            "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 1, 2]},
        },
        _DFLASH,
    ),
    "medusa": (
        _MEDUSA,
        {
            **{f"blocks.{i}.layers.0": (HIDDEN, HIDDEN) for i in range(2)},
            **{f"lm_heads.{i}": (VOCABULARY, HIDDEN) for i in range(2)},
        },
    ),
    # of FasterDecoding: what transformers would not name
    "medusa_old": (
        {k: v for k, v in _MEDUSA.items() if k != "num_heads"} | {"medusa_num_heads": 2},
        {
            **{f"medusa_heads.{i}.0.linear": (HIDDEN, HIDDEN) for i in range(2)},
            **{f"medusa_heads.{i}.1": (VOCABULARY, HIDDEN) for i in range(2)},
        },
    ),
    "mlp_speculator": (
        {
            "model_type": "mlp_speculator", "architectures": ["MLPSpeculatorPreTrainedModel"],
            "emb_dim": HIDDEN, "inner_dim": HIDDEN, "n_predict": 2, "vocab_size": VOCABULARY,
            "tie_weights": False, "scale_input": False, "torch_dtype": "bfloat16",
        },
        {
            **{f"speculator.emb.{i}": (VOCABULARY, HIDDEN) for i in range(2)},
            **{f"speculator.proj.{i}": (HIDDEN, HIDDEN) for i in range(2)},
            **{f"speculator.head.{i}": (VOCABULARY, HIDDEN) for i in range(2)},
            **{f"speculator.ln.{i}": (HIDDEN,) for i in range(2)},
        },
    ),
}  # fmt: skip


def make_draft(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Save a draft of DRAFTS; every weight is drawn, bfloat16."""
    config, shapes = DRAFTS[name]
    tensors = drawn(shapes, seed)
    if "draft_vocab_size" in config:  # ids are the token's number less that of the row; which are used
        tensors["d2t"] = torch.arange(REDUCED) // 2
        tensors["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool)
        tensors["t2d"][torch.arange(REDUCED) + tensors["d2t"]] = True
    return save_draft(folder, config, tensors)


def drawn(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """bfloat16 weights by name: of matrices around 0, of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight": (
            torch.randn(shape, generator=generator) * 0.08 + (1.0 if len(shape) == 1 else 0.0)
        ).to(torch.bfloat16)
        for name, shape in sorted(shapes.items())
    }


def save_draft(folder: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A folder with config.json and a weight file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
