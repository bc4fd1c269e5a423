"""The tensors that vLLM-Ascend registers for each of its quantization types, and their meaning.

Types that this tool does not write are here, too, for checkpoints of other producers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantcli.core.codes import code_values, scale_groups, scale_values, unpack_signed
from quantcli.core.numerics import MXFP4, MXFP8, Numerics, Operand, decompose, multiplier
from quantcli.targets.layouts import (
    FLOAT_PARAM,
    SLICES,
    Blocks,
    Layout,
    Param,
    Sides,
    Values,
    code_sides,
    codes_param,
    row_scale,
)

_INT8, _INT4 = Operand("int8", "channel"), Operand("int4", "channel")
_FP8 = Operand("fp8_e4m3", "channel")


def _scale(required: bool = True) -> Param:
    """A positive scale for each row."""
    return Param("weight_scale", FLOAT_PARAM, lambda n, k: (n, 1), "positive", required=required)


def _offset(required: bool = False) -> Param:
    return Param("weight_offset", FLOAT_PARAM, lambda n, k: (n, 1), "zero", required=required)


def _once(suffix: str, values: Values, *more_dtypes: str) -> Param:
    """A number [1] of a whole module, one for all fused siblings."""
    dtypes = (*more_dtypes, *FLOAT_PARAM)
    return Param(suffix, dtypes, lambda n, k: (1,), values, 0, shared=True)


def _transform(suffix: str, side: int, blocks: int = 1) -> Param:
    """A Kronecker transform of side 0 (left) or 1 (right), square."""
    shape = lambda n, k: (decompose(k, blocks)[side],) * 2  # noqa: E731
    return Param(suffix, FLOAT_PARAM, shape, "finite", 0, shared=True, serving=True)


def _flatquant(blocks: int = 1) -> tuple[Param, ...]:
    """What transforms inputs, and the share of their range that int4 keeps."""
    left, right = _transform("left_trans", 0, blocks), _transform("right_trans", 1, blocks)
    return left, right, _once("clip_ratio", "ratio")


_STATIC = (
    _once("input_scale", "positive"),
    _once("input_offset", "integer", "I8"),  # loaders copy by value: an integral float becomes int8
    Param("quant_bias", ("I32",), lambda n, k: (n,), "codes"),
    Param("deq_scale", ("F32", "I64"), lambda n, k: (n,), "bits", part="weight_scale"),
)


def _pairs(shape: tuple[int, ...]) -> Sides:
    return 2 * shape[0], shape[1]


def per_row(blocks: Blocks) -> Tensor:
    """Codes times weight_scale [rows, 1]."""
    return code_values(blocks["weight"], _INT8.element).mul_(blocks["weight_scale"].float())


def _by_deq(blocks: Blocks) -> Tensor:
    """W8A8 has no weight_scale: it is deq_scale * r, as the engine multiplies inputs with r."""
    deq, serving = deq_from_stored(blocks["deq_scale"])
    return blocks["weight"].float() * (deq * multiplier(blocks["input_scale"].to(serving))).unsqueeze(
        -1
    )


def nibbles(packed: Tensor) -> Tensor:
    """int8 [n / 2, k] -> int8 [n, k]: even rows are in the low nibbles."""
    low, high = packed << 4 >> 4, packed >> 4
    return torch.stack([low, high], 1).view(-1, packed.shape[1])


def pairs(codes: Tensor) -> Tensor:
    """The inverse: codes -8..7, int8 [n, k], n even -> int8 [n / 2, k]."""
    return codes[0::2] & 15 | codes[1::2] << 4


def _w4a8(blocks: Blocks) -> Tensor:
    return nibbles(blocks["weight"]).float() * blocks["weight_scale"].float()


def scale_bias(codes: Tensor, scale: Tensor, slices: int) -> Tensor:
    """8 * sum of codes * scale over each slice of k: float32 [n, slices].

    codes: int8 [n, k], k a multiple of `slices`; scale: float32 [n, 1]. The kernel splits an int8 input
    into 16 * high + low + 8, where low is an int4 number too, and adds this for the 8. Sums of codes
    are exact, as k is below 2^20. Source: vllm-ascend 182b75ea84, quantization/methods/w4a8.py:385-421.
    """
    n, k = codes.shape
    sums = codes.reshape(n, slices, k // slices).sum(2, dtype=torch.int32)
    return 8 * sums.float() * scale


def _groups(operand: Operand) -> Callable[[Blocks], Tensor]:
    """Codes times weight_scale [rows, ceil(k / group_size)].

    Source of the order of two codes in a byte: vllm-ascend 182b75ea84,
    quantization/methods/w4a16_mxfp4.py:36-47.
    """
    size = operand.group_size
    assert size is not None

    def dequantize(blocks: Blocks) -> Tensor:
        codes = code_values(blocks["weight"], operand.element)
        return scale_groups(codes, scale_values(blocks["weight_scale"]), size)

    return dequantize


def kronecker(dequantize: Callable[[Blocks], Tensor]) -> Callable[[Blocks], Tensor]:
    """W = L W' R^T for each row as a matrix [L, R]: the engine transforms inputs to L^T X R.

    dequantize: what gives the rows of W'.
    """

    def undone(blocks: Blocks) -> Tensor:
        left, right = blocks["left_trans"].float(), blocks["right_trans"].float()
        rows = dequantize(blocks).view(-1, len(left), len(right))
        return (left @ rows @ right.mT).flatten(1)

    return undone


@dataclass(frozen=True)
class QuantType(Layout):
    """A quantization type of the engine.

    loads_on:         engine versions and hardware, for types that this tool writes.
    scale_in_float32: the engine keeps weight_scale in float32; otherwise its loader rounds it to the
                      serving dtype.
    linears:          the engine has it for linears; if not, for experts alone.
    described_group:  the `group_size` that it reads in the description; None: it does not look.
    inputs:           linears have a multiple of so many inputs.
    blocks:           of the left transform, if there is one.
    biases:           linears may have a bias.
    """

    loads_on: str = ""
    scale_in_float32: bool = False
    linears: bool = True
    described_group: int | None = None
    inputs: int = 1
    blocks: int = 1
    biases: bool = True

    @property
    def static(self) -> bool:
        """Whether inputs are quantized with a stored scale."""
        return any(param.suffix == "deq_scale" for param in self.params)

    @property
    def has_offset(self) -> bool:
        """Whether the engine has a place for a weight_offset."""
        return any(param.suffix == "weight_offset" for param in self.params)

    @property
    def packed(self) -> bool:
        """Whether codes stand in int32 as compressed-tensors has them."""
        return self.weight.suffix == "weight_packed"

    @property
    def paired(self) -> bool:
        """Whether a byte holds codes of two rows."""
        return self.weight.rows == 2

    @property
    def stores_scale(self) -> bool:
        """Whether the engine computes with weight_scale."""
        return any(param.suffix == "weight_scale" and param.required for param in self.params)


def _type(label: str, operand: Operand, *params: Param, **more: Any) -> QuantType:
    """A type with one code for each element, and a scale for each row unless it says otherwise."""
    return QuantType(label, operand, params, **{"dequantize": per_row, **more})


def _mx(label: str, operand: Operand, version: str, **more: Any) -> QuantType:
    """A type with a power of two as a scale for each group of columns."""
    params = (codes_param(operand), row_scale(operand))
    usual = {"dequantize": _groups(operand), "sides": code_sides(operand), "experts": True}
    usual |= {"scale_in_float32": True, "described_group": operand.group_size}
    usual |= {"loads_on": f"vLLM-Ascend {version} and later on A5 (Ascend 950)"}
    return QuantType(label, operand, **{"params": params, **usual, **more})


@cache
def mxfp4_flatquant(blocks: int) -> QuantType:
    """MXFP4 of both sides after a transform of inputs, for so many blocks of its left matrix.

    Modules whose inputs are split over devices have `max_supported_tp` blocks, others one: the loader
    keeps its own part of the diagonal. It pairs the scales of a row. The bias goes to the matmul in the
    serving dtype, which takes biases in float32 alone for such operands. Sources: vllm-ascend
    182b75ea84, quantization/methods/w4a4_mxfp4_flatquant.py:90-177; ops-nn e5c3fa93,
    matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md:922.
    """
    params = (codes_param(MXFP4), row_scale(MXFP4), *_flatquant(blocks))
    return _mx(
        "W4A4_MXFP4_FLATQUANT", MXFP4, "0.20.2rc1", params=params, experts=False, biases=False,
        dequantize=kronecker(_groups(MXFP4)), inputs=64, blocks=blocks,
    )  # fmt: skip


@cache
def w4a16(columns: int) -> QuantType:
    """Int4 in groups of so many columns, in the tensors of compressed-tensors.

    Source: vllm-ascend 182b75ea84, quantization/methods/w4a16.py:186-236. `weight_shape` is loaded, and
    nothing reads it.
    """
    operand = Operand("int4", "group", block=(1, columns))
    params = (
        Param("weight_packed", ("I32",), lambda n, k: (n, -(-k // 8)), "codes"),
        row_scale(operand),
        Param("weight_shape", ("I32", "I64"), lambda n, k: (2,), "codes", 0),
    )

    def dequantize(blocks: Blocks) -> Tensor:
        packed = blocks["weight_packed"]
        codes = unpack_signed(packed, 4, 8 * packed.shape[1]).float()
        return scale_groups(codes, blocks["weight_scale"].float(), columns)

    sides = lambda shape: (shape[0], 8 * shape[1])  # noqa: E731
    return QuantType(
        "W4A16", operand, params, dequantize, sides, True, linears=False, described_group=columns,
        loads_on=_a2_a3("0.13") + ", for experts alone",
    )  # fmt: skip


def _a2_a3(version: str) -> str:
    return f"vLLM-Ascend {version} and later on Atlas A2, A3 (910B, 910C)"


_I8, _I4, _F8 = codes_param(_INT8), codes_param(_INT4), codes_param(_FP8)
_I4_PAIRS = Param("weight", ("I8",), lambda n, k: (n // 2, k), "codes", 2)
_SCALES = (_scale(), _offset())
_SCALE_BIAS = Param("scale_bias", FLOAT_PARAM, lambda n, k: (n, SLICES), "finite")
_OLD_W4A8 = (
    "no known engine loads this: from 2026-08 on, W4A8_DYNAMIC is for experts alone, and in other "
    "modules it needed groups before"
)
# All types by label. Source: vllm-ascend 182b75ea84, quantization/methods/*.py, a class for each type,
# and its older tags for the first version; loaders: quantization/method_adapters.py:47-118.
TYPES = {
    t.label: t
    for t in (
        _type("W8A8", _INT8, _I8, *_STATIC, _scale(required=False), _offset(), dequantize=_by_deq,
              loads_on=_a2_a3("0.11"), scale_in_float32=True),
        _type("W8A8_MIX", _INT8, _I8, *_STATIC, *_SCALES, loads_on=_a2_a3("0.13")),
        _type("W8A8_DYNAMIC", _INT8, _I8, *_SCALES, experts=True, loads_on=_a2_a3("0.11") + ", 310P"),
        _type("W8A16", _INT8, _I8, _scale(), _offset(required=True), loads_on=_a2_a3("0.13")),
        _type("W8A8FP8_DYNAMIC", _FP8, _F8, *_SCALES, experts=True, scale_in_float32=True,
              loads_on="vLLM-Ascend 0.22.1rc1 and later on A5 (Ascend 950)"),
        _mx("W8A8_MXFP8", MXFP8, "0.13 (experts: 0.18)"),
        _mx("W4A4_MXFP4", MXFP4, "0.19.1rc1"),
        # its loader pairs the scales of a row: w4a8_mxfp4.py:63-105
        _mx("W4A8_MXFP", MXFP4, "0.21.0rc1", inputs=64),
        _mx("W4A16_MXFP4", MXFP4, "0.23", linears=False),
        mxfp4_flatquant(1),
        _type("W4A8_DYNAMIC", _INT4, _I4_PAIRS, *_SCALES, _SCALE_BIAS, dequantize=_w4a8,
              sides=_pairs, experts=True, note=_OLD_W4A8, linears=False, described_group=0,
              loads_on=_a2_a3("0.11") + ", for experts alone"),
        w4a16(32),
        _type("W4A4_DYNAMIC", _INT4, _I4, *_SCALES, loads_on=_a2_a3("0.18"), scale_in_float32=True,
              inputs=8),
        _type("W4A4_FLATQUANT_DYNAMIC", _INT4, _I4, *_SCALES, *_flatquant(),
              dequantize=kronecker(per_row), loads_on=_a2_a3("0.11"), scale_in_float32=True, inputs=8),
    )
}  # fmt: skip


def type_of(label: str, group_size: object) -> QuantType:
    """The type with a label of TYPES. group_size: of the description, untrusted; W4A16 goes by it."""
    if label == "W4A16" and type(group_size) is int and group_size > 0:
        return w4a16(group_size)
    return TYPES[label]


# Columns of groups of W4A16 that are written; the engine takes any that divide the sides of experts.
_W4A16_GROUPS = (32, 64, 128)
_INT8_TOKEN = Operand("int8", "token", dynamic=True)
_INT8_TENSORS = (Operand("int8", "tensor", symmetric=False), Operand("int8", "tensor"))
_INT4_BOTH = (_INT4, Operand("int4", "token", dynamic=True))
_MXFP8_INPUTS, _MXFP4_INPUTS = replace(MXFP8, dynamic=True), replace(MXFP4, dynamic=True)
_FP8_BOTH = (_FP8, Operand("fp8_e4m3", "token", dynamic=True))
# The types that are written, in the order in which `model_quant_type` prefers them.
# Source: msmodelslim 3de0a3c4, core/quant_service/modelslim_v1/save/ascendv1.py:164-181; a transform is
# named by its older tool alone.
WRITTEN: dict[Numerics, QuantType] = {
    Numerics(MXFP4, _MXFP4_INPUTS, transform="kronecker"): TYPES["W4A4_MXFP4_FLATQUANT"],
    Numerics(MXFP4, _MXFP4_INPUTS): TYPES["W4A4_MXFP4"],
    Numerics(*_INT4_BOTH, transform="kronecker"): TYPES["W4A4_FLATQUANT_DYNAMIC"],
    Numerics(*_INT4_BOTH): TYPES["W4A4_DYNAMIC"],
    Numerics(MXFP4, None): TYPES["W4A16_MXFP4"],
    Numerics(MXFP4, _MXFP8_INPUTS): TYPES["W4A8_MXFP"],
    Numerics(MXFP8, _MXFP8_INPUTS): TYPES["W8A8_MXFP8"],
    Numerics(*_FP8_BOTH): TYPES["W8A8FP8_DYNAMIC"],
    **{Numerics(_INT8, inputs): TYPES["W8A8"] for inputs in _INT8_TENSORS},
    **{Numerics(_INT8, inputs, _INT8_TOKEN): TYPES["W8A8_MIX"] for inputs in _INT8_TENSORS},
    Numerics(_INT8, _INT8_TOKEN): TYPES["W8A8_DYNAMIC"],
    Numerics(_INT8, None): TYPES["W8A16"],
    # the reference's order has no place for these
    Numerics(_INT4, _INT8_TOKEN): TYPES["W4A8_DYNAMIC"],
    **{Numerics(w4a16(columns).operand, None): w4a16(columns) for columns in _W4A16_GROUPS},
}
# Types for the 310P that are written, and what loads them there. The engine has methods of its own for
# that chip: deq_scale is int64 whatever the serving dtype, and weight_scale of W8A8_DYNAMIC float32.
# Source: vllm-ascend 182b75ea84, _310p/quantization/methods/__init__.py, w8a8_static.py:29-42,
# w8a8_dynamic.py:32-70,120-143.
ON_310P = {
    "W8A8": "vLLM-Ascend 0.18 and later on Atlas 310P",
    "W8A8_DYNAMIC": "vLLM-Ascend 0.18 and later on Atlas 310P",
}
# Types that the engine has, but whose tensors this tool cannot check: sparse types of the 310P.
# Source: vllm-ascend 182b75ea84, _310p/quantization/methods/w8a8s.py, w8a8sc.py.
UNCHECKED = frozenset({"W8A8S", "W8A8SC"})
# Types of other producers, and the engine's name for each.
# Source: msmodelslim 3de0a3c4, core/quant_service/modelslim_v1/save/ascendv1.py:393-403.
MISNAMED = {"WFP8AFP8_DYNAMIC": "W8A8FP8_DYNAMIC"}
# Stored tensors of modules with transformed inputs, one each.
TRANSFORM = ("left_trans", "right_trans", "clip_ratio")


def deq_to_store(deq: Tensor, serving: torch.dtype) -> Tensor:
    """deq_scale as the engine registers it: float32, or int64 if it serves in float16.

    The low half of the int64 holds the bits of the float32, the high half zeros.
    Source: vllm-ascend 182b75ea84, quantization/methods/w8a8_static.py:58-141.
    """
    if serving != torch.float16:
        return deq
    return deq.view(torch.int32).to(torch.int64)  # positive: no sign to extend


def deq_from_stored(stored: Tensor) -> tuple[Tensor, torch.dtype]:
    """deq_scale in float32, and the serving dtype that follows from its stored dtype."""
    if stored.dtype == torch.int64:
        return stored.to(torch.int32).view(torch.float32), torch.float16
    return stored, torch.bfloat16
