"""Storage formats of quantized checkpoints that others publish, written plainly.

Each function takes the tensors of a float checkpoint and returns those of the quantized one.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

BLOCK = 128
FP8_MOST = 448.0
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

FP8_BLOCKS: dict[str, Any] = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip
INT4_GROUPS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
               "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None, "output_activations": None,
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                    "group_size": 32, "dynamic": False, "actorder": None, "block_structure": None,
                    "observer": "minmax", "observer_kwargs": {}}}},
}  # fmt: skip


def fp8_blocks(tensors: Tensors, keep: str) -> Tensors:
    """Matrices but those whose names `keep` finds, in fp8 with a scale for each tile of 128 x 128."""
    out: Tensors = {}
    for name, weight in tensors.items():
        if weight.dim() != 2 or not name.endswith(".weight") or re.search(keep, name):
            out[name] = weight
            continue
        n, k = weight.shape
        padded = torch.zeros(-(-n // BLOCK) * BLOCK, -(-k // BLOCK) * BLOCK)
        padded[:n, :k] = weight.float()
        tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale = tiles.abs().amax((1, 3)) / FP8_MOST
        codes = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:n, :k]
        out[name], out[f"{name}_scale_inv"] = codes.to(torch.float8_e4m3fn), scale
    return out


def fp8_tensor(tensors: Tensors, change: str, scale: str, inputs: str) -> Tensors:
    """Matrices whose names `change` finds, in fp8 with one scale; `scale` and `inputs` end the names of
    their scale and of that of their inputs."""
    out: Tensors = {}
    for name, weight in tensors.items():
        out[name] = weight
        if re.search(change, name):
            most = weight.float().abs().max() / FP8_MOST
            dtype = weight.dtype if scale == "_scale_inv" else torch.float32
            out[name] = (weight.float() / most).to(torch.float8_e4m3fn)
            out[name + scale] = most.to(dtype)
            out[name.removesuffix("weight") + inputs] = torch.tensor(0.02, dtype=dtype)
    return out


def int4_groups(tensors: Tensors, change: str, group: int = 32) -> Tensors:
    """Matrices whose names `change` finds, in int4 with a scale for each `group` columns; eight codes
    in an int32, the first in its lowest bits."""
    out: Tensors = {}
    for name, weight in tensors.items():
        if not re.search(change, name):
            out[name] = weight
            continue
        n, k = weight.shape
        grouped = weight.float().view(n, k // group, group)
        scale = (grouped.abs().amax(-1) / 7).to(torch.bfloat16)
        codes = (grouped / scale.float()[..., None]).round().clamp(-8, 7).view(n, k // 8, 8) + 8
        shifts = torch.arange(0, 32, 4)
        packed = (codes.to(torch.int64) << shifts).sum(-1)
        module = name.removesuffix(".weight")
        out[f"{module}.weight_packed"] = packed.to(torch.uint32).view(torch.int32)
        out[f"{module}.weight_scale"] = scale
        out[f"{module}.weight_shape"] = torch.tensor([n, k], dtype=torch.int32)
    return out


def mxfp4(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks u8 [E, n, k / 32, 16] and exponents u8 [E, n, k / 32] of a stack [E, k, n]."""
    experts, k, n = stack.shape
    values = stack.mT.float().reshape(experts, n, k // 32, 32)
    exponent = torch.floor(torch.log2(values.abs().amax(-1).clamp(min=1e-20))) - 2
    scaled = values / torch.exp2(exponent)[..., None]
    nearest = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks.contiguous(), (exponent + 127).to(torch.uint8)
