"""compressed-tensors: the format of llm-compressor, which vLLM and SGLang load."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.codes import (
    pack_columns,
    pack_signed,
    scale_values,
    scales_to_store,
    unpack_columns,
    unpack_signed,
)
from quantcli.core.numerics import CACHES, MXFP4, Cache, Module, Numerics, Parts
from quantcli.targets.base import (
    KEEP,
    Fault,
    PlannedCheckpoint,
    ScalePart,
    StoredCheckpoint,
    cannot_store,
)
from quantcli.targets.compressed_tensors.config import quantization_config
from quantcli.targets.compressed_tensors.kinds import Kind, kind_of, loads_on
from quantcli.targets.compressed_tensors.layouts import layout_of, multiplier
from quantcli.targets.compressed_tensors.stored import CompressedTensorsCheckpoint
from quantcli.targets.kv_cache import CacheTensor, plain_tensors
from quantcli.targets.layouts import Layout, static_inputs
from quantcli.targets.sidecars import quantization_block
from quantcli.targets.vllm_family import (
    EXPERT,
    FLOAT_LINEARS,
    VllmTarget,
    check_blocks,
    last_part,
)

# Values of group_size for which vLLM has the fast kernel for packed codes.
# Source: vllm 0.32.0, model_executor/layers/quantization/utils/marlin_utils.py:37.
_MARLIN_GROUPS = (32, 64, 128)
_GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")


class CompressedTensors(VllmTarget):
    """`quantization_config` has a group for each scheme, and an `ignore` list of the float linears."""

    name: ClassVar[str] = "compressed-tensors"
    caches: ClassVar[Mapping[Cache, tuple[CacheTensor, ...]]] = {
        CACHES["fp8"]: plain_tensors(lambda heads, width: (1,)),
        CACHES["fp8_per_head"]: plain_tensors(lambda heads, width: (heads, 1, 1)),
    }

    def layout(self, numerics: Numerics) -> Layout:
        """Its label is such as `int8 W8A8 dynamic` or `int4 g128 W4A16`: the format has no names."""
        return layout_of(numerics, self._kind(numerics))

    def loads_on(self, label: str) -> str:
        """Engines and hardware."""
        return loads_on(label)

    def unlike_kernels(self, numerics: Numerics) -> str | None:
        """Also for MXFP4 weights whose inputs are not MXFP4: most kernels look at weights alone."""
        if numerics.weight == MXFP4 and numerics.input != replace(MXFP4, dynamic=True):
            inputs = "stay float" if numerics.input is None else "are fp8, as by the package humming,"
            return (
                f"inputs of mxfp4 weights {inputs} in this run; vLLM's kernels for Blackwell, MI350 "
                "and Intel GPUs round them to mxfp4, and are less near to the other model"
            )
        return super().unlike_kernels(numerics)

    def engine_dtype(self, numerics: Numerics, part: ScalePart, serving_dtype: str) -> str:
        """Float32, except the weight_scale of int4, of packed codes, and with a type of its own."""
        if part == "weight_scale" and numerics.weight.scale_type:
            return numerics.weight.scale_type.dtype
        in_serving_dtype = part == "weight_scale" and self._kind(numerics).in_serving_dtype
        return serving_dtype if in_serving_dtype else "F32"

    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """By suffix, with n and k of the weight:

        weight:           int8 or float8_e4m3fn [n, k]; int4 codes are -8..7, one in each byte.
        weight_packed:    int32 [n, k * bits / 32] instead, see pack_signed; and
        weight_shape:     int64 [2], n and k. Or for fp4 uint8 [n, k / 2], the even column in the low
                          four bits.
        weight_scale:     [n, 1] per channel, [n, k / group_size], [1] per tensor, and for blocks
                          [ceil(n / 128), ceil(k / 128)]; in the dtype that `engine_dtype` gives.
        weight_zero_point: int32 [ceil(n * bits / 32), k / group_size] if weights are asymmetric, see
                          pack_columns.
        weight_global_scale, input_global_scale: float32 [1], what the engine divides by: 1 over the
                          scheme's.
        input_scale:      float32 [1] if inputs are static.
        input_zero_point: int8 [1] if they are asymmetric: x ~ (xq - zero_point) * input_scale.
        """
        kind = self._kind(numerics)
        scale = scales_to_store(parts["weight_scale"])
        if numerics.weight.per == "tensor":
            scale = scale.reshape(1)
        if kind.packed:
            stored = {
                "weight_packed": pack_signed(parts["weight"], kind.bits),
                "weight_scale": scale,
                "weight_shape": torch.tensor(shape, dtype=torch.int64),
            }
            if not numerics.weight.symmetric:
                stored["weight_zero_point"] = pack_columns(parts["weight_zero_point"], kind.bits)
        else:
            stored = {self._codes(numerics): parts["weight"], "weight_scale": scale}
        stored |= {name: 1 / parts[name].float() for name in _GLOBAL_SCALES if name in parts}
        if static_inputs(numerics):
            stored["input_scale"] = parts["input_scale"].float()
        if static_inputs(numerics) and numerics.input and not numerics.input.symmetric:
            stored["input_zero_point"] = parts["input_offset"].to(torch.int8)
        return stored

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """The same codes; scales in float32, input_offset float32 [1] for all int8 static inputs."""
        if "weight_shape" in stored:
            bits, k = numerics.weight.element.bits, int(stored["weight_shape"][1])
            parts = {"weight": unpack_signed(stored["weight_packed"], bits, k)}
            if not numerics.weight.symmetric:
                n = len(parts["weight"])
                parts["weight_zero_point"] = unpack_columns(stored["weight_zero_point"], bits, n)
        else:
            parts = {"weight": stored[self._codes(numerics)]}
        parts |= {name: multiplier(stored[name]) for name in _GLOBAL_SCALES if name in stored}
        parts["weight_scale"] = scale_values(stored["weight_scale"])
        if numerics.weight.per == "tensor":
            parts["weight_scale"] = parts["weight_scale"].reshape(1)
        if static_inputs(numerics):
            parts["input_scale"] = stored["input_scale"].float().reshape(1)
            if numerics.input and numerics.input.element.family == "int":
                offset = stored.get("input_zero_point", torch.zeros(1))
                parts["input_offset"] = offset.float().reshape(1)
        return parts

    def built_float(self, module: str, names: Collection[str]) -> str | None:
        """Also `indexer.wk`, which the engine fuses with weights_proj."""
        if module.endswith(".indexer.wk"):
            return FLOAT_LINEARS["weights_proj"]
        return super().built_float(module, names)

    def faults(self, module: Module, names: Collection[str]) -> Iterator[Fault]:
        """By widths that blocks, groups and packed codes do not divide; experts of some kinds."""
        assert module.numerics is not None
        kind, k = self._kind(module.numerics), module.shape[1]
        if EXPERT.fullmatch(module.name) and not kind.experts:
            yield Fault(f"the engine has no {kind.label} for experts", "use a dynamic scheme for them")
        if kind.packed and k % (32 // kind.bits):
            what = f"{kind.label} packs {32 // kind.bits} columns together; there are {k}"
            yield Fault(what, "use an 8-bit scheme for it", "width")
        if not module.numerics.weight.symmetric and module.shape[0] % (32 // kind.bits):
            # vllm 0.32.0, model_executor/layers/quantization/compressed_tensors/schemes/
            # compressed_tensors_wNa16.py:140-170: as many words as whole ones
            what = f"{kind.label} packs zero points of {32 // kind.bits} rows together; there are "
            yield Fault(f"{what}{module.shape[0]}", "use `symmetric: true` for it", "width")
        group = module.numerics.weight.group_size
        if group and k % group:
            what = f"groups of {group} columns do not divide {k}"
            fixed = module.numerics.weight.scale_type is not None
            yield Fault(what, KEEP if fixed else "use `group_size: auto`, or channel", "width")
        x = module.numerics.input
        if x and group and x.group_size and k % x.group_size and not k % group:
            # vllm 0.32.0, model_executor/layers/quantization/utils/fp8_utils.py:666
            what = f"groups of {x.group_size} inputs do not divide {k}"
            yield Fault(what, KEEP, "width")
        measured = x is not None and x.global_scale
        if last_part(module.name) == "kv_b_proj" and (static_inputs(module.numerics) or measured):
            # vllm 0.32.0, model_executor/layers/attention/mla_attention.py:416 and
            # layers/quantization/utils/quant_utils.py:511-572
            what = "the engine decodes kv_b_proj by an identity matrix, which a measured scale clips"
            yield Fault(what, "use a dynamic scheme for it", "width")
        yield from check_blocks(module, names)

    def advise(self, modules: Sequence[Module], model_type: str = "") -> Iterator[str]:
        """Notes on groups that only slower kernels take, and on a quantized head."""
        weights = [m.numerics.weight for m in modules if m.numerics]
        sizes = {g for weight in weights if not weight.scale and (g := weight.group_size)}
        if slow := sorted(sizes.difference(_MARLIN_GROUPS)):
            yield (
                f"groups of {', '.join(map(str, slow))} load, but the fast kernel takes only "
                f"{', '.join(map(str, _MARLIN_GROUPS))} or whole rows"
            )
        yield from super().advise(modules, model_type)

    def config_block(self, output: PlannedCheckpoint, used: Collection[Numerics]) -> dict[str, Any]:
        """A group for each of the numerics."""
        return quantization_config(output, {numerics: self._kind(numerics) for numerics in used})

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By `quant_method` in config.json."""
        return quantization_block(checkpoint.config).text("quant_method") == self.name

    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """A checkpoint of any producer, as vLLM would load it."""
        return CompressedTensorsCheckpoint(checkpoint)

    def _codes(self, numerics: Numerics) -> str:
        """The suffix of codes."""
        return self.layout(numerics).weight.suffix

    def _kind(self, numerics: Numerics) -> Kind:
        kind = kind_of(numerics)
        shifted = kind is not None and not (numerics.weight.symmetric or kind.packed)
        if kind is None or shifted or kind.label.endswith("per tensor"):
            raise cannot_store(self.name, numerics)
        return kind
