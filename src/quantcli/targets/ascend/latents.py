"""The int8 cache of latents (MLA): its tensors, and what the engine needs next to it.

A node that only decodes keeps the normed latent as int8, by one scale for a layer; the rotated part of
keys stays float. It rounds queries by token and head, so that it reads no scale of them, and it takes
keys and values from the same latent, so that it reads fa_k alone.

Sources: vllm-ascend 182b75ea84, quantization/methods/kv_c8.py:12-72, attention/mla_v1.py:973-1003,
1392-1402,1501-1508, device/device_op.py:308-340, quantization/modelslim_config.py:634-643,810-851,
1035-1048.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial

from quantcli.checkpoint.config.settings import Settings
from quantcli.targets.base import Fault
from quantcli.targets.kv_cache import AttentionLayer, CachePart, CacheTensor
from quantcli.targets.layouts import Values

TYPE = "FAKQuant"  # the value of `fa_quant_type`, the only one that the engine registers
LABEL = "FAQuant"  # of each tensor in the description
# Families whose attention the engine runs on latents, with one attention in a layer and no indexer.
# Sources: vllm 0.32.0, transformers_utils/model_arch_config_convertor.py:314-348;
# vllm-ascend 182b75ea84, quantization/modelslim_config.py:133-156,248-256.
FAMILIES = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "pangu_ultra_moe"})
_PROJECTIONS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
_TENSORS: tuple[tuple[CachePart, Values, str], ...] = (
    ("q_scale", "positive", "F32"), ("q_offset", "zero", "I8"), ("k_scale", "positive", "F32"),
    ("k_offset", "zero", "I8"), ("v_scale", "positive", "F32"), ("v_offset", "zero", "I8"),
)  # fmt: skip


def _name(part: str, layer: str) -> str:
    """Such as `model.layers.0.self_attn.fa_k.scale`."""
    side, _, kind = part.partition("_")
    return f"{layer}.fa_{side}.{kind}"


TENSORS = tuple(
    CacheTensor(part, partial(_name, part), lambda heads, width: (heads, 1), values, dtype)
    for part, values, dtype in _TENSORS
)


def faults(layer: AttentionLayer, int8: Mapping[str, bool], config: Settings) -> Iterator[Fault]:
    """What the engine stops at, or misreads, if a layer's latents are int8.

    int8: whether modules have int8 codes and a weight_scale, by name; float ones may be missing.
    config: that of the language model.
    """
    kind, leave = config.text("model_type"), "leave `kv_cache` out"
    if kind not in FAMILIES:
        what = (
            f"the engine has an int8 cache of latents for {', '.join(sorted(FAMILIES))}; this is {kind}"
        )
        yield Fault(what, leave)
    elif config.size("index_topk"):
        what = "the engine has no int8 cache of latents for attention that an indexer makes sparse"
        yield Fault(what, leave)
    elif not config.size("q_lora_rank"):
        what = (
            "the engine has an int8 cache of latents only if queries have a latent, too (q_lora_rank)"
        )
        yield Fault(what, leave)
    elif layer.widths[0] % 32:
        what = (
            f"the engine's int8 cache has latents in multiples of 32; kv_lora_rank is {layer.widths[0]}"
        )
        yield Fault(what, leave)
    elif len(_NUMBER.findall(layer.name)) != 1:
        what = "the engine finds the layers of this cache by one number in their names"
        yield Fault(what, leave)
    elif floats := [name for name in _PROJECTIONS if not int8.get(f"{layer.name}.{name}")]:
        what = (
            f"the engine writes an int8 cache of latents from int8 weights, and {', '.join(floats)} "
            "has none with a weight_scale (npu_mla_prolog_v2, vLLM-Ascend's mla_v1.py:980-1003)"
        )
        yield Fault(what, f"give {', '.join(_PROJECTIONS)} `w8a8_dynamic`, or {leave}")
