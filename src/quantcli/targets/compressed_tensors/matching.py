"""Which group a module is in, as vLLM looks it up: by its name, by its siblings', by its class."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache

from quantcli.targets.compressed_tensors.config import ConfigGroup, ConfigGroups, usable
from quantcli.targets.vllm_family import EMBEDDINGS, EXPERT, FUSED, is_head

# What the engine calls the parameter that it makes of siblings: it looks that name up first.
_FUSED_NAMES = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
}
# Classes of the engine's modules; a target that is part of such a name is for them.
_LINEARS: tuple[str, ...] = (
    "columnparallellinear",
    "rowparallellinear",
    "replicatedlinear",
    "qkvparallellinear",
    "mergedcolumnparallellinear",
)


class _Patterns:
    """Names and regular expressions, the first of which counts."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.exact: dict[str, int] = {}
        self.expressions: list[tuple[int, re.Pattern[str]]] = []
        self.all = list(patterns)
        for place, pattern in enumerate(self.all):
            if not pattern.startswith("re:"):
                self.exact.setdefault(pattern, place)
            elif usable(pattern):
                self.expressions.append((place, re.compile(pattern[3:])))

    def first(self, name: str) -> str | None:
        """The first pattern that a name is, or begins with a match of."""
        places = [place for place, found in self.expressions if found.match(name)]
        if name in self.exact:
            places.append(self.exact[name])
        return self.all[min(places)] if places else None


class GroupMatcher:
    """Modules by group. Fused siblings of experts are looked up one by one."""

    def __init__(self, groups: ConfigGroups, modules: Collection[str]) -> None:
        """modules: names of all that there are."""
        self._modules = modules
        self._targets = _Patterns(groups.patterns("targets"))
        self._ignore = _Patterns(groups.ignore)
        self._names = groups.patterns("targets")
        self._groups: Mapping[str, ConfigGroup] = {group.name: group for group in groups.groups}
        self._class = [t for t in self._targets.all if not t.startswith("re:")]
        self.group = cache(self._group)

    def ignored(self, module: str) -> bool:
        """Whether a module, or what the engine makes of it and its siblings, is in `ignore`."""
        return any(self._ignore.first(name) for name in (self._fused(module), module) if name)

    def _group(self, module: str) -> ConfigGroup | None:
        """The group of a module that is not ignored; None: it is float."""
        fused, parts = self._fused(module), self._parts(module)
        if target := (self._targets.first(fused) if fused else None):
            return self._of(target)
        matches = [self._targets.first(part) for part in parts]
        if all(matches):
            return self._of(str(matches[0]))
        kinds = _LINEARS
        if is_head(module):
            kinds = ("parallellmhead",)
        elif module.rpartition(".")[2] in EMBEDDINGS:
            kinds = ("vocabparallelembedding",)
        by_class = (t for t in self._class if any(t.lower() in kind for kind in kinds))
        found = next(by_class, None)
        return self._of(found) if found is not None else None

    def _of(self, target: str) -> ConfigGroup:
        return self._groups[self._names[target]]

    def alone(self, module: str) -> ConfigGroup | None:
        """The group that the module's own name is in."""
        target = self._targets.first(module)
        return self._of(target) if target else None

    def _parts(self, module: str) -> list[str]:
        """Names of the unfused modules that must all match."""
        parent, _, last = module.rpartition(".")
        group = next((group for group in FUSED if last in group), None)
        if group not in _FUSED_NAMES or EXPERT.fullmatch(module):
            return [module]
        parts = [f"{parent}.{part}" if parent else part for part in group]
        return [part for part in parts if part in self._modules or part == module]

    def _fused(self, module: str) -> str | None:
        parent, _, last = module.rpartition(".")
        group = next((group for group in FUSED if last in group), None)
        if group not in _FUSED_NAMES or EXPERT.fullmatch(module):
            return None
        return f"{parent}.{_FUSED_NAMES[group]}" if parent else _FUSED_NAMES[group]
