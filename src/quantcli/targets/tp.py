"""What tensor parallelism asks of any checkpoint: heads and inputs that can be split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantcli.findings import Finding, failed

# Last parts of the names of modules whose inputs are split; others' outputs are.
_ROW_PARALLEL = frozenset({"o_proj", "down_proj", "out_proj", "w2", "dense", "c_proj", "dense_4h_to_h"})


def splits_inputs(module: str) -> bool:
    """Whether devices share a module's inputs; else they share its outputs."""
    return module.rpartition(".")[2] in _ROW_PARALLEL


def check_heads(config: Mapping[str, Any], size: int) -> Iterator[Finding]:
    """Findings for `size` devices; config is the language model's part of config.json."""
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and heads % size:
        yield cannot_split(size, f"{heads} attention heads cannot be split over {size} devices", None)
    if isinstance(kv_heads, int) and kv_heads and kv_heads % size and size % kv_heads:
        what = f"{kv_heads} key/value heads cannot be split over {size} devices"
        yield cannot_split(size, what, None)


def cannot_split(size: int, what: str, module: str | None) -> Finding:
    """A finding for `size` devices."""
    fix = f"serve with another tensor parallel size than {size}"
    fix += ", or keep such modules in another scheme" if module else ""
    return failed("tp", what, f"`{module}`, --tp {size}" if module else f"--tp {size}", fix)
