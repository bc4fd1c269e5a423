"""What vLLM-Ascend registers: its names for numerics, and how it wants deq_scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.core.numerics import Numerics, Operand


@dataclass(frozen=True)
class Tag:
    """A scheme as the engine registers it."""

    label: str
    loads_on: str
    experts: bool = False  # registered for mixtures of experts too
    scale_in_float32: bool = False  # else the loader rounds weight_scale to the serving dtype
    stores_scale: bool = True  # weight_scale and weight_offset are registered and used
    static: bool = False  # inputs are quantized with a stored scale


_INT8 = Operand("int8", "channel")
_INT4 = Operand("int4", "channel")
_FP8 = Operand("fp8_e4m3", "channel")
_TOKEN = Operand("int8", "token", dynamic=True)
_A2_A3 = "Atlas A2, A3 (910B, 910C)"
_W8A8 = Tag(
    "W8A8",
    f"vLLM-Ascend 0.11 and later on {_A2_A3}",
    scale_in_float32=True,
    stores_scale=False,
    static=True,
)
_W8A8_MIX = Tag("W8A8_MIX", f"vLLM-Ascend 0.13 and later on {_A2_A3}", static=True)
# In the order in which `model_quant_type` prefers them.
TAGS: dict[Numerics, Tag] = {
    Numerics(_INT4, Operand("int4", "token", dynamic=True), transform="kronecker"): Tag(
        "W4A4_FLATQUANT_DYNAMIC", f"vLLM-Ascend 0.11 and later on {_A2_A3}", scale_in_float32=True
    ),
    Numerics(_INT4, Operand("int4", "token", dynamic=True)): Tag(
        "W4A4_DYNAMIC", f"vLLM-Ascend 0.18 and later on {_A2_A3}", scale_in_float32=True
    ),
    **{
        Numerics(_INT8, Operand("int8", "tensor", symmetric=symmetric), _TOKEN): _W8A8_MIX
        for symmetric in (False, True)
    },
    Numerics(_INT8, _TOKEN): Tag(
        "W8A8_DYNAMIC", f"vLLM-Ascend 0.11 and later on {_A2_A3}, 310P", experts=True
    ),
    Numerics(_FP8, Operand("fp8_e4m3", "token", dynamic=True)): Tag(
        "W8A8FP8_DYNAMIC",
        "vLLM-Ascend 0.22.1rc1 and later on A5 (Ascend 950)",
        experts=True,
        scale_in_float32=True,
    ),
    Numerics(_INT8, None): Tag("W8A16", f"vLLM-Ascend 0.13 and later on {_A2_A3}"),
    **{
        Numerics(_INT8, Operand("int8", "tensor", symmetric=symmetric)): _W8A8
        for symmetric in (False, True)
    },
}
# What modules with transformed inputs have beside their codes, once each.
TRANSFORM = ("left_trans", "right_trans", "clip_ratio")


def deq_to_store(deq: Tensor, serving: torch.dtype) -> Tensor:
    """deq_scale as the engine's parameter has it: float32, or int64 where it serves in float16.

    The int64 holds the bits of the float32 in its low half, and zeros.
    """
    if serving != torch.float16:
        return deq
    return deq.view(torch.int32).to(torch.int64)  # positive: no sign to extend


def deq_from_stored(stored: Tensor) -> tuple[Tensor, torch.dtype]:
    """deq_scale in float32 and the serving dtype that its storage tells of."""
    if stored.dtype == torch.int64:
        return stored.to(torch.int32).view(torch.float32), torch.float16
    return stored, torch.bfloat16
