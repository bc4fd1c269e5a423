"""Whether a checkpoint for vLLM-Ascend can be split over devices (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterator

from quantcli.core.numerics import Module, Operand, decompose
from quantcli.targets.base import Refusal
from quantcli.targets.layouts import StoredModule
from quantcli.targets.tensor_parallel import splits_inputs

# The loader pairs the scales of a row. Source: vllm-ascend 182b75ea84,
# quantization/methods/w8a8_mxfp8.py:153-160, quantization/method_adapters.py:113-118.
_GROUPS = 2
# Sides of a Kronecker transform. Source: ops-nn e5c3fa93,
# quant/flat_quant/op_host/flat_quant_tiling.cpp:369.
_LARGEST_SIDE = 256
# The right side is a multiple of it. Source: op-plugin 517f2e7d,
# op_plugin/ops/opapi/KroneckerQuantKernelNpuOpApi.cpp:39-41.
_STEP = 8
# Slices of k in a scale_bias. Source: vllm-ascend 182b75ea84, quantization/methods/w4a8.py:130-131.
SLICES = 16


def unfit(module: str, k: int, tp: int | None) -> str | None:
    """The reason why the kernel cannot transform a module's k inputs; None if it can.

    tp: the tensor parallel size to serve with; None: any.
    """
    if splits_inputs(module) and tp != 1:
        return (
            "its inputs are split over devices, and its transform mixes all of them; "
            "`target: {name: ascend, tp: 1}` allows it on one device"
        )
    left, right = decompose(k)
    if not left:
        return f"{k} inputs have no decomposition into two sides by the engine's rule"
    if right % _STEP or max(left, right) > _LARGEST_SIDE:
        return (
            f"{k} inputs decompose into {left} x {right}, and the kernel takes sides up to "
            f"{_LARGEST_SIDE}, the right one a multiple of {_STEP}"
        )
    return None


def pairs_of_groups(weight: Operand) -> int | None:
    """Columns that the loader takes together; None for weights without groups of small scales."""
    return _GROUPS * weight.group_size if weight.group_size and weight.scale else None


def unsplit(module: Module, size: int) -> Iterator[Refusal]:
    """A refusal of a quantized module that cannot be split over `size` devices."""
    by_inputs = splits_inputs(module.name)
    width = module.shape[1] if by_inputs else module.shape[0]
    if width % size:
        what = f"its {width} {'inputs' if by_inputs else 'outputs'} do not split over {size} devices"
        yield Refusal(module.name, what, f"set the target's `tp` to a divisor of {width}")
        return
    step = pairs_of_groups(module.numerics.weight) if module.numerics else None
    if by_inputs and step and size > 1 and (width // size) % step:
        what = f"its {width // size} inputs on each of {size} devices are not a multiple of {step}"
        yield Refusal(module.name, what, "set the target's `tp` to another size")


def limits(module: StoredModule, k: int, devices: int) -> Iterator[str]:
    """Reasons why the engine cannot split a module; k: inputs on one of the `devices` that share it."""
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
        elif reason := unfit("", k, 1):
            yield reason
    if devices == 1 or not splits_inputs(module.name):
        return
    step = pairs_of_groups(module.layout.operand)
    if step and k % step:
        yield f"{label} needs inputs in multiples of {step} on each device; there are {k}"
    bias = module.tensors.get("scale_bias")
    if bias is not None and bias.spec.shape[1] > 1 and SLICES % devices:
        yield f"its scale_bias has {SLICES} slices, which do not split over {devices} devices"
