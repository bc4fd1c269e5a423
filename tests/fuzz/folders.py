"""Tiny checkpoints of the formats that quantcli reads, put together without a conversion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import quantized
from tests.builders import Tensor, make_model, tensor

MODULE = "model.layers.0.mlp.up_proj"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 16, "tie_word_embeddings": False,
}  # fmt: skip
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["lm_head"]}  # fmt: skip
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False,
         "checkpoint_format": "gptq", "dynamic": {"-:.*lm_head": {}}}  # fmt: skip
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_INT8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized",
    "quantization_status": "compressed", "ignore": ["lm_head", "re:.*self_attn.*"],
    "kv_cache_scheme": None,
    "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": _WEIGHTS,
        "input_activations": _WEIGHTS | {"strategy": "token", "dynamic": True}}},
}  # fmt: skip
_INT4 = _INT8 | {
    "format": "pack-quantized",
    "config_groups": {"group_0": {
        "targets": ["re:.*_proj"], "input_activations": None, "format": "pack-quantized",
        "weights": _WEIGHTS | {"num_bits": 4, "strategy": "group", "group_size": 32,
                               "symmetric": False}}},
}  # fmt: skip
_MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "ignore": ["lm_head"],
             "producer": {"name": "modelopt"}, "kv_cache_quant_algo": None}  # fmt: skip
_QUARK = {
    "quant_method": "quark", "export": {"pack_method": "reorder"}, "exclude": ["lm_head"],
    "global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_channel", "symmetric": True},
                            "input_tensors": None},
    "layer_quant_config": {
        "*up_proj": {"weight": {"dtype": "int8", "qscheme": "per_channel", "symmetric": True}}},
    "layer_type_quant_config": {},
}  # fmt: skip
_AUTO_ROUND = _GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq",
                       "extra_config": {".*up_proj": {"bits": 4}}}  # fmt: skip
DESCRIPTION: dict[str, Any] = {
    "model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "group_size": 0, "kv_quant_type": None,
    "model.embed_tokens.weight": "FLOAT", "model.norm.weight": "FLOAT", "lm_head.weight": "FLOAT",
    f"{MODULE}.weight": "W8A8_DYNAMIC", f"{MODULE}.weight_scale": "W8A8_DYNAMIC",
    f"{MODULE}.weight_offset": "W8A8_DYNAMIC",
    "optional": {"quarot": {}}, "metadata": {},
}  # fmt: skip


def _float_weights() -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": tensor("BF16", 16, 32, fill=60),
        "model.norm.weight": tensor("BF16", 32, fill=60),
        "lm_head.weight": tensor("BF16", 16, 32, fill=60),
    }


def _layer() -> dict[str, Tensor]:
    return {f"{MODULE}.weight": tensor("BF16", 64, 32, fill=60)}


def _ascend() -> dict[str, Tensor]:
    tensors = quantized.int8_rows(MODULE, 64, 32)[0]
    return {**tensors, f"{MODULE}.weight_offset": quantized.f32(quantized.np.zeros((64, 1)))}


def _modelopt() -> dict[str, Tensor]:
    tensors = quantized.fp8_blocks(MODULE, 64, 32)[0]
    scale = tensors.pop(f"{MODULE}.weight_scale_inv")
    return {**tensors, f"{MODULE}.weight_scale": scale}


# name -> quantization_config, tensors of the module
FORMATS: dict[str, tuple[Any, Callable[[], dict[str, Tensor]]]] = {
    "float": (None, _layer),
    "fp8": (_FP8, lambda: quantized.fp8_blocks(MODULE, 64, 32, (32, 32))[0]),
    "awq": (_AWQ, lambda: quantized.awq(MODULE, 64, 32)[0]),
    "gptq": (_GPTQ, lambda: quantized.gptq(MODULE, 64, 32)[0]),
    "int8": (_INT8, lambda: quantized.int8_rows(MODULE, 64, 32)[0]),
    "int4": (_INT4, lambda: quantized.packed_int4(MODULE, 64, 32, 32, symmetric=False, wide=False)[0]),
    "modelopt": (_MODELOPT, _modelopt),
    "quark": (_QUARK, lambda: quantized.int8_rows(MODULE, 64, 32)[0]),
    "auto-round": (_AUTO_ROUND, lambda: quantized.gptq(MODULE, 64, 32)[0]),
    "ascend": (None, _ascend),
}


def make(folder: Path, name: str) -> dict[str, Any]:
    """The checkpoint of a format. Returns its config.json."""
    settings, tensors = FORMATS[name]
    config = LLAMA if settings is None else LLAMA | {"quantization_config": settings}
    files = {"quant_model_description.json": json.dumps(DESCRIPTION)} if name == "ascend" else {}
    shards = {"model.safetensors": {**_float_weights(), **tensors()}}
    make_model(folder, shards, config=config, index=name == "float", files=files)
    return config


SETTINGS = {name: settings for name, (settings, _) in FORMATS.items()}
