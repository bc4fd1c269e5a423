"""What vLLM takes under `quant_method: fp8`: which numerics, and what it registers for a module."""

from __future__ import annotations

from functools import cache
from typing import Literal

from torch import Tensor

from quantcli.core.codes import fp8_values
from quantcli.core.errors import InputError
from quantcli.core.numerics import Numerics, Operand
from quantcli.targets.layouts import Blocks, Layout, Param

Activations = Literal["static", "dynamic"]
BLOCK = (128, 128)
# Loaders copy scales by value into float32; of E8M0 no engine that reads this format is known.
_FLOATS = ("F32", "BF16")
# Other tensors that a quantized module may have; scales of the KV cache go elsewhere.
SUFFIXES = frozenset({"weight_scale", "weight_scale_inv", "input_scale"})
_SUPPORT = "see `quantcli inspect --support` for what goes together"
_HOPPER = "NVIDIA GPUs (Ada, Hopper and later)"
LOADS_ON = {
    "fp8 tensor dynamic": f"vLLM 0.32 and later, SGLang; {_HOPPER}, AMD (MI300 and later)",
    "fp8 tensor static": f"vLLM 0.32 and later, SGLang; {_HOPPER}, AMD (MI300 and later)",
    "fp8 block 128x128": (
        f"vLLM 0.32 and later, SGLang, transformers; {_HOPPER}, AMD (MI300 and later); CPUs with AMX"
    ),
}


def numerics_of(activations: Activations, block: tuple[int, int] | None) -> Numerics:
    """What the engine computes with, from what config.json says. Blocks are of rows and columns."""
    if block is not None:
        # inputs share a scale by the rows of a block, as the engine has it; known blocks are square
        inputs = Operand("fp8_e4m3", "group", dynamic=True, block=(1, block[0]))
        return Numerics(Operand("fp8_e4m3", "block", block=block), inputs)
    static = Operand("fp8_e4m3", "tensor")
    dynamic = Operand("fp8_e4m3", "token", dynamic=True)
    return Numerics(static, static if activations == "static" else dynamic)


# What is written; of other blocks only what others wrote is read.
WRITTEN = {
    numerics_of("dynamic", None): "fp8 tensor dynamic",
    numerics_of("static", None): "fp8 tensor static",
    numerics_of("dynamic", BLOCK): "fp8 block 128x128",
}


def label_of(numerics: Numerics) -> str:
    """The name of numerics that are written. InputError for others, with the reason."""
    if numerics in WRITTEN:
        return WRITTEN[numerics]
    weight, inputs = numerics.weight, numerics.input
    if weight.dtype != "fp8_e4m3":
        what = f"target `fp8` stores fp8 alone, and no {weight.dtype} weights"
    elif weight.per in {"channel", "group"}:
        what = (
            f"target `fp8` cannot store a scale per {weight.per}: under `quant_method: fp8` engines "
            "read one for a weight, or one for each block of 128 x 128"
        )
    elif inputs is None:
        what = "target `fp8` cannot store weights whose inputs stay float"
    else:
        what = f"target `fp8` cannot store {numerics}"
    raise InputError(what, fix=_SUPPORT)


@cache
def layout_of(numerics: Numerics) -> Layout:
    """The parameters of modules with these numerics, and what they stand for."""
    weight = Param("weight", ("F8_E4M3",), lambda n, k: (n, k), "fp8")
    if numerics.weight.per == "block":
        assert numerics.weight.block is not None
        tall, columns = numerics.weight.block
        # it multiplies, whatever its name says
        scale = Param(
            "weight_scale_inv",
            _FLOATS,
            lambda n, k: (-(-n // tall), -(-k // columns)),
            "positive",
            tall,
            spread=True,
        )

        def by_block(blocks: Blocks) -> Tensor:
            return fp8_values(blocks["weight"], blocks["weight_scale_inv"].float(), columns)

        label = f"fp8 block {tall}x{columns}"
        return Layout(label, "fp8_e4m3", (weight, scale), by_block, _sides, experts=True)
    params = [weight, _once("weight_scale")]
    if numerics.input and not numerics.input.dynamic:
        params.append(_once("input_scale"))

    def by_scale(blocks: Blocks) -> Tensor:
        return fp8_values(blocks["weight"]) * blocks["weight_scale"].float().reshape(())

    label = WRITTEN[numerics]
    return Layout(label, "fp8_e4m3", tuple(params), by_scale, _sides, experts=True)


def _once(suffix: str) -> Param:
    """A scale of a whole module. The engine takes the largest of those that it merges."""
    return Param(suffix, _FLOATS, lambda n, k: (1,), "positive", 0, scalar=True)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]
