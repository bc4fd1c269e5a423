"""Whether a compressed-tensors checkpoint can be split over devices (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantcli.findings import Finding
from quantcli.targets.layouts import StoredModule
from quantcli.targets.siblings import FUSED
from quantcli.targets.tp import cannot_split, check_heads, splits_inputs

_REPLICATED = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})


def check_tp(
    config: Mapping[str, Any], modules: Iterable[StoredModule], size: int
) -> Iterator[Finding]:
    """Findings for `size` devices; config is the language model's part of config.json."""
    yield from check_heads(config, size)
    known = {module.name: module for module in modules}
    for module in known.values():
        n, k = module.shape
        by_inputs = splits_inputs(module.name)
        if by_inputs and k % size:
            yield cannot_split(size, f"{k} inputs cannot be split over {size} devices", module.name)
            continue
        parts = _parts(module.name, config, size)
        part = (n, k // size) if by_inputs else (n // parts, k)
        for what in _limits(module, *part, split=parts > 1, fused=_earlier(module.name, known)):
            yield cannot_split(size, what, module.name)


def _parts(module: str, config: Mapping[str, Any], size: int) -> int:
    """Over how many devices a module is split: not over all, where there are fewer heads."""
    last, kv_heads = module.rpartition(".")[2], config.get("num_key_value_heads")
    if last in _REPLICATED:
        return 1
    if last in {"k_proj", "v_proj"} and isinstance(kv_heads, int) and 0 < kv_heads < size:
        return kv_heads
    return size


def _earlier(module: str, known: Mapping[str, StoredModule]) -> bool:
    """Whether others follow it in the parameter that the engine makes of siblings."""
    parent, _, last = module.rpartition(".")
    group = next((group for group in FUSED if last in group), (last,))
    later = group[group.index(last) + 1 :]
    return any(f"{parent}.{sibling}" in known for sibling in later)


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
