"""What tensor parallelism asks of checkpoints: heads, inputs, blocks and groups that can be split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantcli.core.findings import Finding, failed
from quantcli.targets.layouts import StoredModule
from quantcli.targets.vllm_family import FUSED

# Last parts of the names of modules whose inputs are split; others' outputs are.
_ROW_PARALLEL = frozenset({"o_proj", "down_proj", "out_proj", "w2", "dense", "c_proj", "dense_4h_to_h"})
# What every device has whole.
_REPLICATED = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})


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


def check_tp(
    config: Mapping[str, Any], modules: Iterable[StoredModule], size: int
) -> Iterator[Finding]:
    """Findings for `size` devices, from numerics and shapes; config is the language model's part of
    config.json. For formats that ask nothing else."""
    yield from check_heads(config, size)
    by_name = {module.name: module for module in modules}
    for module in by_name.values():
        n, k = module.shape
        by_inputs = splits_inputs(module.name)
        if by_inputs and k % size:
            yield cannot_split(size, f"{k} inputs cannot be split over {size} devices", module.name)
            continue
        parts = _parts(module.name, config, size)
        part = (n, k // size) if by_inputs else (n // parts, k)
        for what in _limits(module, *part, split=parts > 1, fused=_earlier(module.name, by_name)):
            yield cannot_split(size, what, module.name)


def _parts(module: str, config: Mapping[str, Any], size: int) -> int:
    """Over how many devices a module is split: not over all, where there are fewer heads."""
    last, kv_heads = module.rpartition(".")[2], config.get("num_key_value_heads")
    if last in _REPLICATED:
        return 1
    if last in {"k_proj", "v_proj"} and isinstance(kv_heads, int) and 0 < kv_heads < size:
        return kv_heads
    return size


def _earlier(module: str, by_name: Mapping[str, StoredModule]) -> bool:
    """Whether others follow it in the parameter that the engine makes of siblings."""
    parent, _, last = module.rpartition(".")
    group = next((group for group in FUSED if last in group), (last,))
    later = group[group.index(last) + 1 :]
    return any(f"{parent}.{sibling}" in by_name for sibling in later)


def _limits(module: StoredModule, n: int, k: int, *, split: bool, fused: bool) -> Iterator[str]:
    """What the module's format does not allow; n, k: of the weight on one device."""
    label = module.layout.label
    numerics = module.numerics
    assert numerics is not None
    weight = numerics.weight
    inputs = split and splits_inputs(module.name)
    if weight.per == "block" and weight.block:
        rows, columns = weight.block
        if n % rows and (fused or (split and not inputs)):
            yield f"{label} needs outputs in multiples of {rows} on each device; there are {n}"
        if inputs and k % columns:
            yield f"{label} needs inputs in multiples of {columns} on each device; there are {k}"
    if weight.per == "group" and weight.block and k % weight.block[1]:
        yield f"{label} needs inputs in multiples of {weight.block[1]} on each device; there are {k}"
    if "weight_packed" in module.tensors:
        each = 32 // (4 if weight.dtype == "int4" else 8)
        if k % each:
            yield f"{label} needs inputs in multiples of {each} on each device; there are {k}"
