"""Numerics that vLLM loads under `quant_method: modelopt`, and the parameters that it registers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from quantcli.core.codes import code_values, fp8_values, scale_groups, scale_values
from quantcli.core.numerics import MXFP8, NVFP4, Numerics, Operand
from quantcli.targets.base import cannot_store
from quantcli.targets.layouts import (
    FLOAT_PARAM,
    Blocks,
    Layout,
    Param,
    code_sides,
    codes_param,
    global_scale,
    module_scale,
    row_scale,
    static_inputs,
)

_BLOCK = (128, 128)
_TENSOR = Operand("fp8_e4m3", "tensor")
_GROUPS = Operand("fp8_e4m3", "group", dynamic=True, block=(1, _BLOCK[1]))
_HOPPER = "NVIDIA GPUs (Ada, Hopper and later)"
_BLACKWELL = "NVIDIA GPUs (Blackwell; Turing and later with float inputs)"


@dataclass(frozen=True)
class Kind:
    """One `quant_algo`.

    algorithm: its name in capitals, which is the label.
    written:   the name as it is written.
    experts:   the engine has it for experts of a mixture, too.
    head:      and for an lm_head.
    """

    algorithm: str
    numerics: Numerics
    loads_on: str
    experts: bool = True
    head: bool = True
    written: str = ""

    @property
    def group_size(self) -> int | None:
        """Columns of a row that share a scale; None for FP8."""
        return self.numerics.weight.group_size


# Sources: vllm 0.32.0, model_executor/layers/quantization/modelopt.py: 139-160 and 2670-2730 (linears),
# 249-260 and 1853-1882 (experts: of FP8 those with one scale; those in blocks only next to other
# algorithms, under names that Model-Optimizer does not write); vocab_parallel_embedding.py:481-520 next
# to it (a head, whose scales have its rows). TensorRT-LLM 1a0dc5f7, tensorrt_llm/_torch/model_config.py
# (load_modelopt_quant_config), knows blocks of FP8 by the name in small letters, as Model-Optimizer
# writes it. vllm-ascend 182b75ea84, quantization/modelopt_mxfp8_config.py:35-91.
KINDS = {
    kind.algorithm: kind
    for kind in (
        Kind(
            "FP8", Numerics(_TENSOR, _TENSOR), f"vLLM 0.32 and later, SGLang, TensorRT-LLM; {_HOPPER}"
        ),
        Kind(
            "FP8_PER_CHANNEL_PER_TOKEN",
            Numerics(Operand("fp8_e4m3", "channel"), Operand("fp8_e4m3", "token", dynamic=True)),
            f"vLLM 0.32 and later, TensorRT-LLM; {_HOPPER}",
            experts=False,
        ),
        Kind(
            "FP8_PB_WO",
            Numerics(Operand("fp8_e4m3", "block", block=_BLOCK), _GROUPS),
            f"vLLM 0.32 and later, TensorRT-LLM; {_HOPPER}",
            experts=False,
            head=False,
            written="fp8_pb_wo",
        ),
        Kind(
            "NVFP4",
            Numerics(NVFP4, replace(NVFP4, dynamic=True)),
            f"vLLM 0.32 and later, SGLang, TensorRT-LLM; {_BLACKWELL}",
        ),
        Kind(
            "W4A16_NVFP4",
            Numerics(NVFP4, None),
            "vLLM 0.32 and later, TensorRT-LLM; NVIDIA GPUs (Turing and later)",
        ),
        Kind(
            "MXFP8",
            Numerics(MXFP8, replace(MXFP8, dynamic=True)),
            f"vLLM 0.32 and later, SGLang, vLLM-Ascend; {_BLACKWELL}, AMD, Intel, Atlas A5",
        ),
    )
}
_BY_NUMERICS = {kind.numerics: kind for kind in KINDS.values()}
MIXED = "MIXED_PRECISION"
# Suffixes of parameters of quantized modules, in any algorithm of Model-Optimizer.
SUFFIXES = frozenset({"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})


# A part of next-token layers that the engine builds as float under one algorithm of four bits.
# Source: vllm 0.32.0, model_executor/models: qwen3_5_mtp.py:88-105 and qwen3_next_mtp.py:68-86.
_FLOAT_IN_FOUR_BITS = re.compile(r"(?:.*\.)?mtp\.fc")


def float_in_four_bits(module: str, algorithm: str | None) -> str | None:
    """The reason why the engine builds a module as float, next to others of this algorithm, or None."""
    if algorithm in ("NVFP4", "W4A16_NVFP4") and _FLOAT_IN_FOUR_BITS.fullmatch(module):
        return f"the engine builds `mtp.fc` as float if the model is {algorithm}"
    return None


def kind_of(numerics: Numerics) -> Kind:
    """The kind of these numerics. InputError for others."""
    if numerics not in _BY_NUMERICS:
        raise cannot_store("modelopt", numerics)
    return _BY_NUMERICS[numerics]


@cache
def layout_of(kind: Kind) -> Layout:
    """The parameters of modules of a kind, and their meaning."""
    weight = kind.numerics.weight
    params = [codes_param(weight), _weight_scale(weight)]
    if weight.global_scale:
        scale = global_scale("weight_scale_2", "multiplier")
        params.append(replace(scale, part="weight_global_scale"))
        # without inputs the engine takes it and leaves it out: older exports have one
        required = kind.numerics.input is not None
        scale = replace(global_scale("input_scale"), part="input_global_scale", required=required)
        params.append(replace(scale, shared=required, of_experts=required))
    elif static_inputs(kind.numerics):
        params.append(module_scale("input_scale"))

    def dequantize(blocks: Blocks) -> Tensor:
        scale = scale_values(blocks["weight_scale"])
        if weight.per == "tensor":
            return fp8_values(blocks["weight"]) * scale.reshape(())
        if weight.per == "channel":
            return fp8_values(blocks["weight"]) * scale.unsqueeze(1)
        if weight.per == "block":
            return fp8_values(blocks["weight"], scale[:, 0, :, 0].contiguous(), _BLOCK[1])
        codes = code_values(blocks["weight"], weight.element)
        values = scale_groups(codes, scale, kind.group_size or 1)
        if weight.global_scale:  # last: products of a code and its scale are exact
            values *= blocks["weight_scale_2"].float().reshape(())
        return values

    return Layout(
        kind.algorithm,
        weight,
        tuple(params),
        dequantize,
        code_sides(weight),
        experts=kind.experts,
    )


def _weight_scale(weight: Operand) -> Param:
    """One number; [n] of rows; [blocks of rows, 1, blocks of columns, 1]; [n, k / group_size]."""
    if weight.per == "tensor":
        return module_scale("weight_scale")
    if weight.per == "channel":
        return Param("weight_scale", FLOAT_PARAM, lambda n, k: (n,), "positive")
    if weight.per == "block":
        rows, columns = _BLOCK
        shape = lambda n, k: (-(-n // rows), 1, -(-k // columns), 1)  # noqa: E731
        return Param("weight_scale", FLOAT_PARAM, shape, "positive", rows, spread=True)
    return row_scale(weight)
