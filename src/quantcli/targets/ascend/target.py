"""vLLM-Ascend: safetensors with `quant_model_description.json` (the ModelSlim format)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import Draft
from quantcli.core.codes import pack_signed, scale_values, scales_to_store, unpack_signed
from quantcli.core.errors import InputError
from quantcli.core.numerics import CACHES, LATENTS, Cache, Module, Numerics, Parts, multiplier
from quantcli.targets import serving
from quantcli.targets.ascend import latents
from quantcli.targets.ascend.loader import (
    DESCRIPTION,
    FLOAT,
    LARGEST_TP,
    LISTED_EXPERTS,
    also_asked,
    float_only,
    skip_rule,
    unlisted,
    unreachable,
)
from quantcli.targets.ascend.stored import AscendCheckpoint
from quantcli.targets.ascend.tensor_parallel import (
    SLICES,
    USUAL_TP,
    limits,
    pairs_of_groups,
    unfit,
    unsplit,
)
from quantcli.targets.ascend.types import (
    ON_310P,
    TRANSFORM,
    TYPES,
    WRITTEN,
    QuantType,
    deq_from_stored,
    deq_to_store,
    mxfp4_flatquant,
    nibbles,
    pairs,
    scale_bias,
)
from quantcli.targets.base import (
    KEEP,
    Fault,
    PlannedCheckpoint,
    Refusal,
    ScalePart,
    SplitLimits,
    StoredCheckpoint,
    cannot_store,
)
from quantcli.targets.drafts import FLOAT_DRAFT
from quantcli.targets.kv_cache import AttentionLayer, CachePart, CacheTensor, part_of
from quantcli.targets.layouts import Values
from quantcli.targets.serving import ServeCommand, Served
from quantcli.targets.sidecars import flat_json
from quantcli.targets.tensor_parallel import splits_inputs
from quantcli.targets.vllm_family import (
    EXPERT,
    MERGED,
    VllmTarget,
    absent_head,
    fused_name,
    is_head,
    last_part,
)

# npu_quant_matmul takes at most this many input features, and output features on one device.
# Source: op-plugin 517f2e7d, docs/zh/custom_APIs/torch_npu/torch_npu-npu_quant_matmul.md.
MAX_SIDE = 65535


_C8 = "C8"  # the engine's name for an int8 cache with a scale for each channel
_CACHE_PARTS: tuple[tuple[CachePart, Values], ...] = (
    ("k_scale", "positive"), ("k_offset", "zero"), ("v_scale", "positive"), ("v_offset", "zero"),
)  # fmt: skip


def _cache_name(part: str, layer: str) -> str:
    """Such as `model.layers.0.self_attn.k_proj.kv_cache_scale`."""
    side, _, kind = part.partition("_")
    return f"{layer}.{side}_proj.kv_cache_{kind}"


class Ascend(VllmTarget):
    """The format that vLLM-Ascend loads; its description names every tensor."""

    name: ClassVar[str] = "ascend"
    files: ClassVar[Mapping[str, str]] = {DESCRIPTION: "description"}
    float_label: ClassVar[str] = FLOAT
    caches: ClassVar[Mapping[Cache, tuple[CacheTensor, ...]]] = {
        CACHES["c8"]: tuple(
            CacheTensor(part, partial(_cache_name, part), lambda heads, width: (width,), values)
            for part, values in _CACHE_PARTS
        ),
        LATENTS: latents.TENSORS,
    }
    device: Literal["310P"] | None = Field(
        None,
        description="310P: Atlas 300I DUO and others with that chip, which serve in float16 and have "
        "W8A8 and W8A8_DYNAMIC; left out: Atlas A2 and later",
    )
    tp: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="tensor parallel size to serve with; 1 allows int4 transforms of o_proj and "
        "down_proj; MXFP4 ones are made for it, else for 4",
    )

    def layout(self, numerics: Numerics) -> QuantType:
        """The quantization type; its label is that in the description, such as W8A8_DYNAMIC."""
        quant_type = WRITTEN.get(replace(numerics, blocks=1))
        if quant_type is not None and numerics.blocks != 1:
            quant_type = mxfp4_flatquant(numerics.blocks) if quant_type == mxfp4_flatquant(1) else None
        if quant_type is None:
            raise cannot_store(self.name, numerics)
        if self.device and quant_type.label not in ON_310P:
            raise InputError(
                f"the engine has no {quant_type.label} on the {self.device}, only "
                f"{' and '.join(ON_310P)} (vLLM-Ascend's _310p/quantization/methods)",
                fix="use w8a8_static or w8a8_dynamic",
            )
        return quant_type

    def loads_on(self, label: str) -> str:
        """First engine version and hardware."""
        return ON_310P[label] if self.device else TYPES[label].loads_on

    @property
    def served_in(self) -> str | None:
        """Float16 on the 310P, also for models in bfloat16; its loader has no deq_scale in float32.

        Source: vllm-ascend 182b75ea84, _310p/quantization/methods/w8a8_static.py:36-42;
        tests/e2e/pull_request/one_card/_310p/test_dense_model_310p.py:46.
        """
        return "F16" if self.device else None

    def engine_dtype(self, numerics: Numerics, part: ScalePart, serving_dtype: str) -> str:
        """Loaders round input_scale to the serving dtype, and weight_scale of int8 types except W8A8.

        W8A8 has deq_scale alone, which is float32 by value; fp8 and int4 keep float32.
        """
        if part == "weight_scale" and numerics.weight.scale_type:
            return numerics.weight.scale_type.dtype
        quant_type = self.layout(numerics)
        # 310P: vllm-ascend 182b75ea84, _310p/quantization/methods/w8a8_dynamic.py:60-69,134-143
        keeps = quant_type.scale_in_float32 or bool(self.device)
        in_float32 = part == "weight_scale" and keeps
        return "F32" if in_float32 else serving_dtype

    def bias_dtype(self, numerics: Numerics) -> str | None:
        """Float32 next to quant_bias, as the reference producer stores it; the value is the same."""
        return "F32" if self.layout(numerics).static else None

    def fused_name(self, module: str) -> str | None:
        """The engine keeps one input_scale and input_offset for q, k and v: whichever came last."""
        return fused_name(module)

    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """weight [n, k], or [n, k / 2] with two fp4 codes in a byte, the even column in the low four
        bits, and of these the parameters that the engine registers:

        weight_scale, weight_offset: float32 [n, 1]. The offset is zero: W8A16 adds it, and without it
        would read uninitialised memory; the others register it as a parameter. Types with groups have
        weight_scale [n, ceil(k / group_size)] in the stored form of its type, and no offset.
        input_scale, input_offset: float32 [1]; quant_bias: int32 [n]; deq_scale: [n], see deq_to_store.
        left_trans [l, l], right_trans [r, r] in the serving dtype; clip_ratio: float32 [1].
        W4A8_DYNAMIC has codes of two rows in a byte, int8 [n / 2, k], and scale_bias float32 [n, 1].
        W4A16 has weight_packed int32 [n, k / 8], see pack_signed, weight_scale [n, k / group_size] in
        the serving dtype, and weight_shape int32 [2], n and k.
        """
        quant_type = self.layout(numerics)
        if quant_type.packed:
            return {
                "weight_packed": pack_signed(parts["weight"], numerics.weight.element.bits),
                "weight_scale": parts["weight_scale"],
                "weight_shape": torch.tensor(shape, dtype=torch.int32),
            }
        stored = {"weight": pairs(parts["weight"]) if quant_type.paired else parts["weight"]}
        if quant_type.stores_scale:
            typed = numerics.weight.scale_type is not None
            scale = scales_to_store(parts["weight_scale"]) if typed else parts["weight_scale"].float()
            stored["weight_scale"] = scale
            if quant_type.has_offset:
                stored["weight_offset"] = torch.zeros_like(scale)
            if quant_type.paired:
                stored["scale_bias"] = scale_bias(parts["weight"], scale, 1)
        if quant_type.static:
            serving = parts["input_scale"].dtype
            stored["input_scale"] = parts["input_scale"].float()
            stored["input_offset"] = parts["input_offset"]
            stored["quant_bias"] = parts["quant_bias"]
            stored["deq_scale"] = deq_to_store(parts["deq_scale"], serving)
        if numerics.transform:
            stored |= {name: parts[name] for name in TRANSFORM}
        return stored

    def pack_module(
        self, module: str, numerics: Numerics, parts: Parts, shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Where devices share inputs, as of down_proj, scale_bias is float32 [n, 16]: each device adds
        up the slices of its inputs."""
        stored = self.pack(numerics, parts, shape)
        if "scale_bias" in stored and splits_inputs(module):
            stored["scale_bias"] = scale_bias(parts["weight"], stored["weight_scale"], SLICES)
        return stored

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """Codes and scales as stored; the weight_scale of W8A8 is computed from its deq_scale."""
        quant_type = self.layout(numerics)
        if quant_type.packed:
            packed, bits = stored["weight_packed"], numerics.weight.element.bits
            codes = unpack_signed(packed, bits, packed.shape[1] * 32 // bits)
            return {"weight": codes, "weight_scale": scale_values(stored["weight_scale"])}
        parts = {"weight": nibbles(stored["weight"]) if quant_type.paired else stored["weight"]}
        if quant_type.stores_scale:
            parts["weight_scale"] = scale_values(stored["weight_scale"])
        if quant_type.static:
            deq, serving = deq_from_stored(stored["deq_scale"])
            input_scale = stored["input_scale"].to(serving)
            if not quant_type.stores_scale:
                parts["weight_scale"] = deq.unsqueeze(-1) * multiplier(input_scale)
            parts |= {"deq_scale": deq, "quant_bias": stored["quant_bias"]}
            parts |= {"input_scale": input_scale, "input_offset": stored["input_offset"]}
        if numerics.transform:
            parts |= {name: stored[name] for name in TRANSFORM}
        return parts

    def engine_parts(self, numerics: Numerics) -> Parts:
        """`input_scale_alg` 0, int64 [1], for inputs whose scales are powers of two: the engine rounds
        these down, except for MiniMax-M3. Source: vllm-ascend 182b75ea84,
        quantization/methods/w8a8_mxfp8.py:95-99, w4a4_mxfp4.py:86-88, w4a8_mxfp4.py:81.
        `symmetric_inputs`, int64 [1], for W4A8_DYNAMIC."""
        if numerics in WRITTEN and WRITTEN[numerics].paired:
            return {"symmetric_inputs": torch.ones(1, dtype=torch.int64)}
        if numerics.input is None or numerics.input.scale != "e8m0":
            return {}
        return {"input_scale_alg": torch.zeros(1, dtype=torch.int64)}

    def unlike_kernels(self, numerics: Numerics) -> str | None:
        """None: all of its kernels round inputs as `engine_parts` says."""
        return None

    def built_float(self, module: str, names: Collection[str]) -> str | None:
        """Also kv_b_proj; the head on the 310P."""
        if self.device and is_head(module):
            return "the engine builds lm_head as float on the 310P"
        return float_only(module) or super().built_float(module, names)

    def faults(self, module: Module, names: Collection[str]) -> Iterator[Fault]:
        """By sizes, and by the split of transformed inputs over devices; experts of some types."""
        assert module.numerics is not None
        quant_type, (n, k) = self.layout(module.numerics), module.shape
        label, weight = quant_type.label, module.numerics.weight
        expert = EXPERT.fullmatch(module.name)
        fix = f"use {'mxfp8' if weight.scale else 'w8a8_dynamic'} for it"
        if expert and not quant_type.experts:
            yield Fault(f"the engine has no {label} for experts", f"{fix[:-2]}them")
        elif not expert and not quant_type.linears:
            yield Fault(f"the engine has {label} for experts alone", fix, "name")
        if module.biased and not quant_type.biases:
            yield Fault(f"{label} has a bias in float32 alone, and the engine gives it another", fix)
        yield from _unpaired(module, quant_type)
        size, step = weight.group_size, pairs_of_groups(weight)
        if size and k % size:
            yield Fault(f"groups of {size} columns do not divide {k}", fix, "width")
        elif step and expert and k % step:
            what = f"{label} takes inputs of experts in multiples of {step}; there are {k}"
            yield Fault(what, KEEP, "width")
        elif k % quant_type.inputs:
            what = f"{label} takes inputs in multiples of {quant_type.inputs}; there are {k}"
            yield Fault(what, fix, "width")
        elif module.numerics.transform and (reason := unfit(module, k, self.tp)):
            yield Fault(f"{label}: {reason}", fix, "width")
        if max(n, k) > MAX_SIDE:
            what = f"[{n}, {k}] is over the matmul's limit of {MAX_SIDE} a side"
            yield Fault(what, KEEP, "width")

    def check(self, modules: Sequence[Module]) -> Iterator[Refusal]:
        """As for all engines of the family; also the split over `tp` devices, the one `group_size` of
        the description, and the skip rule."""
        yield from super().check(modules)
        for module in modules:
            if module.numerics and self.tp is not None:
                yield from unsplit(module, self.tp)
        yield from self._two_group_sizes(modules)
        yield from skip_rule(self.labels(modules))

    def check_family(self, modules: Sequence[Module], model_type: str) -> Iterator[Refusal]:
        """As for all engines of the family; and families whose modules no entry can name."""
        yield from super().check_family(modules, model_type)
        yield from unreachable(model_type)

    def check_draft(self, draft: Draft) -> Iterator[Refusal]:
        """All: the description cannot have the names that the engine looks up.

        Sources: vllm-ascend 182b75ea84, quantization/modelslim_config.py:709-808 (whole names);
        vllm 0.32.0, model_executor/models/llama_eagle3.py:186-195,347-351.
        """
        what = (
            f"a draft ({draft.kind}) cannot be quantized for this engine: it looks layers up in the "
            "description by whole names, and numbers them after those of the draft's target "
            "(vLLM-Ascend's modelslim_config.py:709-808; vLLM's llama_eagle3.py:186-195)"
        )
        yield Refusal("architectures", what, FLOAT_DRAFT)

    def cache_fault(
        self,
        cache: Cache,
        layer: AttentionLayer,
        modules: Mapping[str, Module],
        config: Settings,
    ) -> Fault | None:
        """Heads of widths that the layout of an int8 cache does not take; the 310P, which has none;
        what the engine needs for latents.

        Source: vllm-ascend 182b75ea84, attention/attention_v1.py:1887-1890,2007.
        """
        leave = "leave `kv_cache` out"
        if self.device:
            return Fault(f"the engine has no int8 cache on the {self.device}", leave)
        if cache == LATENTS:
            int8 = {m.name: bool(m.numerics and self._int8(m.numerics)) for m in modules.values()}
            return next(latents.faults(layer, int8, config), None)
        width = next((w // layer.heads for w in layer.widths if w // layer.heads % 32), None)
        what = f"the engine's int8 cache has heads in multiples of 32; one is {width}"
        return Fault(what, leave) if width else None

    def _int8(self, numerics: Numerics) -> bool:
        """Whether weights are int8 by a scale for each row, which is stored."""
        return numerics.weight.dtype == "int8" and self.layout(numerics).stores_scale

    def serve(self, served: Served, model: str) -> tuple[ServeCommand, ...]:
        """vLLM-Ascend: before version 0.17 it does not detect the format.

        Source: vllm-ascend 182b75ea84, vllm_ascend/utils.py:151-154,178-251.
        """
        flags = ["--quantization", "ascend"]
        if self.tp is not None:  # transforms are made for it
            flags += ["--tensor-parallel-size", str(self.tp)]
        return (serving.vllm(served, model, flags, "vLLM-Ascend"),)

    def cache_note(self, cache: Cache) -> str | None:
        """On versions and hardware, and on nodes that only prefill, or only decode."""
        if cache == LATENTS:
            return (
                "the int8 cache of latents loads on vLLM-Ascend 0.18 and later, Atlas A3; nodes that "
                "only decode have it, others keep a float cache"
            )
        return (
            "the int8 cache loads on vLLM-Ascend main (182b75ea84), Atlas A2, A3; a node that only "
            "prefills keeps a float cache"
        )

    def advise(self, modules: Sequence[Module], model_type: str = "") -> Iterator[str]:
        """Notes on fused widths over the matmul's limit, transforms on one device, a quantized head,
        and experts of families that the engine does not list."""
        if model_type not in LISTED_EXPERTS and any(EXPERT.fullmatch(m.name) for m in modules):
            yield unlisted(model_type)
        rows: dict[str, int] = defaultdict(int)
        for module in modules:
            if module.numerics and (fused := self.fused_name(module.name)):
                rows[fused] += module.shape[0]
        name, n = max(rows.items(), key=lambda item: item[1], default=("", 0))
        if n > MAX_SIDE:
            yield (
                f"`{name}` has {n} rows once the engine has fused it; the matmul takes {MAX_SIDE}: "
                f"serve with tensor parallel size {-(-n // MAX_SIDE)} or more"
            )
        rotated = [m for m in modules if m.numerics and m.numerics.transform]
        if devices := self._largest_tp(modules):
            yield f"transforms are made for tensor parallel sizes that divide {devices}"
        elif any(splits_inputs(module.name) for module in rotated):
            yield "loads on one device alone: inputs of o_proj or down_proj are transformed"
        yield from super().advise(modules, model_type)

    def split_limits(self, modules: Collection[str]) -> SplitLimits:
        """Widths of kernels, transforms of all inputs, slices of scale_bias."""
        largest = self.tp or USUAL_TP
        return lambda module, sides, devices: limits(module, sides[1], devices, largest)

    def sidecars(self, output: PlannedCheckpoint) -> dict[str, bytes]:
        """The description, config.json without quantization, and the index."""
        description = flat_json(self._description(output)) + "\n"
        return {DESCRIPTION: description.encode(), **super().sidecars(output)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By the description, or, if that is lost, by tensors that only this format has."""
        own_suffixes = (".weight_offset", ".deq_scale", ".quant_bias")
        described = (checkpoint.path / DESCRIPTION).exists()
        return described or any(name.endswith(own_suffixes) for name in checkpoint.tensors)

    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """A checkpoint of any producer, as vLLM-Ascend would load it."""
        return AscendCheckpoint(checkpoint)

    def _group_sizes(self, modules: Sequence[Module]) -> dict[int, str]:
        """The `group_size` that types read in the description -> the first module of such a type."""
        sizes: dict[int, str] = {}
        for numerics, module in {m.numerics: m for m in reversed(modules) if m.numerics}.items():
            size = self.layout(numerics).described_group
            if size is not None:
                sizes.setdefault(size, module.name)
        return sizes

    def _two_group_sizes(self, modules: Sequence[Module]) -> Iterator[Refusal]:
        """A refusal of types that read different ones: the engine stops at a size, or divides by zero.

        Source: vllm-ascend 182b75ea84, quantization/methods/w4a8.py:115-120, w4a16.py:186,
        w8a8_mxfp8.py:65,235.
        """
        (size, module), *others = [*self._group_sizes(modules).items(), (0, "")]
        for other, name in others[:-1]:
            what = (
                f"the description has one `group_size` for all modules: `{module}` reads {size}, and "
                f"this one {other}"
            )
            yield Refusal(name, what, "take a scheme with the same groups for both")

    def _largest_tp(self, modules: Sequence[Module]) -> int | None:
        """The largest number of devices that MXFP4 transforms are made for; None if there are none."""
        numerics = {m.numerics for m in modules if m.numerics and m.numerics.transform}
        mx = any(self.layout(each).label == mxfp4_flatquant(1).label for each in numerics)
        return (self.tp or USUAL_TP) if mx else None

    def _description(self, output: PlannedCheckpoint) -> dict[str, object]:
        """One entry for each tensor, by its name on disk, and entries that only the engine looks up."""
        labels = self.labels(output.modules)
        used = set(labels.values())
        sizes = self._group_sizes(output.modules)
        table: dict[str, object] = {
            "version": "1.0.0",
            "model_quant_type": next((t.label for t in WRITTEN.values() if t.label in used), FLOAT),
            "metadata": {},
            "group_size": next(iter(sizes), 0),
            "optional": {},
        }
        if output.cache == LATENTS:
            table["fa_quant_type"] = latents.TYPE
        elif output.cache is not None:
            table |= {"kv_cache_type": _C8, "kv_quant_type": _C8}
        if devices := self._largest_tp(output.modules):
            table[LARGEST_TP] = devices
        for name in sorted(output.tensors):
            owner, _, suffix = name.rpartition(".")
            if output.cache is not None and part_of(name) is not None:
                table[name] = latents.LABEL if output.cache == LATENTS else _C8
            else:
                table[name] = FLOAT if suffix == "bias" else labels.get(owner, FLOAT)
        if head := absent_head(output.tensors):
            table[head] = FLOAT
        for module in output.modules:
            # siblings may be stored fused; for some models the engine still looks each up by name
            parent = module.name.rpartition(".")[0]
            for sibling in MERGED.get(last_part(module.name), ()):
                table.setdefault(f"{parent}.{sibling}.weight", labels[module.name])
        kind = output.config.text("model_type") or ""
        for module in output.modules:
            for name in also_asked(module.name, kind):
                table.setdefault(f"{name}.weight", labels[module.name])
        listed = kind in LISTED_EXPERTS
        for module in output.modules:
            if match := EXPERT.fullmatch(module.name):  # also of float experts that stay in their stack
                name = module.name if listed else match["experts"]
                # the engine takes an entry for weight_packed for that of the weight
                if not listed or f"{name}.weight_packed" not in table:
                    table[f"{name}.weight"] = labels[module.name]
        return table


def _unpaired(module: Module, quant_type: QuantType) -> Iterator[Fault]:
    """Faults of sides that codes in pairs of rows, or slices of their scale_bias, do not divide.

    Source: vllm-ascend 182b75ea84, quantization/methods/w4a8.py:313-319 (four bytes of eight rows).
    """
    (n, k), label = module.shape, quant_type.label
    if quant_type.paired and n % 8:
        what = f"{label} takes outputs in multiples of 8; there are {n}"
        yield Fault(what, "use w8a8_dynamic for it", "width")
    if quant_type.paired and splits_inputs(module.name) and k % SLICES:
        what = f"{label} has a bias for each of {SLICES} slices, which do not divide {k} inputs"
        yield Fault(what, "use w8a8_dynamic for it", "width")
