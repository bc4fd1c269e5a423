"""Rules of vLLM-Ascend for names: modules that it never quantizes, and names that it looks up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping

from quantcli.targets.base import Refusal
from quantcli.targets.vllm_family import (
    EMBEDDINGS,
    EXPERT,
    FLOAT_LINEARS,
    float_linear,
    sibling_names,
)

DESCRIPTION = "quant_model_description.json"
FLOAT = "FLOAT"
# Model types whose experts the engine finds by itself; for others it looks up the name of the set.
# Source: vllm-ascend 182b75ea84, quantization/modelslim_config.py:105-363, entries with `experts`.
LISTED_EXPERTS = frozenset(
    {
        "bailing_hybrid", "deepseek_mtp", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4",
        "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text",
        "glm_moe_dsa", "kimi_k2", "longcat_flash", "minimax_m2", "minimax_m3", "minimax_m3_vl",
        "pangu_ultra_moe", "pangu_ultra_moe_mtp", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
        "qwen3_omni_moe", "qwen3_vl_moe", "step3p5", "step3p5_mtp",
    }
)  # fmt: skip

# Linears that the engine builds without a look at the description, by the last part of their names.
# Sources: as for FLOAT_LINEARS; vllm-ascend 182b75ea84, attention/mla_v1.py:908-909 (kv_b_proj);
# vllm 0.32.0, model_executor/models/deepseek_v2.py:712 (wk).
_ALWAYS_FLOAT = {"kv_b_proj": "latent attention absorbs kv_b_proj, which must be float"}


def float_only(module: str) -> str | None:
    """The reason why the engine always builds this module as float; None if it does not."""
    parent, _, last = module.rpartition(".")
    if last in EMBEDDINGS:
        return "the engine has no quantized embedding"
    if last == "wk" and parent.endswith(".indexer"):
        return FLOAT_LINEARS["weights_proj"]
    return _ALWAYS_FLOAT.get(last) or float_linear(module)


def skip_rule(labels: Mapping[str, str]) -> Iterator[Refusal]:
    """Refusals of modules that the loader takes for float: a float weight's name begins with theirs.

    Fused siblings are looked up by their full names instead; experts by the name of their set.
    Source: is_layer_skipped_ascend in vllm-ascend 182b75ea84, quantization/modelslim_config.py:776-808.
    """
    floats = sorted(f"{name}.weight" for name, label in labels.items() if label == FLOAT)
    seen: set[str] = set()
    for name, label in labels.items():
        expert = EXPERT.fullmatch(name)
        prefix = expert["experts"] if expert else name
        if label == FLOAT or prefix in seen or (not expert and sibling_names(name)):
            continue
        seen.add(prefix)
        position = bisect_left(floats, prefix)
        if position < len(floats) and floats[position].startswith(prefix):
            other = floats[position].removesuffix(".weight")
            yield Refusal(
                name,
                f"`{prefix}` begins the name of `{other}`, which stays float: the engine would take "
                "both for float and misread the codes",
                "give both the same scheme",
            )
