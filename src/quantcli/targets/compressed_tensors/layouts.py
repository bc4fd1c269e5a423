"""The tensors that vLLM registers for a module in compressed-tensors, and their meaning."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from torch import Tensor

from quantcli.core.codes import code_values, scale_groups, scale_values, unpack_columns, unpack_signed
from quantcli.core.numerics import Numerics
from quantcli.targets.compressed_tensors.kinds import Kind
from quantcli.targets.layouts import (
    FLOAT_PARAM,
    Blocks,
    Layout,
    Param,
    Sides,
    block_scale,
    code_sides,
    codes_param,
    global_scale,
    module_scale,
    row_scale,
    static_inputs,
)

# Suffixes of parameters of quantized modules, in any scheme of any producer.
SUFFIXES = frozenset(
    {
        "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale",
        "input_zero_point", "weight_g_idx", "weight_scale_inv", "weight_global_scale",
        "input_global_scale",
    }
)  # fmt: skip


@cache
def layout_of(numerics: Numerics, kind: Kind) -> Layout:
    """The parameters of modules with these numerics."""
    weight = numerics.weight
    params = [_codes(numerics, kind), _weight_scale(numerics)]
    if kind.packed:
        params.append(Param("weight_shape", ("I64", "I32"), lambda n, k: (2,), "codes", 0))
    if not weight.symmetric:
        params.append(_zero_point(numerics, kind))
    if weight.global_scale:
        params.append(global_scale("weight_global_scale", "divisor"))
    if numerics.input and numerics.input.global_scale:
        params.append(global_scale("input_global_scale"))
    if static_inputs(numerics):
        params.append(module_scale("input_scale", shared=True))
        if numerics.input and not numerics.input.symmetric:
            one = lambda n, k: (1,)  # noqa: E731
            params.append(Param("input_zero_point", ("I8",), one, "codes", 0, shared=True, scalar=True))

    def dequantize(blocks: Blocks) -> Tensor:
        codes = _unpacked(blocks, kind, numerics)
        scale = scale_values(blocks["weight_scale"])
        if scale.numel() == 1:
            values = codes * scale.reshape(())
        else:
            values = scale_groups(codes, scale, weight.block[1] if weight.block else codes.shape[1])
        if weight.global_scale:  # last: products of a code and its scale are exact
            values /= blocks["weight_global_scale"].float().reshape(())
        return values

    def words(shape: tuple[int, ...]) -> Sides:
        """n and k; packed codes may have fewer columns, which only weight_shape records."""
        return shape[0], shape[1] * (32 // kind.bits)

    sides = words if kind.packed else code_sides(weight)
    return Layout(kind.label, weight, tuple(params), dequantize, sides, experts=kind.experts)


def _codes(numerics: Numerics, kind: Kind) -> Param:
    bits = kind.bits
    if kind.packed:
        return Param("weight_packed", ("I32",), lambda n, k: (n, -(-k * bits // 32)), "codes")
    codes = codes_param(numerics.weight)
    return replace(codes, suffix="weight_packed") if numerics.weight.element.per_byte > 1 else codes


def multiplier(divisor: Tensor) -> Tensor:
    """A global scale as the engine multiplies with it: float32 [1]. divisor: as stored, [1] or [].

    Source: vllm 0.32.0, model_executor/layers/quantization/compressed_tensors/schemes/
    compressed_tensors_w4a4_nvfp4.py:101-137.
    """
    return 1 / divisor.float().reshape(1)


def _weight_scale(numerics: Numerics) -> Param:
    weight = numerics.weight
    if weight.per == "tensor":
        return module_scale("weight_scale")
    if weight.per == "block" and weight.block:
        return block_scale("weight_scale", FLOAT_PARAM, *weight.block)
    return row_scale(weight)


def _zero_point(numerics: Numerics, kind: Kind) -> Param:
    """Zero points, packed like weights but along rows."""
    each = 32 // kind.bits
    scales = row_scale(numerics.weight).shape
    shape = lambda n, k: (-(-n // each), scales(n, k)[1])  # noqa: E731
    return Param("weight_zero_point", ("I32",), shape, "codes", each)


def _unpacked(blocks: Blocks, kind: Kind, numerics: Numerics) -> Tensor:
    """Codes minus their zero points: float32 [rows, k]."""
    if not kind.packed:
        codes = blocks.get("weight_packed", blocks.get("weight"))
        assert codes is not None
        return code_values(codes, numerics.weight.element)
    k = int(blocks["weight_shape"][1])
    codes = unpack_signed(blocks["weight_packed"], kind.bits, k).float()
    if "weight_zero_point" not in blocks:
        return codes
    zero = unpack_columns(blocks["weight_zero_point"], kind.bits, len(codes)).float()
    width = numerics.weight.group_size or k
    return codes - zero.repeat_interleave(width, 1)[:, :k]
