"""Whether a checkpoint for vLLM-Ascend can be split over devices (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantcli.core.findings import Finding
from quantcli.core.numerics import Module, decompose
from quantcli.targets.base import Refusal
from quantcli.targets.layouts import StoredModule
from quantcli.targets.tensor_parallel import cannot_split, check_heads, splits_inputs

_MX_COLUMNS = 64  # of a row on one device: two blocks of 32 at a time
_LARGEST_SIDE = 256  # of a Kronecker transform
_STEP = 8  # of its right side
_SLICES = 16  # of k, in the scale_bias of W4A8


def unfit(module: str, k: int, tp: int | None) -> str | None:
    """Why the kernel cannot transform a module's k inputs; None where it can.

    tp: the tensor parallel size to serve with; None: any.
    """
    if splits_inputs(module) and tp != 1:
        return (
            "its inputs are split over devices, for which one transform of all of them does not do; "
            "`target: {name: ascend, tp: 1}` allows it on one device"
        )
    left, right = decompose(k)
    if not left:
        return f"{k} inputs have no decomposition as the engine makes them"
    if right % _STEP or max(left, right) > _LARGEST_SIDE:
        return (
            f"{k} inputs decompose into {left} x {right}, and the kernel takes sides up to "
            f"{_LARGEST_SIDE}, the right one a multiple of {_STEP}"
        )
    return None


def unsplit(module: Module, size: int) -> Iterator[Refusal]:
    """Whether a quantized module can be split over `size` devices."""
    if module.numerics is not None:
        rows = splits_inputs(module.name)
        sides = module.shape[1] if rows else module.shape[0]
        if sides % size:
            what = f"its {sides} {'inputs' if rows else 'outputs'} do not split over {size} devices"
            yield Refusal(module.name, what, f"set the target's `tp` to a divisor of {sides}")


def check_tp(
    config: Mapping[str, Any], modules: Iterable[StoredModule], size: int
) -> Iterator[Finding]:
    """Findings for `size` devices; config is the language model's part of config.json."""
    yield from check_heads(config, size)
    for module in modules:
        rows = splits_inputs(module.name)
        columns = module.shape[1]
        if rows and columns % size:
            yield cannot_split(
                size, f"{columns} inputs cannot be split over {size} devices", module.name
            )
            continue
        for what in _limits(module, columns // size if rows else columns, size if rows else 1):
            yield cannot_split(size, what, module.name)


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
        elif why := unfit("", k, 1):
            yield why
    if label.startswith("W8A8_MX") and parts > 1 and k % _MX_COLUMNS:
        yield f"{label} needs inputs in multiples of {_MX_COLUMNS} on each device; there are {k}"
    bias = module.tensors.get("scale_bias")
    if bias is not None and parts > 1 and bias.spec.shape[1] > 1 and _SLICES % parts:
        yield f"its scale_bias has {_SLICES} slices, which do not split over {parts} devices"
