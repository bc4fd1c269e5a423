"""Whether a checkpoint for vLLM-Ascend can be split over devices (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterator

from quantcli.core.numerics import LARGEST_SIDE, Module, Operand, decompose
from quantcli.targets.ascend.types import QuantType
from quantcli.targets.base import Refusal
from quantcli.targets.layouts import StoredModule
from quantcli.targets.tensor_parallel import splits_inputs

# The loader pairs the scales of a row. Source: vllm-ascend 182b75ea84,
# quantization/methods/w8a8_mxfp8.py:153-160, quantization/method_adapters.py:113-118.
_GROUPS = 2
# The right side of a Kronecker transform is a multiple of it, by the type of codes. Source: op-plugin
# 517f2e7d, op_plugin/ops/opapi/KroneckerQuantKernelNpuOpApi.cpp.
_STEPS = {"int4": 8, "fp4_e2m1": 2}
# The largest tensor parallel size of transforms for MXFP4, if the description has none. Source:
# vllm-ascend 182b75ea84, quantization/methods/w4a4_mxfp4_flatquant.py:73.
USUAL_TP = 4
# Slices of k in a scale_bias. Source: vllm-ascend 182b75ea84, quantization/methods/w4a8.py:130-131.
SLICES = 16


def unfit(module: Module, k: int, tp: int | None) -> str | None:
    """The reason why the kernel cannot transform a module's k inputs; None if it can.

    tp: the tensor parallel size to serve with; None: any, or any that divides USUAL_TP.
    """
    assert module.numerics is not None
    weight, shared = module.numerics.weight, splits_inputs(module.name)
    if weight.dtype == "int4" and shared and tp != 1:
        return (
            "its inputs are split over devices, and its transform mixes all of them; "
            "`target: {name: ascend, tp: 1}` allows it on one device"
        )
    blocks = (tp or USUAL_TP) if shared and weight.dtype != "int4" else 1
    if reason := no_sides(weight, k, blocks):
        return reason
    step = pairs_of_groups(weight) or 1
    if k // blocks % step:
        return f"its {k // blocks} inputs on each of {blocks} devices are not a multiple of {step}"
    if module.numerics.blocks == blocks:
        return None
    if shared:
        return f"up to {blocks} devices share its inputs, and its transform is in so many blocks"
    return "each device has all of its inputs, and its transform is in one block"


def no_sides(weight: Operand, k: int, blocks: int = 1) -> str | None:
    """The reason why k inputs have no transform that the kernel takes; None if they have."""
    left, right = decompose(k, blocks)
    parts = f" and {blocks} blocks" if blocks > 1 else ""
    if not left:
        return f"{k} inputs have no decomposition into two sides{parts} by the engine's rule"
    step = _STEPS[weight.dtype]
    if right % step or max(left, right) > LARGEST_SIDE:
        return (
            f"{k} inputs decompose into {left} x {right}{parts}, and the kernel takes sides up to "
            f"{LARGEST_SIDE}, the right one a multiple of {step}"
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


def limits(module: StoredModule, k: int, devices: int, largest_tp: int) -> Iterator[str]:
    """Reasons why the engine cannot split a module; k: inputs on one of the `devices` that share it.

    largest_tp: as the description has it for transforms of MXFP4.
    """
    layout = module.layout
    assert isinstance(layout, QuantType)
    label, weight, shared = layout.label, layout.operand, splits_inputs(module.name)
    if k % layout.inputs:
        yield f"{label} needs inputs in multiples of {layout.inputs} on each device; there are {k}"
    if "left_trans" in module.tensors and weight.dtype == "int4":
        stored = tuple(module.tensors[s].spec.shape[0] for s in ("left_trans", "right_trans"))
        left, right = decompose(k)
        if (left, right) != stored:
            yield (
                f"{label} is stored with transforms of {stored[0]} and {stored[1]}; for {k} inputs on "
                f"each device the engine expects {left} and {right}"
            )
        elif reason := no_sides(weight, k):
            yield reason
    elif "left_trans" in module.tensors:
        if devices > largest_tp or (shared and layout.blocks % devices):
            yield f"transforms of {label} are made for {largest_tp} devices and divisors of it"
        elif reason := no_sides(weight, k * devices if shared else k, layout.blocks):
            yield reason
    if devices == 1 or not shared:
        return
    step = pairs_of_groups(weight)
    if step and k % step and step != layout.inputs:
        yield f"{label} needs inputs in multiples of {step} on each device; there are {k}"
    bias = module.tensors.get("scale_bias")
    if bias is not None and bias.spec.shape[1] > 1 and SLICES % devices:
        yield f"its scale_bias has {SLICES} slices, which do not split over {devices} devices"
