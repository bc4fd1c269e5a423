"""Numerics that vLLM loads under `quant_method: fp8`, and the parameters that it registers."""

from __future__ import annotations

from functools import cache
from typing import Literal

from torch import Tensor

from quantcli.core.codes import fp8_values
from quantcli.core.errors import InputError
from quantcli.core.numerics import Numerics, Operand
from quantcli.targets.base import SUPPORT, cannot_store
from quantcli.targets.layouts import (
    Blocks,
    Layout,
    block_scale,
    codes_param,
    module_scale,
    static_inputs,
)

Activations = Literal["static", "dynamic"]
BLOCK = (128, 128)
# Registered parameters and their dtypes: vllm 0.32.0,
# model_executor/layers/quantization/fp8.py:312-345. Loaders copy scales by value into float32; no known
# engine reads E8M0 scales in this format.
_FLOATS = ("F32", "BF16", "F16")
# Scales of a quantized module; a cache of keys and values has other scales, which are not checked.
SUFFIXES = frozenset({"weight_scale", "weight_scale_inv", "input_scale"})
_HOPPER = "NVIDIA GPUs (Ada, Hopper and later)"
LOADS_ON = {
    "fp8 tensor dynamic": f"vLLM 0.32 and later, SGLang; {_HOPPER}, AMD (MI300 and later)",
    "fp8 tensor static": f"vLLM 0.32 and later, SGLang; {_HOPPER}, AMD (MI300 and later)",
    "fp8 block 128x128": (
        f"vLLM 0.32 and later, SGLang, transformers; {_HOPPER}, AMD (MI300 and later); CPUs with AMX"
    ),
}


def numerics_of(activations: Activations, block: tuple[int, int] | None) -> Numerics:
    """The numerics of the engine, from the keys of config.json. block: rows and columns."""
    if block is not None:
        # the engine takes the size of input groups from the rows of a block; known blocks are square
        inputs = Operand("fp8_e4m3", "group", dynamic=True, block=(1, block[0]))
        return Numerics(Operand("fp8_e4m3", "block", block=block), inputs)
    static = Operand("fp8_e4m3", "tensor")
    dynamic = Operand("fp8_e4m3", "token", dynamic=True)
    return Numerics(static, static if activations == "static" else dynamic)


# Labels of the numerics that are written. Other blocks are only read.
WRITTEN = {
    numerics_of("dynamic", None): "fp8 tensor dynamic",
    numerics_of("static", None): "fp8 tensor static",
    numerics_of("dynamic", BLOCK): "fp8 block 128x128",
}


def label_of(numerics: Numerics) -> str:
    """The label of numerics that are written. InputError for others, with the reason."""
    if numerics in WRITTEN:
        return WRITTEN[numerics]
    weight, inputs = numerics.weight, numerics.input
    if weight.dtype != "fp8_e4m3":
        what = f"target `fp8` stores fp8 alone, not {weight.dtype} weights"
    elif weight.per in {"channel", "group"}:
        what = (
            f"target `fp8` cannot store a scale per {weight.per}: under `quant_method: fp8` engines "
            "read one for a weight, or one for each block of 128 x 128"
        )
    elif inputs is None:
        what = "target `fp8` cannot store weights whose inputs stay float"
    else:
        raise cannot_store("fp8", numerics)
    raise InputError(what, fix=SUPPORT)


@cache
def layout_of(numerics: Numerics) -> Layout:
    """The parameters of modules with these numerics, and their meaning."""
    weight = codes_param(numerics.weight)
    if numerics.weight.per == "block":
        assert numerics.weight.block is not None
        rows, columns = numerics.weight.block
        # in spite of its name, codes are multiplied with it
        scale = block_scale("weight_scale_inv", _FLOATS, rows, columns)

        def by_block(blocks: Blocks) -> Tensor:
            return fp8_values(blocks["weight"], blocks["weight_scale_inv"].float(), columns)

        label = f"fp8 block {rows}x{columns}"
        return Layout(label, numerics.weight, (weight, scale), by_block, experts=True)
    # the engine takes the largest scale of fused siblings
    params = [weight, module_scale("weight_scale", _FLOATS)]
    if static_inputs(numerics):
        params.append(module_scale("input_scale", _FLOATS))

    def by_scale(blocks: Blocks) -> Tensor:
        return fp8_values(blocks["weight"]) * blocks["weight_scale"].float().reshape(())

    label = WRITTEN[numerics]
    return Layout(label, numerics.weight, tuple(params), by_scale, experts=True)
