"""A checkpoint on disk as vLLM-Ascend would load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.config.places import QUANTIZATION_KEYS
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import CACHES, LATENTS, Cache
from quantcli.targets import vllm_family
from quantcli.targets.ascend import latents
from quantcli.targets.ascend.arithmetic import check_arithmetic
from quantcli.targets.ascend.description import SUFFIXES, Description
from quantcli.targets.ascend.loader import DESCRIPTION, FLOAT, LISTED_EXPERTS, float_only, skip_rule
from quantcli.targets.ascend.tensor_parallel import SLICES, limits, pairs_of_groups
from quantcli.targets.ascend.types import (
    TYPES,
    UNCHECKED,
    WRITTEN,
    QuantType,
    mxfp4_flatquant,
    type_of,
)
from quantcli.targets.base import AGAIN
from quantcli.targets.kv_cache import StoredCache, is_scale
from quantcli.targets.layouts import Sides, StoredModule
from quantcli.targets.stored_format import StoredFormat, as_findings, orphan, recorded_shape
from quantcli.targets.tensor_parallel import splits_inputs
from quantcli.targets.vllm_family import EXPERT, stacked_sets

# Caches by their types. Of keys and values next to k_proj and v_proj the loader takes one number or
# one for each row. Source: vllm-ascend 182b75ea84, quantization/modelslim_config.py:624-633 and 1041,
# quantization/methods/kv_c8.py:99-139, attention/attention_v1.py:1892-1915.
_CACHES = {"C8": CACHES["c8"], latents.TYPE: LATENTS}
_MOST = 2**20  # numbers of an offset that are looked at
# dtype of deq_scale by the serving dtype
_DEQ_DTYPES = {"BF16": "F32", "F16": "I64"}


class AscendCheckpoint(StoredFormat):
    """Modules by the types in quant_model_description.json."""

    float_label = FLOAT
    unregistered = "the engine stops at it"

    def read(self) -> list[Finding]:
        """The types of the description; without its entries nothing else is read."""
        description = Description(self.checkpoint)
        self.checked["description"] += len(description.entries)
        self.labels = description.labels
        self._group_size, self._version = description.group_size, description.version
        self._cache = _CACHES.get(str(description.cache))
        self._largest_tp = description.largest_tp
        self.readable = bool(description.entries)
        return description.findings

    def check_parameters(self) -> Iterator[Finding]:
        """Float tensors are float, quantized modules have what their type registers."""
        for module, tensors in self.by_module.items():
            label = self.labels.get(module)
            if label in UNCHECKED:
                self.unchecked[module] = f"type {label}"
            elif label in TYPES and TYPES[label].weight.suffix in tensors:
                yield from self._quantized(module, label)
            elif "weight" not in tensors:
                if suffixes := sorted(tensors.keys() & SUFFIXES):
                    yield orphan(module, suffixes[0])
            elif label == FLOAT:
                yield from self._float(module)
            elif label in TYPES:
                yield self.missing(module, TYPES[label].weight.suffix)

    def _float(self, module: str) -> Iterator[Finding]:
        tensors = self.by_module[module]
        spec = tensors["weight"].spec
        self.checked["parameters"] += 1
        if spec.dtype not in FLOATS | {"F64"}:
            what = f"is FLOAT in the description, and {spec}: codes would be taken for weights"
            yield failed("parameters", what, f"`{spec.name}`", AGAIN)
        for suffix in sorted(tensors.keys() & SUFFIXES):
            what = f"`{module}` is FLOAT, but has {suffix}: the engine has no place for it"
            yield failed("parameters", what, f"`{module}.{suffix}`", AGAIN)

    def declared_cache(self) -> Cache | None:
        """C8, int8 latents, or none."""
        return self._cache

    def unknown_cache(self, tensors: Mapping[str, StoredTensor]) -> str | None:
        """Latents in fp8: their producer stores offsets in float32.

        Source: msmodelslim 26.1.0, core/quant_service/modelslim_v1/save/ascendv1.py:551-570.
        """
        offsets = (t.spec.dtype for name, t in tensors.items() if name.endswith(".fa_k.offset"))
        if any(dtype != "I8" for dtype in offsets):
            return "scales of latents in fp8, which the engine has on A5, were not checked"
        return None

    def check_offsets(self, cache: StoredCache) -> Iterator[Finding]:
        """Offsets are added as keys are written, and not subtracted as they are read; latents are int8
        where the engine has them.

        Source: vllm-ascend 182b75ea84, attention/attention_v1.py:1918-1919,1970-2035; for
        latents attention/mla_v1.py:1501-1508 and, in distributed/kv_transfer/kv_p2p,
        mooncake_layerwise_connector.py:1957.
        """
        int8 = {name: "weight_scale" in tensors and tensors["weight"].spec.dtype == "I8"
                for name, tensors in self.by_module.items() if "weight" in tensors}  # fmt: skip
        for name in cache.layers if self._cache == LATENTS else ():
            layer = cache.attention.get(name)
            if layer is not None and layer.queries:
                for fault in latents.faults(layer, int8, self.checkpoint.text_config):
                    yield failed("cache", fault.what, f"`{name}`", fault.fix)
        for stored in cache.tensors:
            name, size = stored.spec.name, stored.spec.numel
            of_latents = _of_latents(name)
            if self._cache is None or (self._cache == LATENTS) != of_latents:
                entry = f'"fa_quant_type": "{latents.TYPE}"' if of_latents else '"kv_cache_type": "C8"'
                what = f"there is no {entry} in the description: {self.unregistered}"
                yield failed("cache", what, f"`{name}`", AGAIN)
            elif is_scale(name) or size > _MOST or stored.spec.dtype not in {*FLOATS, "I8"}:
                continue
            elif bool(read_tensor(stored).any()):
                what = "is not 0: the engine adds it as it writes keys and values, and reads without it"
                yield failed("cache", what, f"`{name}`", AGAIN)

    def _quantized(self, module: str, label: str) -> Iterator[Finding]:
        layout, tensors = type_of(label, self._group_size), self.by_module[module]
        numerics = next((numerics for numerics, t in WRITTEN.items() if t is layout), None)
        if layout == mxfp4_flatquant(1) and numerics and splits_inputs(module):
            layout = mxfp4_flatquant(self._largest_tp)
            numerics = replace(numerics, blocks=self._largest_tp)
        codes = tensors[layout.weight.suffix].spec
        faults = list(self._shapes(module, layout)) if len(codes.shape) == 2 else []
        yield from self.check_layout(module, layout, numerics, faults=faults)
        if len(codes.shape) != 2:
            return
        if not layout.linears and not layout.note and not EXPERT.fullmatch(module):
            what = f"is {label}, which the engine has for experts alone"
            yield failed("loader", what, f"`{module}`", AGAIN)
        if not layout.biases and "bias" in tensors:
            what = f"the matmul of {label} takes biases in float32, and the engine gives it another"
            yield noted("loader", what, f"`{module}.bias`")
        self.checked["parameters"] += sum(param.suffix in tensors for param in layout.params)
        deq = tensors.get("deq_scale")
        if deq is not None and deq.spec.dtype != (right := _DEQ_DTYPES.get(self.serving_dtype, "F32")):
            name = {"BF16": "bfloat16", "F16": "float16"}.get(self.serving_dtype, self.serving_dtype)
            what = f"is {deq.spec.dtype}; an engine that serves in {name} reads {right}"
            yield failed("parameters", what, f"`{module}.deq_scale`", AGAIN)

    def _shapes(self, module: str, layout: QuantType) -> Iterator[Finding]:
        """Findings of shapes that the name of a module decides, or a tensor records."""
        tensors = self.by_module[module]
        n, k = layout.sides(tensors[layout.weight.suffix].spec.shape)
        slices, other = (SLICES, 1) if splits_inputs(module) else (1, SLICES)
        bias = tensors.get("scale_bias")
        if bias is not None and bias.spec.shape == (n, other):
            what = (
                f"is {list(bias.spec.shape)}; the engine has [{n}, {slices}] for a module of this name"
            )
            yield failed("parameters", what, f"`{module}.scale_bias`", AGAIN)
        shape = tensors.get("weight_shape")
        if layout.packed and shape is not None and (sides := recorded_shape(shape)) != (n, k):
            what = f"says {list(sides) if sides else 'no shape'}; the codes are for {n} x {k}"
            yield failed("parameters", what, f"`{module}.weight_shape`", AGAIN)
        paired = bool(EXPERT.fullmatch(module)) and layout.operand.scale == "e8m0"
        step = (pairs_of_groups(layout.operand) or 1) if paired else layout.inputs
        if k % step:
            what = f"has {k} inputs; the engine takes multiples of {step} with {layout.label}"
            yield failed("parameters", what, f"`{module}`", AGAIN)
        if layout.packed and layout.described_group and k % layout.described_group:
            what = f"groups of {layout.described_group} columns do not divide {k}"
            yield failed("parameters", what, f"`{module}`", AGAIN)

    def _old_versions(self) -> Iterator[Finding]:
        """A note on a description that older versions of the engine misread."""
        names = (n for n, m in self.modules.items() if m.layout.label == "W4A8_DYNAMIC")
        if self._version != "1.0.0" and (name := next(names, None)):
            # Source: vllm-ascend 0.25.1rc1, quantization/methods/w4a8.py:96-98
            what = (
                'has no "version": "1.0.0": vLLM-Ascend up to 0.25.1 then takes each byte of '
                f"`{name}.weight` for one code, and stops"
            )
            yield noted("description", what, DESCRIPTION)

    def check_loader(self) -> Iterator[Finding]:
        """The skip rule for beginnings of names, and look-ups of experts by the name of their set."""
        yield from self._old_versions()
        yield from as_findings("loader", skip_rule(self.labels))
        if self.checkpoint.config.text("model_type") in LISTED_EXPERTS:
            for experts in sorted(stacked_sets(self.checkpoint.tensors)):
                # Source: vllm-ascend 182b75ea84, quantization/modelslim_config.py:776-808
                name = f"{experts}.0.gate_proj"
                if name not in self.labels:
                    what = (
                        f"does not describe `{name}.weight`, which the engine looks up for the experts"
                    )
                    fix = f'add it, and those of other experts, as "{FLOAT}"'
                    yield failed("loader", what, DESCRIPTION, fix)
            return
        sets = {match["experts"] for name in self.modules if (match := EXPERT.fullmatch(name))}
        for experts in sorted(sets - self.labels.keys()):
            what = (
                f"does not describe `{experts}.weight`, which the engine looks up for this model_type"
            )
            fix = f'add `"{experts}.weight"` with the type of its experts'
            yield failed("loader", what, DESCRIPTION, fix)

    def check_config(self) -> Iterator[Finding]:
        """config.json has no block that keeps the engine from reading the description."""
        config = self.checkpoint.config
        for level in [config, *(inner for _, inner in config.inner())]:
            for key in QUANTIZATION_KEYS:
                if key in level:
                    what = f"has `{level.key_path(key)}`: an engine that finds it reads no description"
                    yield failed("config", what, CONFIG, "remove it")
        yield from super().check_config()

    def check_arithmetic(self, module: StoredModule) -> Iterator[Finding]:
        """deq_scale, quant_bias and scale_bias follow from others; transforms can be inverted."""
        return check_arithmetic(module)

    def fused_name(self, module: str) -> str | None:
        """As the target's: none for experts, which share no tensors."""
        return vllm_family.fused_name(module)

    def float_only(self, module: str) -> str | None:
        """The reason why the engine always builds this module as float."""
        return float_only(module)

    def limits(self, module: StoredModule, sides: Sides, devices: int) -> Iterator[str]:
        """Widths of kernels, transforms of all inputs, slices of scale_bias."""
        return limits(module, sides[1], devices, self._largest_tp)


def _of_latents(name: str) -> bool:
    """Whether a tensor of the cache is one of latents."""
    return name.rpartition(".")[0].endswith((".fa_q", ".fa_k", ".fa_v"))
