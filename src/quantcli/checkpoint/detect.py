"""What a checkpoint is, read from its headers and files: quantized already, or a stand-alone draft.

A draft guesses the next tokens of another model, its target, from that model's hidden states. No torch.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint, read_json_file
from quantcli.checkpoint.config.places import quantization_blocks
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError

# Suffixes of tensors that only a quantized checkpoint has.
_SUFFIXES = frozenset(
    {
        "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed", "weight_zero_point",
        "weight_offset", "qweight", "qzeros", "deq_scale", "quant_bias", "input_scale", "absmax",
    }
)  # fmt: skip
# Tensors for a cache of keys and values: of no weight, and of no use to another engine.
_CACHE = re.compile(
    r".*\.([kvq]_scale|[kv]_zero_point|kv_cache_(scale|offset)|fa_[qkv]\.(scale|offset)"
    r"|[kvq]_proj\.output_scale)"
)
_CODES = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4"})


# The one layer of EAGLE3, or numbered ones: vLLM puts `model.` before the names of a draft's tensors.
# Source: vllm 0.32.0, model_executor/models/llama_eagle3.py:255-263,378-388.
LAYER = re.compile(r"(?:midlayer|layers\.\d+)\.(?P<rest>.+)")
# The classes of drafts: the kind of draft, and the class of its layers.
# Sources: vllm 0.32.0, model_executor/models/registry.py:625-700, transformers_utils/configs:
# eagle.py:43-77 and speculators/algos.py:14-160.
_CLASS = re.compile(
    r"(?P<kind>Eagle3|Eagle|PEagle|Peagle|DFlash|DFlash2|DSpark|LiLiCorr)(?=[A-Z]).*"
    r"|.*(?P<end>Eagle3|DFlash|DSparkModel)"
)
_KINDS = {"Eagle": "EAGLE", "Eagle3": "EAGLE3", "PEagle": "P-EAGLE", "Peagle": "P-EAGLE"}
_SPECULATORS = {"eagle": "EAGLE", "eagle3": "EAGLE3", "peagle": "P-EAGLE", "dflash": "DFlash"}
_MEDUSA_HEAD = re.compile(r"(medusa_heads\.)?\d+\.\d+\.(linear\.)?(weight|bias)")


@dataclass(frozen=True)
class Quantization:
    """A format by its usual name, the number of its modules, and a tensor as the evidence."""

    format: str
    modules: int
    evidence: str


def quantization(checkpoint: Checkpoint) -> Quantization | None:
    """How the weights are quantized; None for a float checkpoint.

    The tensors decide; config.json and descriptions only give the name. A config that speaks of
    quantization over float weights is stale, and is not quantization.
    """
    specs = [spec for spec in checkpoint.specs() if is_quantized(spec)]
    if not specs:
        return None
    modules = {_module(spec.name) for spec in specs}
    return Quantization(_name(checkpoint, specs), len(modules), f"`{specs[0].name}` {specs[0]}")


def is_quantized(spec: TensorSpec) -> bool:
    """Whether only a quantized checkpoint has such a tensor."""
    suffix = spec.name.rpartition(".")[2]
    if suffix in _SUFFIXES or suffix.endswith(("_blocks", "_scales")):
        return True
    return suffix == "weight" and spec.dtype in _CODES


def of_cache(name: str) -> bool:
    """Whether a tensor is a scale or an offset of the cache of keys and values."""
    return _CACHE.fullmatch(name) is not None


def _module(tensor: str) -> str:
    """`x` of `x.weight`, of `x.weight_scale`, and of bitsandbytes' `x.weight.absmax`."""
    return tensor.rpartition(".")[0].removesuffix(".weight")


def _name(checkpoint: Checkpoint, specs: list[TensorSpec]) -> str:
    if "quant_model_description.json" in checkpoint.left_out:
        try:
            table = read_json_file(checkpoint.path / "quant_model_description.json")
        except InputError:
            return "ascend (unreadable description)"
        stored = {
            k: v for k, v in table.items() if k in checkpoint.tensors
        }  # without entries of absent tensors
        weights = (v for k, v in stored.items() if k.endswith(".weight") and isinstance(v, str))
        kinds = Counter(kind for kind in weights if kind != "FLOAT")
        named = ", ".join(f"{_printable(kind)} {count}" for kind, count in kinds.most_common(9))
        return f"ascend ({named or 'no kinds named'})"
    for block in quantization_blocks(checkpoint.config, checkpoint.text_config):
        method = _printable(block.text("quant_method") or "unnamed")
        sides = block.value("weight_block_size")
        if isinstance(sides, list) and [type(side) for side in sides] == [int, int]:
            return f"{method} (blocks of {_printable(sides[0])} x {_printable(sides[1])})"
        words = (block.value(key) for key in ("format", "bits", "quant_algo"))
        detail = sides or next(filter(None, words), None)
        return f"{method} ({_printable(detail)})" if detail else method
    return "unnamed, " + ", ".join(sorted({spec.dtype for spec in specs}))


def _printable(value: Any) -> str:
    """An untrusted value as short text without control characters."""
    if isinstance(value, str) and value.isprintable():
        return value[:40]
    return reprlib.repr(value)


@dataclass(frozen=True)
class Draft:
    """kind: such as EAGLE3. engine: vLLM's class for it, such as Eagle3LlamaForCausalLM."""

    kind: str
    engine: str


def must_run_alone(checkpoint: Checkpoint) -> None:
    """InputError for a draft: what it reads are hidden states of its target."""
    if draft := draft_of(checkpoint):
        raise InputError(
            f"this is a draft ({draft.kind}), whose inputs are the hidden states of another model: it "
            "cannot be run alone",
            where=str(checkpoint.path),
            fix="take a scheme that needs no data, such as w8a8_dynamic, and no calibration method",
        )


def of_draft(names: Collection[str]) -> bool:
    """Whether names of tensors or modules are those of a draft: `fc` joins what it reads.

    Names of layers have no `model.` before them.
    """
    if not any(name == "fc" or name.startswith(("fc.", "midlayer.")) for name in names):
        return False
    return any(LAYER.match(name) for name in names)


def draft_of(checkpoint: Checkpoint) -> Draft | None:
    """The draft that a checkpoint holds; None if it is a model of its own."""
    config, names = checkpoint.config, checkpoint.tensors
    first = next(iter(config.texts("architectures")), "")
    own = first if first and first.isprintable() else "no class"
    kind = config.text("model_type") or ""
    if kind == "medusa" or own.startswith("Medusa") or _medusa(config, names):
        return Draft("Medusa", "MedusaModel")
    if kind == "mlp_speculator" or own.startswith("MLPSpeculator"):
        return Draft("MLP speculator", "MLPSpeculatorPreTrainedModel")
    if (algorithm := config.text("speculators_model_type")) is not None:
        layers = config.table("transformer_layer_config")
        return _of_speculators(algorithm, (layers and layers.text("model_type")) or "llama")
    match = _CLASS.fullmatch(own)
    if match is None and not of_draft(names):
        return None
    kind = (match["kind"] or match["end"]) if match else ""
    if kind == "DFlash" or "dflash_config" in config:
        return Draft("DFlash", own if match else f"DFlash{own}")
    if kind not in ("", *_KINDS):
        return Draft(kind.removesuffix("Model"), own)
    if not kind:
        parts = {part for name in names for part in name.split(".")}
        kind = "Eagle3" if parts & {"d2t", "midlayer", "hidden_norm"} else "Eagle"
    return Draft(_KINDS[kind], own if match else f"{kind}{own}")


def _of_speculators(algorithm: str, layers: str) -> Draft:
    """A draft of the project speculators. layers: the `model_type` of its layers."""
    kind = _SPECULATORS.get(algorithm, algorithm)
    beginning = {"EAGLE3": "Eagle3", "P-EAGLE": "Peagle"}.get(kind)
    if beginning and layers in ("llama", "qwen3"):
        return Draft(kind, f"{beginning}{layers.capitalize()}ForCausalLM")
    return Draft(kind, "DFlashDraftModel" if kind == "DFlash" else f"{kind} of {layers}")


def _medusa(config: Settings, names: Collection[str]) -> bool:
    """Whether names are those of Medusa's own repository, with a number for each head."""
    if not names or not all(_MEDUSA_HEAD.fullmatch(name) for name in names):
        return False
    return "medusa_num_heads" in config or any(name.startswith("medusa_heads.") for name in names)
