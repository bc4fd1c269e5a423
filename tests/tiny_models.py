"""Tiny random models of real families, made by transformers itself and saved as it saves them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
# Expert widths H, I and 2 I all differ: COMMON's 64, 96 and 192.
GRANITE = {
    "num_local_experts": 8, "num_experts_per_tok": 2, "attention_multiplier": 0.125,
    "residual_multiplier": 0.45, "embedding_multiplier": 4.0, "logits_scaling": 2.0,
}  # fmt: skip
SHARED = {"shared_intermediate_size": 80}
_TYPES = ["mamba", "attention", "attention", "attention"]
HYBRID = SHARED | {
    "num_hidden_layers": 4, "layer_types": _TYPES, "layers_block_type": _TYPES, "mamba_n_heads": 8,
    "mamba_d_state": 16, "mamba_n_groups": 1, "position_embedding_type": "nope",
}  # fmt: skip
# Of each also the fused experts: I is 48, unlike H and H / 2, and 2 I is 96.
_LAYERS = {"num_hidden_layers": 4}
_FUSED = MOE | _LAYERS | {"moe_intermediate_size": 48}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "shared_expert_intermediate_size": 40,
}  # fmt: skip
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_TOWER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 64,
    "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
_TOKENS = {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102,
           "vision_end_token_id": 103}  # fmt: skip
LLAMA4 = _LAYERS | {
    "num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": 48,
    "intermediate_size_mlp": 80, "interleave_moe_layer_step": 1,
}  # fmt: skip
GEMMA4 = _FUSED | SLIDING | {
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 16,
    "enable_moe_block": True, "top_k_experts": 2,
}  # fmt: skip
STEP = _LAYERS | {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "share_expert_dim": 40, "mlp_layer_types": ["sparse"] * 4, "sliding_window": 8,
}  # fmt: skip
_EYE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "mlp_ratio": 1.5, "max_position_embeddings": 4}  # fmt: skip
# class of transformers, class of its config, what differs from COMMON, in `text_config` if there is one
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SLIDING, "num_hidden_layers": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SLIDING, "num_hidden_layers": 4}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", GRANITE),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", GRANITE | SHARED),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", GRANITE | HYBRID),
    "granitemoe_swa": (
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSWAConfig",
        GRANITE | {"sliding_window": 8},
    ),
    "aria_text": ("AriaTextForCausalLM", "AriaTextConfig", {"moe_num_experts": 8}),
    "llama4_text": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    "gemma4_text": ("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA4),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {"text_config": _FUSED | {"rope_scaling": _ROPE}, "vision_config": _TOWER, **_TOKENS},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {"text_config": _FUSED | _LINEAR, "vision_config": _TOWER, **_TOKENS},
    ),
    "step3p7": (
        "Step3p7ForConditionalGeneration",
        "Step3p7Config",
        {"text_config": STEP, "vision_config": _EYE},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {"use_qkv_bias": True}),
}
# Families whose experts alone are tested: stacks that no other family has.
STACKED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _LAYERS
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48}
        | {"sliding_window": 8},
    ),
    "dbrx": (
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
        },
    ),
    "inkling2_text": (
        "Inkling2ForCausalLM",
        "Inkling2TextConfig",
        _LAYERS | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    ),
    "mistral4": (
        "Mistral4ForCausalLM",
        "Mistral4Config",
        LATENT | _LAYERS | {"moe_intermediate_size": 48, "first_k_dense_replace": 0},
    ),
    "zaya": (
        "ZayaForCausalLM",
        "ZayaConfig",
        _FUSED | {"num_experts_per_tok": 1, "router_hidden_size": 16},
    ),
    "muse_spark": (
        "MuseSparkForConditionalGeneration",
        "MuseSparkConfig",
        {
            "text_config": _LAYERS
            | {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            | {"moe_hidden_size": 40},
            "audio_config": {
                "out_hidden_size": 64, "hidden_sizes": [8, 8], "patch_sizes": [2, 2],
                "depths": [1, 1], "num_hidden_layers": 2,
            },
            "vision_config": {
                "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 40,
            },
            "out_hidden_size": 32, "projector_hidden_size": 32,
        },
    ),
}  # fmt: skip


def build_tiny(family: str, **sizes: int) -> Any:
    """A tiny model of `family` in memory, as transformers begins it, in float32."""
    import transformers

    model_class, config_class, changes = (FAMILIES | STACKED)[family]
    changes = copy.deepcopy(changes)  # the library takes dictionaries over
    table = COMMON | changes | sizes
    if "text_config" in changes:
        table = changes | {"text_config": COMMON | changes["text_config"] | sizes}
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**table))


def make_tiny(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    published: bool = True,
    **sizes: int,
) -> Path:
    """Save a tiny model of `family`, other `sizes` than COMMON's if given; every weight is drawn.

    published: with experts as the family's own checkpoints hold them, not as transformers saves them.
    """
    model = build_tiny(family, **sizes)
    save(folder, model, dtype, seed, as_named=published and family == "qwen3_5_moe")
    if published and family == "qwen3_vl_moe":
        _transpose_experts(folder / "model.safetensors")
    return folder


def _transpose_experts(file: Path) -> None:
    """Turn every stack of experts over."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def make_mxfp4(folder: Path) -> Path:
    """A gpt-oss whose experts are stored as published: MXFP4, of widths 64 and 96."""
    import json

    from safetensors.torch import load_file, save_file

    make_tiny(folder, "gpt_oss", intermediate_size=96, head_dim=32)  # as engines take it
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, k, n = tensors.pop(name).shape
        sides = (experts, n, k // 32)
        draw = {"generator": generator, "dtype": torch.uint8}
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*sides, 16), **draw)
        tensors[f"{name}_scales"] = torch.randint(119, 123, sides, **draw)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_multimodal(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A Gemma 3 with a vision tower that has more parameters in its stack than the language model."""
    import transformers

    text = COMMON | SLIDING | {"num_hidden_layers": 4}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 6,
              "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    save(folder, transformers.Gemma3ForConditionalGeneration(config), dtype, seed)
    return folder


def save(folder: Path, model: Any, dtype: torch.dtype, seed: int, *, as_named: bool = False) -> None:
    """Draw every weight anew and save the model; as_named: with the names and shapes of parameters."""
    generator = torch.Generator().manual_seed(seed)
    # norms of Gemma 2 and 3 multiply by 1 + weight
    near_zero = any(name in type(model).__name__ for name in ("Gemma2", "Gemma3"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            around = 1.0 if parameter.dim() == 1 and "norm" in name and not near_zero else 0.0
            parameter.copy_(around + drawn * (0.3 if parameter.dim() == 1 else 0.1))
    model.to(dtype).save_pretrained(folder, save_original_format=not as_named)


BLOCKS = COMMON | {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
_VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
_QWEN_VISION = {"depth": 2, "hidden_size": 64, "embed_dim": 64, "intermediate_size": 64, "num_heads": 2,
                "out_hidden_size": 128, "patch_size": 14, "mlp_ratio": 1,
                "fullatt_block_indexes": [1]}  # fmt: skip
_MROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}}
_IMAGES = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62,
           "vision_end_token_id": 63}  # fmt: skip
# Models whose modules have other names than their tensors, or are of one part and have the same names:
# class of transformers, class of its config, the config. Widths are multiples of 128 for blocks.
LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Config", {
        "text_config": BLOCKS | {"sliding_window": 8}, "vision_config": _VISION,
        "mm_tokens_per_image": 4}),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": {"model_type": "llama", **BLOCKS}, "image_token_index": 60,
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_VISION}}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {
        "text_config": BLOCKS | _MROPE, **_IMAGES,
        "vision_config": _QWEN_VISION | {"hidden_size": 128}}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {
        "text_config": BLOCKS | _MROPE, "vision_config": _QWEN_VISION, **_IMAGES}),
    "internvl": ("InternVLForConditionalGeneration", "InternVLConfig", {
        "text_config": {"model_type": "qwen2", **BLOCKS}, "image_token_id": 60,
        "vision_config": _VISION | {"image_size": [28, 28], "patch_size": [14, 14]}}),
    "mistral3": ("Mistral3ForConditionalGeneration", "Mistral3Config", {
        "text_config": {"model_type": "mistral", **BLOCKS}, "image_token_index": 60,
        "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 32}}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", BLOCKS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", BLOCKS | {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", BLOCKS | {
        "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 128}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", BLOCKS | {
        "num_local_experts": 2, "num_experts_per_tok": 2}),
}  # fmt: skip


def make_layout(folder: Path, layout: str) -> Any:
    """Save a tiny model of a layout, in bfloat16. Returns the class of transformers that loads it."""
    import transformers

    model_class, config_class, table = LAYOUTS[layout]
    config = getattr(transformers, config_class)(**copy.deepcopy(table))  # it takes dictionaries over
    config.dtype = torch.bfloat16
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                spread = 1.0 if "embed_tokens" in name else 0.05
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    model.to(torch.bfloat16).save_pretrained(folder)
    return getattr(transformers, model_class)
