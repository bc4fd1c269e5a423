"""A compressed-tensors checkpoint on disk as vLLM would take it: its modules, and all that the engine
would not load, or would load without a word and misread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.findings import Finding, failed, noted
from quantcli.targets.compressed_tensors.config import ConfigGroup, read_groups
from quantcli.targets.compressed_tensors.kinds import FLOAT
from quantcli.targets.compressed_tensors.layouts import SUFFIXES, layout_of
from quantcli.targets.compressed_tensors.matching import GroupMatcher
from quantcli.targets.layouts import StoredModule
from quantcli.targets.sidecars import declared_dtype, quantization_block
from quantcli.targets.stored_format import (
    AGAIN,
    check_bias,
    check_param,
    check_serving_dtype,
    check_shared,
)
from quantcli.targets.tensor_parallel import check_tp
from quantcli.targets.vllm_family import (
    EMBEDDINGS,
    EXPERT,
    ROUTERS,
    expert_sets,
    fused_groups,
    fused_siblings,
    is_head,
    uneven_experts,
)

_CODES = frozenset({"I8", "U8", "I32", "F8_E4M3"})


class CompressedTensorsCheckpoint:
    """What `quantization_config` makes of the tensors. `labels` is by module, of float ones too."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.serving_dtype = declared_dtype(checkpoint.config) or "BF16"
        self.checked: dict[str, int] = defaultdict(int)
        self.modules: dict[str, StoredModule] = {}
        self.labels: dict[str, str] = {}
        self._by_module: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, stored in checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            self._by_module[module][suffix] = stored
        self._names = {
            name for name, tensors in self._by_module.items() if tensors.keys() & {"weight", *SUFFIXES}
        }
        groups = read_groups(quantization_block(checkpoint.config))
        self.findings: list[Finding] = groups.findings
        self._matcher = GroupMatcher(groups, self._names)
        self._ignore = groups.ignore
        for check in (self._parameters, self._siblings, self._experts, self._loader, self._config):
            self.findings += check()

    def check_tp(self, size: int) -> Iterator[Finding]:
        """Heads, widths, and what a module's format allows to be cut."""
        return check_tp(self.checkpoint.text_config, self.modules.values(), size)

    # -- what the engine registers -------------------------------------------------------------------

    def _parameters(self) -> Iterator[Finding]:
        """Names, dtypes and shapes of each module's tensors, by the group that it is in."""
        strangers: dict[str, list[str]] = defaultdict(list)
        for module in sorted(self._names):
            tensors = self._by_module[module]
            ignored = self._matcher.ignored(module)
            group = None if ignored else self._matcher.group(module)
            quantized = bool(tensors.keys() & SUFFIXES) or (
                "weight" in tensors and tensors["weight"].spec.dtype in _CODES
            )
            self.checked["parameters"] += 1
            if not quantized and not self._linear(module, tensors):
                continue  # norms, embeddings, convolutions
            if group is None:
                self.labels[module] = FLOAT
                if quantized:
                    strangers[self._stranger(tensors, ignored)].append(module)
            elif group.kind is None or group.numerics is None:
                continue  # told with the group
            elif not quantized and is_head(module) and self._matcher.alone(module) is None:
                self.labels[module] = FLOAT
            else:
                self.labels[module] = group.kind.label
                yield from self._quantized(module, group, tensors)
        for what, names in strangers.items():
            more = f"; {len(names) - 1} more like it" if len(names) > 1 else ""
            yield failed("loader", what + more, f"`{names[0]}`", AGAIN)

    def _linear(self, module: str, tensors: Mapping[str, StoredTensor]) -> bool:
        last = module.rpartition(".")[2]
        weight = tensors.get("weight")
        return (
            weight is not None
            and len(weight.spec.shape) == 2
            and not (last in EMBEDDINGS or last.endswith(("embedding", "wpe")))
        )

    def _stranger(self, tensors: Mapping[str, StoredTensor], ignored: bool) -> str:
        """What is wrong with a module with codes that the engine takes for float."""
        odd = sorted(tensors.keys() & SUFFIXES)
        has = f"has {odd[0]}" if odd else f"is {tensors['weight'].spec.dtype}"
        why = "is in `ignore`" if ignored else "is in no group of quantization_config"
        return f"{why}, but {has}: the engine would take codes for weights"

    def _quantized(
        self, module: str, group: ConfigGroup, tensors: Mapping[str, StoredTensor]
    ) -> Iterator[Finding]:
        assert group.numerics is not None
        assert group.kind is not None
        layout = layout_of(group.numerics, group.kind)
        label, codes = layout.label, tensors.get(layout.weight.suffix)
        if codes is None:
            other = "weight" if "weight" in tensors else None
            what = f"{label} needs `{module}.{layout.weight.suffix}`, which no file holds"
            what += f"; there is {tensors['weight'].spec}, under `weight`" if other else ""
            fix = f"list it in `ignore` if it is float, or {AGAIN}"
            yield failed("parameters", what, f"`{module}` (config_groups.{group.name})", fix)
            return
        if len(codes.spec.shape) != 2:
            yield failed("parameters", f"is {codes.spec}, no matrix", f"`{codes.spec.name}`", AGAIN)
            return
        n, k = layout.sides(codes.spec.shape)
        sound = True
        if "weight_shape" in {param.suffix for param in layout.params} & tensors.keys():
            shape = self._said_shape(tensors["weight_shape"])
            per = 32 // group.kind.bits
            if shape is not None and shape[0] == n and 0 <= k - shape[1] < per:
                k = shape[1]
            else:
                sound = False
                what = f"says {list(shape) if shape else 'no shape'}; the codes are for {n} x {k}"
                yield failed("parameters", what, f"`{module}.weight_shape`", AGAIN)
        for param in layout.params:
            stored = tensors.get(param.suffix)
            if stored is None:
                sound = False
                what = f"{label} needs `{module}.{param.suffix}`, which no file holds"
                fix = "the engine would compute with uninitialised memory: " + AGAIN
                yield failed("parameters", what, fix=fix)
                continue
            for finding in check_param(param, stored.spec, label, n, k):
                sound = False
                yield finding
        registered = {param.suffix for param in layout.params} | {"bias"}
        for suffix in sorted(tensors.keys() - registered):
            what = f"{label} has no {suffix}: the engine stops at it, or leaves it out"
            yield failed("parameters", what, f"`{module}.{suffix}`", AGAIN)
        size = group.numerics.weight.block[1] if group.numerics.weight.per == "group" else 0  # type: ignore[index]
        if size and k % size:
            sound = False
            what = f"groups of {size} columns do not divide {k}"
            yield failed("parameters", what, f"`{module}`", AGAIN)
        for finding in check_bias(tensors.get("bias"), n):
            sound = False
            yield finding
        if sound:
            parameters = {suffix: tensors[suffix] for suffix in tensors.keys() & registered}
            self.modules[module] = StoredModule(
                module, layout, parameters, (n, k), self.serving_dtype, group.numerics
            )

    def _said_shape(self, stored: StoredTensor) -> tuple[int, int] | None:
        if stored.spec.shape != (2,) or stored.spec.dtype not in {"I64", "I32"}:
            return None
        n, k = read_tensor(stored).tolist()
        return n, k

    # -- siblings, experts, loader -------------------------------------------------------------------

    def _siblings(self) -> Iterator[Finding]:
        """One scheme for what the engine merges, and the same bytes of what it keeps once."""
        for refusal in fused_groups(self.labels):
            yield failed("siblings", refusal.what, f"`{refusal.module}`", AGAIN)
        self.checked["siblings"] += sum(fused_siblings(name) is not None for name in self.modules)
        yield from check_shared(
            self.modules.values(), lambda name: None if EXPERT.fullmatch(name) else fused_siblings(name)
        )
        for name, module in self.modules.items():
            alone = self._matcher.alone(name)
            if alone is not None and alone.kind and alone.kind.label != module.layout.label:
                what = (
                    f"config_groups.{alone.name} makes it {alone.kind.label}, and the engine takes "
                    f"{module.layout.label} for all that it merges with it"
                )
                yield failed("siblings", what, f"`{name}`", AGAIN)

    def _experts(self) -> Iterator[Finding]:
        for refusal in expert_sets(self.labels):
            yield failed("experts", refusal.what, f"`{refusal.module}`", AGAIN)
        self.checked["experts"] += sum(bool(EXPERT.fullmatch(name)) for name in self.modules)
        yield from uneven_experts(self.checkpoint)

    def _loader(self) -> Iterator[Finding]:
        """What the engine never quantizes, or not with this."""
        self.checked["loader"] += len(self.labels)
        for name, module in self.modules.items():
            last = name.rpartition(".")[2]
            if last in ROUTERS:
                what = f"is {module.layout.label}: {ROUTERS[last]}"
                yield failed("loader", what, f"`{name}`", AGAIN)
            if EXPERT.fullmatch(name) and not module.layout.experts:
                what = f"the engine has no {module.layout.label} for experts"
                yield failed("loader", what, f"`{name}`", AGAIN)

    def _config(self) -> Iterator[Finding]:
        """Names of `ignore` that are nowhere, and the dtype."""
        self.checked["config"] += 1
        stale = [
            name
            for name in self._ignore
            if not name.startswith("re:") and "." in name and name not in self._names
            and not is_head(name) and not any(other.startswith(f"{name}.") for other in self._names)
        ]  # fmt: skip
        if stale:
            more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
            yield noted("config", f"`ignore` names `{stale[0]}`{more}, which no file holds", CONFIG)
        yield from check_serving_dtype(self.checkpoint.config)
