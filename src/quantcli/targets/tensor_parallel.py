"""Tensor parallelism: whether heads, inputs, blocks and groups of a checkpoint can be split."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from quantcli.checkpoint.config.settings import Settings
from quantcli.core.findings import Finding, failed
from quantcli.targets.base import SplitLimits
from quantcli.targets.layouts import Sides, StoredModule
from quantcli.targets.vllm_family import has_later_sibling, last_part

# Last parts of the names of modules whose inputs are split; of others the outputs are.
# Source: RowParallelLinear in vllm 0.32.0, model_executor/models: llama.py, opt.py, falcon.py,
# mixtral.py.
_ROW_PARALLEL = frozenset({"o_proj", "down_proj", "out_proj", "w2", "dense", "c_proj", "dense_4h_to_h"})
# Modules that every device has whole. Source: vllm 0.32.0,
# model_executor/models/deepseek_v2.py:1052-1065.
_REPLICATED = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})


def splits_inputs(module: str) -> bool:
    """Whether devices share a module's inputs; otherwise they share its outputs."""
    return last_part(module) in _ROW_PARALLEL


def _cannot_split(size: int, what: str, module: str | None) -> Finding:
    """A finding for `size` devices."""
    fix = f"serve with another tensor parallel size than {size}"
    fix += ", or keep such modules in another scheme" if module else ""
    return failed("tp", what, f"`{module}`, --tp {size}" if module else f"--tp {size}", fix)


def check_tp(
    config: Settings, modules: Iterable[StoredModule], size: int, limits: SplitLimits
) -> Iterator[Finding]:
    """Findings for `size` devices; config is the language model's part of config.json."""
    heads, kv_heads = config.size("num_attention_heads"), config.size("num_key_value_heads")
    if heads and heads % size:
        yield _cannot_split(size, f"{heads} attention heads cannot be split over {size} devices", None)
    if kv_heads and kv_heads % size and size % kv_heads:
        what = f"{kv_heads} key/value heads cannot be split over {size} devices"
        yield _cannot_split(size, what, None)
    for module in modules:
        n, k = module.shape
        by_inputs = splits_inputs(module.name)
        if by_inputs and k % size:
            yield _cannot_split(size, f"{k} inputs cannot be split over {size} devices", module.name)
            continue
        devices = devices_of(module.name, config, size)
        sides = (n, k // size) if by_inputs else (n // devices, k)
        for what in limits(module, sides, devices):
            yield _cannot_split(size, what, module.name)


def devices_of(module: str, config: Settings, size: int) -> int:
    """The number of devices that share a module: fewer than `size` if there are fewer heads."""
    last, kv_heads = last_part(module), config.size("num_key_value_heads")
    if last in _REPLICATED:
        return 1
    if last in {"k_proj", "v_proj"} and kv_heads and kv_heads < size:
        return kv_heads
    return size


def limits(module: StoredModule, sides: Sides, devices: int, modules: Collection[str]) -> Iterator[str]:
    """Reasons why vLLM cannot split a module, from its numerics.

    sides: n and k on one of the `devices` that share it. modules: names of all quantized modules.
    """
    label, numerics = module.layout.label, module.numerics
    assert numerics is not None
    weight = numerics.weight
    n, k = sides
    inputs = devices > 1 and splits_inputs(module.name)
    outputs = devices > 1 and not inputs
    if weight.per == "block" and weight.block:
        rows, columns = weight.block
        if n % rows and (outputs or has_later_sibling(module.name, modules)):
            yield f"{label} needs outputs in multiples of {rows} on each device; there are {n}"
        if inputs and k % columns:
            yield f"{label} needs inputs in multiples of {columns} on each device; there are {k}"
    if weight.per == "group" and weight.block and k % weight.block[1]:
        yield f"{label} needs inputs in multiples of {weight.block[1]} on each device; there are {k}"
    if "weight_zero_point" in module.tensors and outputs and n % (32 // weight.element.bits):
        each = 32 // weight.element.bits
        yield f"{label} needs outputs in multiples of {each} on each device; there are {n}"
    if "weight_packed" in module.tensors:
        each = 32 // weight.element.bits
        if k % each:
            yield f"{label} needs inputs in multiples of {each} on each device; there are {k}"
