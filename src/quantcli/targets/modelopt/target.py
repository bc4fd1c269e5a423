"""ModelOpt: the format of NVIDIA's Model-Optimizer, for TensorRT-LLM, vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.detect import of_draft
from quantcli.core.codes import scale_values, scales_to_store
from quantcli.core.numerics import CACHES, Cache, Module, Numerics, Parts
from quantcli.targets import serving
from quantcli.targets.base import KEEP, Fault, PlannedCheckpoint, Refusal, ScalePart, StoredCheckpoint
from quantcli.targets.kv_cache import CachePart, CacheTensor, not_alone, plain_name
from quantcli.targets.layouts import Layout, static_inputs
from quantcli.targets.modelopt.config import FILE, descriptions, settings_of
from quantcli.targets.modelopt.kinds import KINDS, float_in_four_bits, kind_of, layout_of
from quantcli.targets.modelopt.stored import ModelOptCheckpoint, always_float
from quantcli.targets.serving import ServeCommand, Served
from quantcli.targets.sidecars import to_json
from quantcli.targets.vllm_family import EXPERT, VllmTarget, check_blocks, is_head, last_part

# Values of SGLang's --quantization. Source: sglang 0f4513c2f4,
# docs/advanced_features/quantization.md, "Using Pre-Quantized Checkpoints".
_SGLANG = {"FP8": "modelopt_fp8", "NVFP4": "modelopt_fp4"}
_PARTS: tuple[CachePart, ...] = ("k_scale", "v_scale")


def _cache_name(part: str, layer: str) -> str:
    """`k_proj.k_scale` of a layer, as the producer names it; vLLM knows that by two names of layers.

    Source: vllm 0.32.0, model_executor/layers/quantization/base_config.py:230-245.
    """
    if layer.rpartition(".")[2] in ("self_attn", "mixer"):
        return f"{layer}.{part[0]}_proj.{part}"
    return plain_name(layer, part)


class ModelOpt(VllmTarget):
    """`quant_algo` for the whole model, or MIXED_PRECISION with one for each module.

    config.json and a file of its own say the same: TensorRT-LLM reads the file.
    """

    name: ClassVar[str] = "modelopt"
    files: ClassVar[Mapping[str, str]] = {FILE: "config"}
    caches: ClassVar[Mapping[Cache, tuple[CacheTensor, ...]]] = {
        CACHES["fp8"]: tuple(
            CacheTensor(part, partial(_cache_name, part), lambda heads, width: ()) for part in _PARTS
        )
    }

    def layout(self, numerics: Numerics) -> Layout:
        """Its label is the `quant_algo`, such as NVFP4."""
        return layout_of(kind_of(numerics))

    def loads_on(self, label: str) -> str:
        """Engines and hardware."""
        return KINDS[label].loads_on

    def engine_dtype(self, numerics: Numerics, part: ScalePart, serving_dtype: str) -> str:
        """Float32, except a weight_scale with a type of its own."""
        kind = kind_of(numerics)
        scales = kind.numerics.weight.scale_type if part == "weight_scale" else None
        return scales.dtype if scales else "F32"

    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """By suffix, with n and k of the weight:

        weight:         float8_e4m3fn [n, k]; of fp4 uint8 [n, k / 2], the even column in the low bits.
        weight_scale:   float32 [] per tensor, [n] per channel, for blocks of 128 x 128
                        [ceil(n / 128), 1, k / 128, 1]; for NVFP4 float8_e4m3fn [n, k / 16], for MXFP8
                        uint8 [n, k / 32].
        weight_scale_2: float32 [], with which NVFP4 multiplies the scales of its groups.
        input_scale:    float32 [] if inputs are static, or have such a scale.
        """
        weight, scale = kind_of(numerics).numerics.weight, scales_to_store(parts["weight_scale"])
        if weight.per == "tensor":
            scale = scale.reshape(())
        elif weight.per == "channel":
            scale = scale.squeeze(1)
        elif weight.per == "block":
            scale = scale[:, None, :, None]
        stored = {"weight": parts["weight"], "weight_scale": scale.contiguous()}
        if weight.global_scale:
            stored["weight_scale_2"] = parts["weight_global_scale"].float().reshape(())
        if part := _input_part(numerics):
            stored["input_scale"] = parts[part].float().reshape(())
        return stored

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """The same codes; scales in float32, those of whole modules as [1]."""
        weight, scale = numerics.weight, scale_values(stored["weight_scale"])
        if weight.per == "tensor":
            scale = scale.reshape(1)
        elif weight.per == "channel":
            scale = scale.unsqueeze(1)
        elif weight.per == "block":
            scale = scale[:, 0, :, 0]
        parts = {"weight": stored["weight"], "weight_scale": scale}
        if weight.global_scale:
            parts["weight_global_scale"] = stored["weight_scale_2"].float().reshape(1)
        if part := _input_part(numerics):
            parts[part] = stored["input_scale"].float().reshape(1)
        return parts

    def built_float(self, module: str, names: Collection[str]) -> str | None:
        """Also vision towers of some names."""
        return super().built_float(module, names) or always_float(module)

    def faults(self, module: Module, names: Collection[str]) -> Iterator[Fault]:
        """By algorithms that the engine lacks for experts and heads; by widths of groups and blocks."""
        assert module.numerics is not None
        kind, k = kind_of(module.numerics), module.shape[1]
        if reason := float_in_four_bits(module.name, kind.algorithm):
            yield Fault(reason, KEEP, "width")
        if EXPERT.fullmatch(module.name) and not kind.experts:
            what = f"the engine has no {kind.algorithm} for experts"
            yield Fault(what, "use `fp8_static`, `mxfp8` or `nvfp4` for them")
        if is_head(module.name) and not kind.head:
            yield Fault(f"the engine loads no head in {kind.algorithm}", KEEP, "width")
        block = kind.numerics.weight.block
        if block and k % block[1]:
            what = (
                f"{kind.algorithm} has {'blocks' if block[0] > 1 else 'groups'} of {block[1]} columns, "
            )
            yield Fault(what + f"which do not divide {k}", KEEP, "width")
        if last_part(module.name) == "kv_b_proj" and _input_part(module.numerics):
            # vllm 0.32.0, model_executor/layers/attention/mla_attention.py:416 and
            # layers/quantization/utils/quant_utils.py:511-572
            what = "the engine decodes kv_b_proj by an identity matrix, which a measured scale clips"
            yield Fault(what, "use a dynamic scheme for it", "width")
        yield from check_blocks(module, names)

    def check(self, modules: Sequence[Module]) -> Iterator[Refusal]:
        """As for all engines of the family; a draft has one algorithm."""
        yield from super().check(modules)
        quantized = [module for module in modules if module.numerics]
        if not of_draft([module.name for module in modules]):
            return
        for module in quantized:
            if module.numerics != quantized[0].numerics:
                what = (
                    "MIXED_PRECISION names modules in full, and vLLM numbers layers of a draft after "
                    "those of its target"
                )
                yield Refusal(module.name, what, "use one scheme for the draft")
                return

    def sidecars(self, output: PlannedCheckpoint) -> dict[str, bytes]:
        """Also the description in a file of its own."""
        files = super().sidecars(output)
        used = {module.numerics for module in output.modules if module.numerics}
        if not used:
            return files
        return {**files, FILE: to_json(self._descriptions(output, used)[1])}

    def serve(self, served: Served, model: str) -> tuple[ServeCommand, ...]:
        """vLLM; SGLang for the algorithms that it has a flag for, one at a time; TensorRT-LLM."""
        commands = [super().serve(served, model)[0]]
        if served.draft is not None:
            return tuple(commands)
        flags = {label: _SGLANG.get(label) for label in served.labels}
        if len(flags) == 1 and served.cache is None and (flag := next(iter(flags.values()))):
            commands.append(serving.sglang(served, model, ["--quantization", flag]))
        if self.loaded_by("TensorRT-LLM", served.labels):
            commands.append(serving.tensorrt_llm(served, model))
        return tuple(commands)

    def config_block(self, output: PlannedCheckpoint, used: Collection[Numerics]) -> dict[str, Any]:
        """The algorithm, or that of each module, and the entries for float modules."""
        if not used:
            raise not_alone()
        return self._descriptions(output, used)[0]

    def _descriptions(
        self, output: PlannedCheckpoint, used: Collection[Numerics]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return descriptions(output, {numerics: kind_of(numerics) for numerics in used})

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By `quant_method` in config.json, or by a file of its own."""
        return settings_of(checkpoint) is not None

    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """A checkpoint of any producer, as vLLM would load it."""
        return ModelOptCheckpoint(checkpoint)


def _input_part(numerics: Numerics) -> str | None:
    """The part of a scheme that `input_scale` holds; None if there is none."""
    if static_inputs(numerics):
        return "input_scale"
    return "input_global_scale" if numerics.input and numerics.input.global_scale else None
