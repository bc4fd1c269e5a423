"""A checkpoint on disk as vLLM-Ascend would take it: its modules, and all that the engine would not
load, or would load without a word and misread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from quantcli.checkpoint.checkpoint import CONFIG, QUANTIZATION_KEYS, Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.findings import Finding, failed, noted
from quantcli.targets.ascend.description import SUFFIXES, Description
from quantcli.targets.ascend.loader import DESCRIPTION, FLOAT, LISTED_EXPERTS, float_only, skip_rule
from quantcli.targets.ascend.tensor_parallel import check_tp
from quantcli.targets.ascend.types import LAYOUTS, TAGS
from quantcli.targets.layouts import StoredModule
from quantcli.targets.sidecars import declared_dtype
from quantcli.targets.stored_format import (
    AGAIN,
    check_bias,
    check_param,
    check_serving_dtype,
    check_shared,
)
from quantcli.targets.vllm_family import EXPERT, expert_sets, fused_groups, fused_name, uneven_experts


class AscendCheckpoint:
    """What the description makes of the tensors. `labels` is by module, FLOAT ones too, without those
    of unknown types."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.serving_dtype = declared_dtype(checkpoint.config) or "BF16"
        self.findings: list[Finding] = []
        self._other_float = False  # said once
        self.checked: dict[str, int] = defaultdict(int)
        description = Description(checkpoint)
        self.findings += description.findings
        self.checked["description"] += len(description.entries)
        self.labels = description.labels
        self.modules: dict[str, StoredModule] = {}
        self._by_module: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, stored in checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            self._by_module[module][suffix] = stored
        if description.entries:
            self._find(self._parameters())
            self._find(self._siblings())
            self._find(self._experts())
            self._find(self._loader())
        self._find(self._config())

    def _find(self, findings: Iterator[Finding]) -> None:
        self.findings += findings

    # -- what the engine registers -------------------------------------------------------------------

    def _parameters(self) -> Iterator[Finding]:
        """Names, dtypes and shapes of each module's tensors."""
        for module, tensors in self._by_module.items():
            label = self.labels.get(module)
            if "weight" not in tensors:
                if odd := sorted(tensors.keys() & SUFFIXES):
                    what = f"`{module}.{odd[0]}` belongs to no weight: `{module}.weight` is missing"
                    yield failed("parameters", what, fix=AGAIN)
            elif label == FLOAT:
                yield from self._float(module, tensors)
            elif label in LAYOUTS:
                yield from self._quantized(module, label, tensors)

    def _float(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
        spec = tensors["weight"].spec
        self.checked["parameters"] += 1
        if spec.dtype not in FLOATS | {"F64"}:
            what = f"is FLOAT in the description, and {spec}: codes would be taken for weights"
            yield failed("parameters", what, f"`{spec.name}`", AGAIN)
        elif spec.dtype not in {self.serving_dtype, "F32"} and not self._other_float:
            self._other_float = True
            what = (
                f"is {spec.dtype}; the model is served in {self.serving_dtype}, to which it is rounded"
            )
            yield noted("parameters", what, f"`{spec.name}`")
        for suffix in sorted(tensors.keys() & SUFFIXES):
            what = f"`{module}` is FLOAT, but has {suffix}: the engine has no place for it"
            yield failed("parameters", what, f"`{module}.{suffix}`", AGAIN)

    def _quantized(
        self, module: str, label: str, tensors: Mapping[str, StoredTensor]
    ) -> Iterator[Finding]:
        layout, spec = LAYOUTS[label], tensors["weight"].spec
        if len(spec.shape) != 2:
            yield failed("parameters", f"is {spec}, no matrix", f"`{spec.name}`", AGAIN)
            return
        n, k = layout.sides(spec.shape)
        sound = True
        for param in layout.params:
            stored = tensors.get(param.suffix)
            self.checked["parameters"] += stored is not None
            if stored is not None:
                for finding in check_param(param, stored.spec, label, n, k):
                    sound = False
                    yield finding
            elif param.required:
                sound = False
                what = f"{label} needs `{module}.{param.suffix}`, which no file holds"
                fix = "the engine would compute with uninitialised memory: " + AGAIN
                yield failed("parameters", what, fix=fix)
        registered = {param.suffix for param in layout.params} | {"bias"}
        for suffix in sorted(tensors.keys() - registered):
            what = f"{label} has no {suffix}: the engine stops at it"
            yield failed("parameters", what, f"`{module}.{suffix}`", AGAIN)
        for finding in check_bias(tensors.get("bias"), n):
            sound = False
            yield finding
        deq = tensors.get("deq_scale")
        if deq is not None and deq.spec.dtype != (right := _DEQ.get(self.serving_dtype, "F32")):
            word = {"BF16": "bfloat16", "F16": "float16"}.get(self.serving_dtype, self.serving_dtype)
            what = f"is {deq.spec.dtype}; an engine that serves in {word} reads {right}"
            yield failed("parameters", what, f"`{module}.deq_scale`", AGAIN)
        if sound:
            parameters = {suffix: tensors[suffix] for suffix in tensors.keys() & registered}
            numerics = next((candidate for candidate, tag in TAGS.items() if tag.label == label), None)
            self.modules[module] = StoredModule(
                module, layout, parameters, (n, k), self.serving_dtype, numerics
            )

    # -- siblings, experts, loader -------------------------------------------------------------------

    def _siblings(self) -> Iterator[Finding]:
        """One type for what the engine merges, and the same bytes of what it keeps once."""
        for refusal in fused_groups(self.labels):
            yield failed("siblings", refusal.what, f"`{refusal.module}`", AGAIN)
        self.checked["siblings"] += sum(fused_name(name) is not None for name in self.modules)
        yield from check_shared(self.modules.values(), fused_name)

    def _experts(self) -> Iterator[Finding]:
        for refusal in expert_sets(self.labels):
            yield failed("experts", refusal.what, f"`{refusal.module}`", AGAIN)
        self.checked["experts"] += sum(bool(EXPERT.fullmatch(name)) for name in self.modules)
        yield from uneven_experts(self.checkpoint)

    def _loader(self) -> Iterator[Finding]:
        """How the engine looks modules up by name, and what it never quantizes."""
        self.checked["loader"] += len(self.labels)
        for refusal in skip_rule(self.labels):
            yield failed("loader", refusal.what, f"`{refusal.module}`", AGAIN)
        listed = str(self.checkpoint.config.get("model_type")) in LISTED_EXPERTS
        sets = {} if listed else {m["experts"]: m for n in self.modules if (m := EXPERT.fullmatch(n))}
        for experts in sorted(sets.keys() - self.labels.keys()):
            what = (
                f"does not describe `{experts}.weight`, which the engine looks up for this model_type"
            )
            fix = f'add `"{experts}.weight"` with the type of its experts'
            yield failed("loader", what, DESCRIPTION, fix)
        noted_labels = set()
        for module in self.modules.values():
            label, layout = module.layout.label, module.layout
            if reason := float_only(module.name):
                yield failed("loader", f"is {label}: {reason}", f"`{module.name}`", AGAIN)
            expert = EXPERT.fullmatch(module.name)
            if expert and not layout.experts:
                what = f"the engine has no {label} for experts"
                yield failed("loader", what, f"`{module.name}`", AGAIN)
            if not expert and layout.note and label not in noted_labels:
                noted_labels.add(label)
                yield noted("loader", layout.note, f"`{module.name}`")

    def check_tp(self, size: int) -> Iterator[Finding]:
        """Heads, widths, and what a module's format allows to be cut."""
        return check_tp(self.checkpoint.text_config, self.modules.values(), size)

    def _config(self) -> Iterator[Finding]:
        config = self.checkpoint.config
        self.checked["config"] += 1
        nested = [(f"{key}.", value) for key, value in config.items() if isinstance(value, dict)]
        for place, level in [("", config), *nested]:
            for key in QUANTIZATION_KEYS:
                if key in level:
                    what = f"has `{place}{key}`: an engine that finds it reads no description"
                    yield failed("config", what, CONFIG, "remove it")
        yield from check_serving_dtype(config)


_DEQ = {"BF16": "F32", "F16": "I64"}
