"""Numerics that vLLM loads from compressed-tensors checkpoints, and how each is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from quantcli.checkpoint.spec import DTYPES
from quantcli.core.numerics import MXFP4, MXFP8, NVFP4, Numerics, Operand

Format: TypeAlias = Literal[
    "int-quantized",
    "float-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
]
FORMATS: tuple[str, ...] = get_args(Format)


@dataclass(frozen=True)
class Kind:
    """One way to store a module.

    label:     unique among numerics.
    format:    the engine's `format`: codes packed into int32, or one in each element.
    bits:      of a code of weights.
    in_serving_dtype: the engine registers weight_scale in the serving dtype, otherwise in float32.
    experts:   the engine has it for mixtures of experts, too.
    """

    label: str
    format: Format
    bits: int
    in_serving_dtype: bool = False
    experts: bool = False

    @property
    def any_format(self) -> bool:
        """Whether the engine takes it under any `format`."""
        return any(self.format == form for _, form in _FORMATS.values())

    @property
    def packed(self) -> bool:
        """Whether each int32 holds 32 / bits codes."""
        return self.format == "pack-quantized"


_FP8_TOKEN = Operand("fp8_e4m3", "token", dynamic=True)
_FP8_TENSOR = Operand("fp8_e4m3", "tensor")
_FP8_GROUPS = Operand("fp8_e4m3", "group", dynamic=True, block=(1, 128))
_NVIDIA = "NVIDIA GPUs"
# By a part of the label; the first that fits.
# Sources: vllm 0.32.0, model_executor/kernels/linear/__init__.py, kernels by platform; vllm-ascend
# 182b75ea84, quantization/compressed_tensors_config.py.
_LOADS_ON = (
    ("nvfp4 float", f"vLLM 0.32 and later; {_NVIDIA} (Turing and later)"),
    ("nvfp4", f"vLLM 0.32 and later; {_NVIDIA} (Blackwell; Turing and later with float inputs), AMD"),
    (
        "mxfp4 float",
        f"vLLM 0.32 and later; {_NVIDIA} (Ampere to Hopper); Blackwell, AMD, Intel round inputs, too",
    ),
    (
        "mxfp4 fp8",
        f"vLLM 0.32 and later; {_NVIDIA} with the package humming; without it inputs are as in mxfp4",
    ),
    (
        "mxfp4",
        f"vLLM 0.32 and later; {_NVIDIA} (Blackwell; Ampere and later with float inputs), AMD, Intel",
    ),
    (
        "mxfp8",
        f"vLLM 0.32 and later; {_NVIDIA} (Blackwell; Turing and later with float inputs), AMD, Intel",
    ),
    ("W8A16", f"vLLM 0.32 and later, SGLang; {_NVIDIA} (Turing and later)"),
    ("channel W4A16", f"vLLM 0.32 and later, SGLang; {_NVIDIA} (Turing and later), CPUs"),
    ("W4A16 asymmetric", f"vLLM 0.32 and later; {_NVIDIA} (Turing and later), CPUs"),
    (
        "W4A16",
        f"vLLM 0.32 and later, SGLang; {_NVIDIA} (Turing and later), CPUs; experts alone: vLLM-Ascend, "
        "Atlas A2, A3",
    ),
    (
        "channel W4A8",
        "vLLM 0.32 and later; CPUs (Arm, x86), Intel GPUs; experts alone: vLLM-Ascend, Atlas A2, A3",
    ),
    ("W4A8", "vLLM 0.32 and later; CPUs (Arm, x86), Intel GPUs"),
    # vLLM has no int8 inputs on Blackwell: its docs/features/quantization/llm_compressor/int8_w8a8.md
    ("int8 W8A8 static", f"vLLM 0.32 and later, SGLang; {_NVIDIA} (Turing to Hopper), CPUs"),
    ("block", f"vLLM 0.32 and later, SGLang; {_NVIDIA} (Ada, Hopper and later), AMD; CPUs with AMX"),
    (
        "int8",
        f"vLLM 0.32 and later, SGLang, vLLM-Ascend; {_NVIDIA} (Turing to Hopper), CPUs, Atlas A2, A3",
    ),
    (
        "channel",
        f"vLLM 0.32 and later, SGLang, vLLM-Ascend 0.22.1rc1; {_NVIDIA} (Ada and later), AMD, A5",
    ),
    ("fp8", f"vLLM 0.32 and later, SGLang; {_NVIDIA} (Ada and later), AMD"),
)


def kind_of(numerics: Numerics, packed: bool | None = None) -> Kind | None:
    """The kind in which these numerics are stored; None if the engine has no scheme for them.

    packed: whether a checkpoint has packed codes; None: as this tool writes it. Numerics that the
            engine loads in both ways have two kinds.
    Source: vllm 0.32.0, model_executor/layers/quantization/compressed_tensors/, for linears
    compressed_tensors.py:513-946, for experts compressed_tensors_moe/compressed_tensors_moe.py:60-201.
    """
    weight, x = numerics.weight, numerics.input
    if numerics.prefill or numerics.transform or weight.dynamic or weight.per == "token":
        return None
    if weight in _FORMATS:
        kind = _small_scales(weight, x)
    elif weight.scale or (x and x.scale):
        return None
    elif weight.element.family == "float":
        kind = _fp8(weight, x)
    elif x is None:
        kind = _weight_only(weight)
    else:
        kind = _integers(weight, x, bool(packed))
    return None if kind is None or packed not in {None, kind.packed} else kind


# vLLM goes by the weights alone. Source: vllm 0.32.0,
# model_executor/layers/quantization/compressed_tensors/compressed_tensors.py:794-815.
_FORMATS: dict[Operand, tuple[str, Format]] = {
    NVFP4: ("nvfp4", "nvfp4-pack-quantized"),
    MXFP4: ("mxfp4", "mxfp4-pack-quantized"),
    MXFP8: ("mxfp8", "mxfp8-quantized"),
}


def _small_scales(weight: Operand, x: Operand | None) -> Kind | None:
    """Weights with scales of eight bits; inputs as the weights are, float, or fp8 for mxfp4."""
    inputs = {None: " float inputs", replace(weight, dynamic=True): ""}
    if weight == MXFP4:
        inputs |= {_FP8_TOKEN: " fp8 inputs", _FP8_GROUPS: " fp8 inputs in groups"}
    if x not in inputs:
        return None
    name, form = _FORMATS[weight]
    return Kind(name + inputs[x], form, weight.element.bits, experts=True)


def as_served(numerics: Numerics) -> Numerics:
    """Numerics of a checkpoint as the engine takes them: next to mxfp4 and mxfp8 weights, inputs that
    it has no kernel for count as such codes, too."""
    weight = numerics.weight
    if weight not in {MXFP4, MXFP8} or _small_scales(weight, numerics.input):
        return numerics
    return Numerics(weight, replace(weight, dynamic=True))


def _fp8(weight: Operand, x: Operand | None) -> Kind | None:
    if x is None or {weight.dtype, x.dtype} != {"fp8_e4m3"}:
        return None
    if not (weight.symmetric and x.symmetric):
        return None
    token, tensor = x == _FP8_TOKEN, x == _FP8_TENSOR
    if weight.per == "block" and weight.block == (128, 128) and x == _FP8_GROUPS:
        return Kind("fp8 block 128x128", "float-quantized", 8, experts=True)
    if weight.per not in {"channel", "tensor"} or not (token or tensor):
        return None
    for_experts = token == (weight.per == "channel")
    label = f"fp8 {weight.per} {'static' if tensor else 'dynamic'}"
    return Kind(label, "float-quantized", 8, experts=for_experts)


def _weight_only(weight: Operand) -> Kind | None:
    share = _share(weight)
    if share is None:
        return None
    bits = weight.element.bits
    label = f"{weight.dtype} {share} W{bits}A16" + _offset(weight)
    return Kind(label, "pack-quantized", bits, True, experts=True)


def _integers(weight: Operand, x: Operand, packed: bool) -> Kind | None:
    if x.dtype != "int8" or not weight.symmetric or x.per not in {"token", "tensor"}:
        return None
    if x.dynamic != (x.per == "token"):
        return None
    share = _share(weight)
    if weight.dtype == "int8" and weight.per in {"channel", "tensor"} and not packed:
        label = f"int8 W8A8 {'dynamic' if x.dynamic else 'static'}" + _offset(x)
        label += " per tensor" if weight.per == "tensor" else ""
        return Kind(label, "int-quantized", 8, experts=x.dynamic and weight.per == "channel")
    if share is None or not x.dynamic:
        return None
    bits = weight.element.bits
    if packed and x.symmetric:
        return Kind(f"{weight.dtype} {share} W{bits}A8 packed", "pack-quantized", bits, True)
    if weight.dtype == "int4" and not packed:
        return Kind(f"int4 {share} W4A8" + _offset(x), "int-quantized", 4, True, experts=True)
    return None


def _share(weight: Operand) -> str | None:
    """The part of a row that shares a scale: "channel", or such as "g128"; None for tensors, blocks."""
    group = weight.group_size
    if weight.per == "channel":
        return "channel"
    return f"g{group}" if group else None


def _offset(operand: Operand) -> str:
    return "" if operand.symmetric else " asymmetric"


def loads_on(label: str) -> str:
    """Engines and hardware for a label."""
    return next(engines for part, engines in _LOADS_ON if part in label)


def arguments(operand: Operand) -> dict[str, Any]:
    """An operand as QuantizationArgs of compressed-tensors, for config.json."""
    measured = operand.dynamic and operand.global_scale  # scales of groups alone are dynamic
    table: dict[str, Any] = {
        "num_bits": operand.element.bits,
        "type": operand.element.family,
        "strategy": "tensor_group" if operand.global_scale else operand.per,
        "symmetric": operand.symmetric,
        "dynamic": "local" if measured else operand.dynamic,
    }
    if operand.per == "group" and operand.block:
        table["group_size"] = operand.block[1]
    if measured:
        table["observer"] = "static_minmax"
    if operand.per == "block" and operand.block:
        table["block_structure"] = list(operand.block)
    if operand.scale_type:
        table["scale_dtype"] = f"torch.{DTYPES[operand.scale_type.stored][1]}"
    return table
