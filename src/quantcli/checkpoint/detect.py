"""The quantization that a checkpoint has already, read from its headers and files. No torch here."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from quantcli.checkpoint.checkpoint import QUANTIZATION_KEYS, Checkpoint, read_json_file
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
    for level in (checkpoint.config, checkpoint.text_config):
        for key in QUANTIZATION_KEYS:
            block = level.get(key)
            if isinstance(block, dict):
                method = _printable(block.get("quant_method", "unnamed"))
                sides = block.get("weight_block_size")
                if isinstance(sides, list) and [type(side) for side in sides] == [int, int]:
                    return f"{method} (blocks of {_printable(sides[0])} x {_printable(sides[1])})"
                detail = sides or block.get("format") or block.get("bits")
                return f"{method} ({_printable(detail)})" if detail else method
    return "unnamed, " + ", ".join(sorted({spec.dtype for spec in specs}))


def _printable(value: Any) -> str:
    """An untrusted value as short text without control characters."""
    if isinstance(value, str) and value.isprintable():
        return value[:40]
    return reprlib.repr(value)
