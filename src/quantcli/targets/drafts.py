"""Rules of vLLM for stand-alone drafts: which of its classes load a quantized one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from quantcli.checkpoint.detect import LAYER, Draft, of_draft
from quantcli.targets.base import Refusal

# Classes that vLLM builds with the draft's own quantization: all linears of layers, and `fc`.
# Sources: vllm 0.32.0, model_executor/models: llama_eagle.py:55-57,102-110; llama_eagle3.py:88-91,175,
# 236-244 (registry.py:658-666 has its other names); qwen3_eagle3.py:44-79,168,235-241;
# deepseek_eagle3.py:56-91,166,201-207; qwen3_dflash.py:446,488-502.
_LOADED = frozenset(
    {
        "EagleLlamaForCausalLM", "Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3",
        "PEagleDraftModel", "PeagleLlamaForCausalLM",
        "Eagle3MiniMaxM2ForCausalLM", "Eagle3Qwen2_5vlForCausalLM", "Eagle3Qwen3vlForCausalLM",
        "Eagle3Qwen3ForCausalLM", "PeagleQwen3ForCausalLM", "Eagle3DeepseekV2ForCausalLM",
        "Eagle3DeepseekV3ForCausalLM", "DFlashDraftModel", "DFlashQwen3ForCausalLM",
    }
)  # fmt: skip
_BY_TARGET = (
    "vLLM 0.32 builds it with the quantization of the model that it drafts for, not with its own"
)
_BY_NONE = "vLLM 0.32 builds all of its linears without a quantization"
_REASONS = {
    "MedusaModel": f"{_BY_NONE} (its medusa.py:20-30,76-98)",
    "MLPSpeculatorPreTrainedModel": f"{_BY_NONE} (its mlp_speculator.py:80-160)",
    "EagleDeepSeekMTPModel": f"{_BY_TARGET} (its deepseek_eagle.py:44-65,199-213)",
    "EagleMiniCPMForCausalLM": f"{_BY_TARGET} (its minicpm_eagle.py:165-184,332-355)",
    "Gemma4DSparkModel": f"{_BY_TARGET} (its gemma4_dspark.py:153-180)",
}
FLOAT_DRAFT = "serve the float draft: a quantized model takes one, too"


def refused(draft: Draft) -> Iterator[Refusal]:
    """A refusal of a draft whose class in vLLM does not load a quantized one, or is not known here."""
    if draft.engine in _LOADED:
        return
    reason = _REASONS.get(
        draft.engine,
        "it is not among the classes of vLLM 0.32 (its models/registry.py:625-700) that are known to "
        "build a draft with its own quantization",
    )
    what = f"`{draft.engine}`, a draft ({draft.kind}), cannot be quantized: {reason}"
    yield Refusal("architectures", what, FLOAT_DRAFT)


def uneven(labels: Mapping[str, str]) -> Iterator[Refusal]:
    """Layers of a draft with different labels: vLLM numbers them after those of the target.

    A config cannot name them then, other than all together. labels: of all modules, by name.
    """
    if not of_draft(labels):
        return
    first: dict[str, str] = {}
    unlike: dict[str, list[str]] = defaultdict(list)
    for name, label in labels.items():
        if match := LAYER.fullmatch(name):
            own = first.setdefault(match["rest"], name)
            if labels[own] != label:
                unlike[own].append(name)
    for own, names in unlike.items():
        yield Refusal(
            names[0],
            f"has {labels[names[0]]}, and `{own}` {labels[own]}: vLLM numbers layers of a draft after "
            "those of its target, so a config can only name all of them together",
            f'match them together, such as "*.{own.rpartition(".")[2]}"',
        )
