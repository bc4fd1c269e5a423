"""The config group of a module, as vLLM looks it up: by its name, its siblings' names, its class.

Modules of a stand-alone draft have one name only: see `draft_name`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.detect import Draft
from quantcli.core.errors import InputError
from quantcli.core.untrusted.patterns import Budget, Expression
from quantcli.targets.compressed_tensors.config import ConfigGroup, ConfigGroups
from quantcli.targets.spellings import draft_name, spellings
from quantcli.targets.vllm_family import (
    EMBEDDINGS,
    is_head,
    last_part,
    looked_up_as,
    sibling_names,
)

# Classes of the engine's linears; a target that is part of such a name is for them.
# Sources: vllm 0.32.0, model_executor/layers/linear.py; the order of look-ups in find_matched_target of
# model_executor/layers/quantization/compressed_tensors/utils.py.
_LINEARS: tuple[str, ...] = (
    "columnparallellinear",
    "rowparallellinear",
    "replicatedlinear",
    "qkvparallellinear",
    "mergedcolumnparallellinear",
)


class _Patterns:
    """Names and regular expressions in order; the first that matches counts."""

    def __init__(self, patterns: Iterable[str], key: str) -> None:
        self.exact: dict[str, int] = {}
        self.expressions: list[tuple[int, Expression]] = []
        self.all = list(patterns)
        budget = Budget()
        for place, pattern in enumerate(self.all):
            if not pattern.startswith("re:"):
                self.exact.setdefault(pattern, place)
                continue
            where = f"{CONFIG}: quantization_config.{key}[{place}]"
            with suppress(InputError):  # a finding of whoever has read the config
                expression = Expression(pattern[3:], where, pattern=pattern, budget=budget)
                self.expressions.append((place, expression))

    def first(self, name: str) -> str | None:
        """The first pattern that equals a name, or that its beginning matches. InputError for one that
        takes too long."""
        end = self.exact.get(name, len(self.all))
        earlier = (place for place, expression in self.expressions if expression.match(name))
        place = min(end, next(earlier, end))
        return self.all[place] if place < len(self.all) else None


class GroupMatcher:
    """Looks up the groups of modules. Fused siblings of experts are looked up one by one.

    modules: names of all modules in the checkpoint. draft: what it is, if it is one.
    """

    def __init__(
        self, groups: ConfigGroups, modules: Collection[str], draft: Draft | None = None
    ) -> None:
        self._modules = modules
        self._draft = draft
        self._targets = _Patterns(groups.patterns(), "config_groups.*.targets")
        self._ignore = _Patterns(groups.ignore, "ignore")
        self._names = groups.patterns()
        self._groups: Mapping[str, ConfigGroup] = {group.name: group for group in groups.groups}
        self._class = [t for t in self._targets.all if not t.startswith("re:")]
        self.group = cache(self._group)

    def ignored(self, module: str) -> bool:
        """Whether `ignore` has a module's name in any spelling, or its fused name."""
        if self._draft:
            return self._ignore.first(draft_name(module, self._draft)) is not None
        fused = looked_up_as(module)
        return any(map(self._ignore.first, [*([fused] if fused else []), *spellings(module)]))

    def as_linear(self, module: str) -> bool:
        """Whether a class in `targets` takes the module if it is of torch's class Linear.

        An lm_head is in transformers, and not in vLLM.
        """
        return "Linear" in self._class and not self.ignored(module)

    def _group(self, module: str) -> ConfigGroup | None:
        """The group of a module that is not ignored; None if it has none and stays float."""
        fused, parts = looked_up_as(module), self._parts(module)
        if self._draft:
            fused, parts = draft_name(module, self._draft), []
        if target := (self._targets.first(fused) if fused else None):
            return self._of(target)
        matches = [self._targets.first(part) for part in parts]
        if matches and all(matches):
            return self._of(str(matches[0]))
        kinds = _LINEARS
        if is_head(module):
            kinds = ("parallellmhead",)
        elif last_part(module) in EMBEDDINGS:
            kinds = ("vocabparallelembedding",)
        by_class = (t for t in self._class if any(t.lower() in kind for kind in kinds))
        target = next(by_class, None)
        return self._of(target) if target is not None else None

    def _of(self, target: str) -> ConfigGroup:
        return self._groups[self._names[target]]

    def alone(self, module: str) -> ConfigGroup | None:
        """The group of the module's own name, whatever its siblings are in."""
        target = self._targets.first(draft_name(module, self._draft) if self._draft else module)
        return self._of(target) if target else None

    def _parts(self, module: str) -> list[str]:
        """Names of the siblings that must all match, or of the module alone."""
        if looked_up_as(module) is None:
            return [module]
        prefix = module.removesuffix(last_part(module))
        parts = [prefix + part for part in sibling_names(module)]
        return [part for part in parts if part in self._modules or part == module]
