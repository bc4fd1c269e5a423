"""Families whose experts an engine of the vLLM family would misread: the reasons."""

from __future__ import annotations

# Families with experts whose quantized matrices the engine would misread, refuse or leave out, by
# `model_type`: the reason, and what works.
# Sources: vllm 0.32.0, model_executor/models/gpt_oss.py:1167-1286,1419-1441 (single `gate_proj` and
# `up_proj` match no name and are skipped; `down_proj.weight` is taken for [in, out]), which
# openai_privacy_filter.py:83,122-127 uses; dbrx.py:88-141,386-420 (whole `w1`, `v1` and `w2` alone,
# with at most one scale for each expert); models/inkling/nvidia/moe.py (load_expert_weight);
# model_executor/models/transformers/moe.py:255-265 (experts have parameters of three dimensions alone).
_SKIPPED = (
    "vLLM 0.32 would skip the gates of single experts without a word and serve uninitialised memory "
    "(its gpt_oss.py:1167-1286)"
)
_ELSE_FLOAT = (
    "put a rule with `scheme: keep` for its experts before the others: they are copied as stacks"
)
_WHOLE = (
    "vLLM 0.32 reads the experts of Inkling as whole stacks, quantized or not (load_expert_weight of "
    "its models/inkling/nvidia/moe.py:546-617), and this version writes single ones"
)
MISREAD = {
    "gpt_oss": (_SKIPPED, f"{_ELSE_FLOAT}; or serve the family's own MXFP4 checkpoint"),
    "openai_privacy_filter": (_SKIPPED, _ELSE_FLOAT),
    "dbrx": (
        "vLLM 0.32 reads the experts of DBRX as whole tensors, with one scale for each expert at most "
        "(its dbrx.py:88-141,386-420)",
        _ELSE_FLOAT,
    ),
    "inkling_text": (_WHOLE, _ELSE_FLOAT),
    "inkling_mm_model": (_WHOLE, _ELSE_FLOAT),
    "muse_spark_text": (
        "vLLM 0.32 has no class for it, and its Transformers backend leaves experts that have a norm "
        "as float stacks (model_executor/models/transformers/moe.py:255-265)",
        _ELSE_FLOAT,
    ),
}
# Families none of whose experts an engine builds: the reason.
# Source: vllm 0.32.0, model_executor/models/registry.py and transformers/moe.py:255-265 (experts are
# found by the name `experts`, with parameters of three dimensions alone).
NO_CLASS = {
    "jetmoe": "vLLM 0.32 has no class for JetMoE, and its Transformers backend finds no experts under "
    "the names `input_linear` and `output_linear`"
}
