"""Whether a checkpoint for vLLM-Ascend can be split over devices (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantcli.findings import Finding, failed
from quantcli.targets.ascend_layouts import decompose
from quantcli.targets.layouts import StoredModule

# Last parts of the names of modules whose inputs are split; others' outputs are.
_ROW_PARALLEL = frozenset({"o_proj", "down_proj", "out_proj", "w2", "dense", "c_proj", "dense_4h_to_h"})
_MX_COLUMNS = 64  # of a row on one device: two blocks of 32 at a time
_LARGEST_SIDE = 256  # of a Kronecker transform
_SLICES = 16  # of k, in the scale_bias of W4A8


def check_tp(
    config: Mapping[str, Any], modules: Iterable[StoredModule], size: int
) -> Iterator[Finding]:
    """Findings for `size` devices; config is the language model's part of config.json."""
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and heads % size:
        yield _failed(size, f"{heads} attention heads cannot be split over {size} devices", None)
    if isinstance(kv_heads, int) and kv_heads and kv_heads % size and size % kv_heads:
        yield _failed(size, f"{kv_heads} key/value heads cannot be split over {size} devices", None)
    for module in modules:
        rows = module.name.rpartition(".")[2] in _ROW_PARALLEL
        columns = module.shape[1]
        if rows and columns % size:
            yield _failed(size, f"{columns} inputs cannot be split over {size} devices", module.name)
            continue
        for what in _limits(module, columns // size if rows else columns, size if rows else 1):
            yield _failed(size, what, module.name)


def _limits(module: StoredModule, k: int, parts: int) -> Iterator[str]:
    """What the module's type does not allow; k: inputs on one device, of `parts`."""
    label = module.layout.label
    if label.startswith("W4A4") and k % 8:
        yield f"{label} needs inputs in multiples of 8 on each device; there are {k}"
    if "left_trans" in module.tensors:
        stored = tuple(module.tensors[s].spec.shape[0] for s in ("left_trans", "right_trans"))
        left, right = decompose(k)
        if (left, right) != stored:
            yield (
                f"{label} is stored with transforms of {stored[0]} and {stored[1]}; for {k} inputs on "
                f"each device the engine expects {left} and {right}"
            )
        elif right % 8 or max(left, right) > _LARGEST_SIDE:
            yield f"the kernel takes no transforms of {left} and {right}"
    if label.startswith("W8A8_MX") and parts > 1 and k % _MX_COLUMNS:
        yield f"{label} needs inputs in multiples of {_MX_COLUMNS} on each device; there are {k}"
    bias = module.tensors.get("scale_bias")
    if bias is not None and parts > 1 and bias.spec.shape[1] > 1 and _SLICES % parts:
        yield f"its scale_bias has {_SLICES} slices, which do not split over {parts} devices"


def _failed(size: int, what: str, module: str | None) -> Finding:
    fix = f"serve with another tensor parallel size than {size}"
    fix += ", or keep such modules in another scheme" if module else ""
    return failed("tp", what, f"`{module}`, --tp {size}" if module else f"--tp {size}", fix)
