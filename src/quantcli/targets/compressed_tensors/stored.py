"""A compressed-tensors checkpoint on disk as vLLM would load it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.detect import draft_of
from quantcli.checkpoint.header import StoredTensor
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import Cache
from quantcli.targets.base import AGAIN
from quantcli.targets.compressed_tensors.config import ConfigGroup, declared_cache, read_groups
from quantcli.targets.compressed_tensors.layouts import SUFFIXES, layout_of
from quantcli.targets.compressed_tensors.matching import GroupMatcher
from quantcli.targets.sidecars import quantization_block
from quantcli.targets.spellings import of_no_module
from quantcli.targets.stored_format import StoredFormat, recorded_shape, some
from quantcli.targets.vllm_family import (
    QUANTIZED_ROUTERS,
    is_head,
    is_linear,
    stacked_sets,
    tied_head,
)

_CODES = frozenset({"I8", "U8", "I32", "F8_E4M3"})


class CompressedTensorsCheckpoint(StoredFormat):
    """Modules by the groups of `quantization_config`."""

    def read(self) -> list[Finding]:
        """The groups, and the names that they can match."""
        self._names = {
            name for name, tensors in self.by_module.items() if tensors.keys() & {"weight", *SUFFIXES}
        }
        block = quantization_block(self.checkpoint.config)
        groups = read_groups(block)
        self._matcher = GroupMatcher(groups, self._names, draft_of(self.checkpoint))
        self._ignore = groups.ignore
        self._cache, faults = declared_cache(block)
        return [*groups.findings, *faults]

    def declared_cache(self) -> Cache | None:
        """By `kv_cache_scheme`."""
        return self._cache

    def check_parameters(self) -> Iterator[Finding]:
        """Quantized modules are in a group, and have what the engine registers for it."""
        without_group: dict[str, list[str]] = defaultdict(list)
        routers: list[str] = []
        for module in sorted(self._names):
            tensors = self.by_module[module]
            weight = tensors.get("weight")
            ignored = self._matcher.ignored(module)
            group = None if ignored else self._matcher.group(module)
            quantized = bool(tensors.keys() & SUFFIXES) or (
                weight is not None and weight.spec.dtype in _CODES
            )
            self.checked["parameters"] += 1
            if is_head(module) and not quantized:
                yield from self._float_head(module)
            if not quantized and not (weight is not None and is_linear(module, weight.spec.shape)):
                continue  # norms, embeddings, convolutions
            if group is None:
                self.labels[module] = self.float_label
                if quantized:
                    without_group[_codes_as_float(tensors, ignored)].append(module)
            elif group.kind is None or group.numerics is None:
                continue  # `read` reports the group
            elif not quantized and self.float_only(module):
                self.labels[module] = self.float_label
                if self.checkpoint.text_config.text("model_type") in QUANTIZED_ROUTERS:
                    routers.append(module)
            elif not quantized and is_head(module) and self._matcher.alone(module) is None:
                self.labels[module] = self.float_label
            else:
                self.labels[module] = group.kind.label
                yield from self._quantized(module, group)
        if routers:
            what = f"`ignore` lacks {some(routers)}, float routers that the engine would quantize"
            yield failed("loader", what, CONFIG, "add their names to `ignore`")
        if head := tied_head(self.checkpoint):
            yield from self._float_head(head)
        for what, names in without_group.items():
            more = f"; {len(names) - 1} more like it" if len(names) > 1 else ""
            yield failed("loader", what + more, f"`{names[0]}`", AGAIN)

    def _float_head(self, module: str) -> Iterator[Finding]:
        """The finding for an lm_head that only vLLM takes for float."""
        if self._matcher.as_linear(module):
            what = "is float and not in `ignore`: transformers would take it for quantized"
            yield failed("loader", what, f"`{module}`", "add its name to `ignore`")

    def _quantized(self, module: str, group: ConfigGroup) -> Iterator[Finding]:
        assert group.numerics is not None
        assert group.kind is not None
        layout, tensors = layout_of(group.numerics, group.kind), self.by_module[module]
        codes = tensors.get(layout.weight.suffix)
        if codes is None:
            what = self.missing(module, layout.weight.suffix).what
            if "weight" in tensors:
                what += f"; there is {tensors['weight'].spec}, under `weight`"
            fix = f"list it in `ignore` if it is float, or {AGAIN}"
            yield failed("parameters", what, f"`{module}` (config_groups.{group.name})", fix)
            return
        sides, faults = None, []
        if len(codes.spec.shape) == 2:
            n, k = layout.sides(codes.spec.shape)
            if "weight_shape" in {param.suffix for param in layout.params} & tensors.keys():
                shape = recorded_shape(tensors["weight_shape"])
                if shape is not None and shape[0] == n and 0 <= k - shape[1] < 32 // group.kind.bits:
                    k = shape[1]
                else:
                    what = f"says {list(shape) if shape else 'no shape'}; the codes are for {n} x {k}"
                    faults.append(failed("parameters", what, f"`{module}.weight_shape`", AGAIN))
            size = group.numerics.weight.group_size
            if size and k % size:
                what = f"groups of {size} columns do not divide {k}"
                faults.append(failed("parameters", what, f"`{module}`", AGAIN))
            sides = n, k
        yield from self.check_layout(module, layout, group.numerics, sides, faults)

    def builds_quantized(self, module: str) -> bool | None:
        """By its group."""
        return not self._matcher.ignored(module) and self._matcher.group(module) is not None

    def check_siblings(self) -> Iterator[Finding]:
        """A module's own name is in the group in which the engine puts its siblings."""
        for name, module in self.modules.items():
            alone = self._matcher.alone(name)
            if alone is not None and alone.kind and alone.kind.label != module.layout.label:
                what = (
                    f"config_groups.{alone.name} makes it {alone.kind.label}, and the engine takes "
                    f"{module.layout.label} for it and its siblings"
                )
                yield failed("siblings", what, f"`{name}`", AGAIN)

    def check_config(self) -> Iterator[Finding]:
        """A note on names in `ignore` that no module has; the serving dtype."""
        stacks = stacked_sets(self.checkpoint.tensors)
        listed = (name for name in self._ignore if not name.startswith("re:"))
        if absent := of_no_module(listed, self._names, stacks):
            yield noted("config", f"`ignore` names {some(absent)}, which no file holds", CONFIG)
        yield from super().check_config()


def _codes_as_float(tensors: Mapping[str, StoredTensor], ignored: bool) -> str:
    """The message on a module with codes that the engine builds as float."""
    suffixes = sorted(tensors.keys() & SUFFIXES)
    has = f"has {suffixes[0]}" if suffixes else f"is {tensors['weight'].spec.dtype}"
    reason = "is in `ignore`" if ignored else "is in no group of quantization_config"
    return f"{reason}, but {has}: the engine would take codes for weights"
