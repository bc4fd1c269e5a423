"""Rules of vLLM-Ascend for names: modules that it never quantizes, and names that it looks up."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping

from quantcli.targets.base import Refusal
from quantcli.targets.spellings import built_as
from quantcli.targets.vllm_family import (
    EMBEDDINGS,
    EXPERT,
    FLOAT_LINEARS,
    float_linear,
    looked_up_as,
    sibling_names,
)

DESCRIPTION = "quant_model_description.json"
FLOAT = "FLOAT"
# Its key for the largest tensor parallel size that transforms of W4A4_MXFP4_FLATQUANT are made for.
LARGEST_TP = "max_supported_tp"
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

# Families whose classes have no table of fused modules, in vLLM or here: the engine looks siblings up
# by their fused name. Source: vllm 0.32.0, model_executor/models: those that build a QKVParallelLinear
# or a MergedColumnParallelLinear and have no `packed_modules_mapping`.
_WITHOUT_TABLE = frozenset({"stablelm", "orion", "iquestloopcoder", "zamba2"})
# Names that classes of vLLM give modules, other than those of tensors, by model_type.
# Sources: vllm 0.32.0, model_executor/models: stablelm.py (the head of a model without a prefix);
# bert.py:207-213 (attention has the name of its output).
_OWN_NAMES = {
    "stablelm": (re.compile(r"^lm_head$"), ".lm_head"),
    "bert": (re.compile(r"\.attention\.self\.(query|key|value)"), r".attention.output.\1"),
    "roberta": (re.compile(r"\.attention\.self\.(query|key|value)"), r".attention.output.\1"),
    "xlm-roberta": (re.compile(r"\.attention\.self\.(query|key|value)"), r".attention.output.\1"),
}


def also_asked(module: str, model_type: str) -> list[str]:
    """Names under which the engine looks a module up, other than that of its tensor.

    In towers siblings are looked up by their fused name if the model's class has no table of its own.
    """
    names = built_as(module)
    if _SHORT_TOWER.search(module):
        inner = _SHORT_TOWER.sub("vision_tower.vision_model.", module)
        names += [inner, *filter(None, [looked_up_as(inner)])]
    if pattern := _OWN_NAMES.get(model_type):
        names += [name for name in (pattern[0].sub(pattern[1], module),) if name != module]
    fused = looked_up_as(module)
    if fused and (model_type in _WITHOUT_TABLE or _TOWER.search(module)):
        names.append(fused)
    return names


# CLIP and SigLIP, which transformers 5 saves without a part of the name that vLLM has.
# Source: vllm 0.32.0, model_executor/models/siglip.py and clip.py (`vision_model`).
_SHORT_TOWER = re.compile(r"\bvision_tower\.(?!vision_model\.)")
# Float modules of a tower need an entry, too.
_TOWER = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|speech)(?:$|[._])")

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


# Families with modules that no entry of the description can be for, and why.
_UNREACHABLE = {
    "falcon_h1": "vLLM 0.32 names mixers by a number of its own (its falcon_h1.py:345-346)",
    "minicpm3": "vLLM 0.32 builds q_a_proj without a name (its minicpm3.py:85-87)",
    "whisper": "vLLM 0.32 builds its layers under names that begin with a dot (its whisper.py:649)",
}


def unreachable(model_type: str) -> Iterator[Refusal]:
    """A refusal of a family with modules that the engine does not find in any description."""
    if model_type in _UNREACHABLE:
        what = f"`{model_type}` cannot be described for this engine: {_UNREACHABLE[model_type]}"
        yield Refusal("model_type", what, "use `target: compressed-tensors`, or serve the float model")


def unlisted(model_type: str) -> str:
    """A note on experts of a family that is not in LISTED_EXPERTS.

    With the entry the engine builds them by their type; it was tried with its own look-up and vLLM
    0.32's loaders for granitemoe, granitemoehybrid, jamba, llama4, mixtral and qwen2_moe.
    """
    return (
        f"vLLM-Ascend does not list the experts of `{model_type}` (its modelslim_config.py:105-363): "
        "it looks up the name of each set, such as `model.layers.0.mlp.experts.weight`, which this "
        "description has; without it the engine stops with a KeyError"
    )


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
        for looked_up in (prefix, *built_as(prefix)):
            position = bisect_left(floats, looked_up)
            if position == len(floats) or not floats[position].startswith(looked_up):
                continue
            other = floats[position].removesuffix(".weight")
            yield Refusal(
                name,
                f"`{looked_up}` begins the name of `{other}`, which stays float: the engine would take "
                "both for float and misread the codes",
                "give both the same scheme",
            )
