"""Small checkpoints as other producers write them, and the float model that they are made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, ROWS, LAYERS = 64, 128, 64, 4
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": ROWS, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (64, HIDDEN), "self_attn.k_proj": (32, HIDDEN),
    "self_attn.v_proj": (32, HIDDEN), "self_attn.o_proj": (HIDDEN, 64),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
MODULES = {f"model.layers.{n}.{name}": s for n in range(LAYERS) for name, s in SHAPES.items()}
TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
Tensors = dict[str, Tensor]
Encode = Callable[[Tensor], Tensors]  # a weight -> tensors by suffix


def weights() -> Tensors:
    """The projections, in float32."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=draw) / 8 for name, shape in MODULES.items()}


def others(head: str | None = "lm_head") -> Tensors:
    """Everything but the projections. head: the name of the output layer."""
    draw = torch.Generator().manual_seed(1)
    matrices = ["model.embed_tokens", *([head] if head else [])]
    norms = [f"model.layers.{n}.{norm}" for n in range(LAYERS) for norm in NORMS]
    table = {f"{name}.weight": torch.randn(ROWS, HIDDEN, generator=draw) for name in matrices}
    table |= {f"{name}.weight": torch.ones(HIDDEN) for name in ["model.norm", *norms]}
    return {name: tensor.bfloat16() for name, tensor in table.items()}


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], **files: Any) -> Path:
    """A model; files: JSON by name without its ending."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    for name, table in {"config": config, "tokenizer": TOKENIZER, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    return folder


def float_model(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """The model that the others are made from; tensors: all but the projections."""
    projections = {f"{name}.weight": weight.bfloat16() for name, weight in weights().items()}
    return write(folder, projections | (tensors or others()), CONFIG | config)


def quantized(
    folder: Path, encode: Encode, block: Any = None, *, tensors: Tensors | None = None, **config: Any
) -> Path:
    """Each projection encoded. block: `quantization_config`."""
    table = dict(tensors or others())
    for name, weight in weights().items():
        table |= {f"{name}.{suffix}": tensor for suffix, tensor in encode(weight).items()}
    settings = {} if block is None else {"quantization_config": block}
    return write(folder, table, CONFIG | settings | config)


def described(folder: Path, encode: Encode, label: str, cache: Tensors | None = None) -> Path:
    """As the producer for vLLM-Ascend: a description, no `quantization_config`.

    cache: tensors of the cache of keys and values for each k_proj and v_proj, by suffix.
    """
    table = others()
    description = {"version": "1.0.0", "model_quant_type": label, **dict.fromkeys(table, "FLOAT")}
    if cache:
        description |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    for name, weight in weights().items():
        for suffix, tensor in encode(weight).items():
            table[f"{name}.{suffix}"], description[f"{name}.{suffix}"] = tensor, label
        if cache and name.endswith(("k_proj", "v_proj")):
            for suffix, tensor in cache.items():
                table[f"{name}.{suffix}"], description[f"{name}.{suffix}"] = tensor.clone(), "C8"
    return write(folder, table, CONFIG, quant_model_description=description)


# -- encodings --------------------------------------------------------------------------------------


def int8(weight: Tensor) -> Tensors:
    """Codes, and a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def signed_int8(weight: Tensor) -> Tensors:
    """As int8; a row whose largest number is positive has a negative scale and reaches -128."""
    top, bottom = weight.amax(1, keepdim=True), weight.amin(1, keepdim=True)
    scale = torch.where(top > -bottom, -top, -bottom) / 128
    codes = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}


def fp8(weight: Tensor) -> Tensors:
    """e4m3, and one scale without a dimension."""
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def fp8_rows(weight: Tensor) -> Tensors:
    """e4m3, and a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(weight: Tensor) -> Tensors:
    """Nibbles, the even column in the low one, and an exponent for each 32 columns."""
    rows = weight.view(len(weight), -1, 32)
    exponent = (rows.abs().amax(2) / 6).log2().ceil()
    values = (rows / exponent.exp2().unsqueeze(2)).flatten(1)
    codes = (values.abs().unsqueeze(2) - torch.tensor(E2M1)).abs().argmin(2) + 8 * (values < 0)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return {"weight": packed, "weight_scale": (exponent + 127).to(torch.uint8)}


def mxfp8(weight: Tensor, up: bool = True) -> Tensors:
    """e4m3, and an exponent for each 32 columns: rounded up, or down, which clips some weights."""
    rows = weight.view(len(weight), -1, 32)
    amax = rows.abs().amax(2)
    exponent = (amax / 448).log2().ceil() if up else amax.log2().floor() - 8
    codes = (rows / exponent.exp2().unsqueeze(2)).clamp(-448, 448).flatten(1)
    return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale": (exponent + 127).to(torch.uint8)}


def groups(format_: str, weight: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weight, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": format_, "ignore": ["lm_head"],
            "config_groups": {"group_0": group}}  # fmt: skip


INT8 = groups(
    "int-quantized",
    {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True},
)
FP8_ROWS = groups(
    "float-quantized",
    {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
    {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
)
_MX = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32,
       "scale_dtype": "torch.uint8"}  # fmt: skip
MXFP8 = groups("mxfp8-quantized", _MX, _MX | {"dynamic": True})
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
