"""Tiny models of several families, by the names and shapes that their checkpoints have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

H, INTERMEDIATE, V, LAYERS = 64, 96, 128, 2  # hidden, intermediate, vocabulary
Q, KV = 64, 32  # rows of q, of k and v

FAMILIES = ("llama", "qwen2_tied", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "vlm")


def _dense(path: str, width: int = INTERMEDIATE) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.gate_proj.weight", (width, H)
    yield f"{path}.up_proj.weight", (width, H)
    yield f"{path}.down_proj.weight", (H, width)


def _attention(path: str, *, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, rows in (("q_proj", Q), ("k_proj", KV), ("v_proj", KV)):
        yield f"{path}.{name}.weight", (rows, H)
        if bias:
            yield f"{path}.{name}.bias", (rows,)
    yield f"{path}.o_proj.weight", (H, Q)


def _experts(path: str, names: tuple[str, str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for expert in range(4):
        for name, shape in zip(names, ((32, H), (32, H), (H, 32)), strict=True):
            yield f"{path}.experts.{expert}.{name}.weight", shape


def _layer(family: str, path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.input_layernorm.weight", (H,)
    yield f"{path}.post_attention_layernorm.weight", (H,)
    glu = ("gate_proj", "up_proj", "down_proj")
    attention = f"{path}.self_attn"
    if family == "deepseek_v3":
        yield f"{attention}.q_a_proj.weight", (48, H)
        yield f"{attention}.q_a_layernorm.weight", (48,)
        yield f"{attention}.q_b_proj.weight", (96, 48)
        yield f"{attention}.kv_a_proj_with_mqa.weight", (40, H)
        yield f"{attention}.kv_a_layernorm.weight", (32,)
        yield f"{attention}.kv_b_proj.weight", (128, 32)
        yield f"{attention}.o_proj.weight", (H, Q)
    else:
        yield from _attention(attention, bias=family in {"qwen2_tied", "qwen2_moe"})
    if family == "qwen3":
        yield f"{attention}.q_norm.weight", (16,)
    if family in {"qwen3_moe", "qwen2_moe", "deepseek_v3"}:
        yield f"{path}.mlp.gate.weight", (4, H)
        yield from _experts(f"{path}.mlp", glu)
    if family == "qwen2_moe":
        yield from _dense(f"{path}.mlp.shared_expert")
        yield f"{path}.mlp.shared_expert_gate.weight", (1, H)
    if family == "deepseek_v3":
        yield from _dense(f"{path}.mlp.shared_experts", 32)
    if family == "mixtral":
        yield f"{path}.block_sparse_moe.gate.weight", (4, H)
        yield from _experts(f"{path}.block_sparse_moe", ("w1", "w3", "w2"))
    if family in {"llama", "qwen2_tied", "qwen3", "vlm"}:
        yield from _dense(f"{path}.mlp")


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a family and its shape."""
    root = "model.language_model" if family == "vlm" else "model"
    table = {f"{root}.embed_tokens.weight": (V, H), f"{root}.norm.weight": (H,)}
    for layer in range(LAYERS):
        table.update(_layer(family, f"{root}.layers.{layer}"))
    if family == "deepseek_v3":  # a draft layer
        table["model.layers.2.eh_proj.weight"] = (H, 2 * H)
    if family == "vlm":
        table["model.visual.patch_embed.proj.weight"] = (H, 3, 2, 4, 4)
        table["model.visual.blocks.0.mlp.gate_proj.weight"] = (INTERMEDIATE, H)
        table["model.visual.blocks.0.norm1.bias"] = (H,)
    if family != "qwen2_tied":
        table["lm_head.weight"] = (V, H)
    return table


def make_family(
    folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write a tiny model with seeded weights and a config.json; returns its folder."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        for name, shape in shapes(family).items()
    }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": family.removesuffix("_tied"),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": family == "qwen2_tied",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder
