"""Groups of modules that share what an engine keeps once: an input scale, a transform, one scale for
several weights.

An engine fuses some modules (q, k and v), which its target knows; a recipe may name more, such as all
experts of a layer, whose loader takes one input scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from quantcli.core.errors import InputError
from quantcli.recipe.recipe import Recipe, Rule
from quantcli.schemes.base import Scheme


@dataclass(frozen=True)
class Siblings:
    """The groups of a model's modules.

    names: the group of each module that shares something.
    given: groups that a recipe makes, or joins others to.
    """

    names: Mapping[str, str]
    given: frozenset[str] = frozenset()

    def group(self, module: str) -> str | None:
        """The name of a module's group; None for a module that shares nothing."""
        return self.names.get(module)

    def given_to(self, module: str) -> bool:
        """Whether a recipe makes the module's group, or joins others to it."""
        return self.names.get(module) in self.given

    def have_effect(self, assigned: Mapping[str, Rule | None]) -> bool:
        """Whether a scheme keeps anything once for a group that the recipe makes."""
        rules = (assigned[module] for module, name in self.names.items() if name in self.given)
        schemes = {rule.scheme for rule in rules if rule and rule.scheme}
        return any(scheme.shares_data or scheme.needs_weight_amax for scheme in schemes)


def siblings_of(recipe: Recipe, assigned: Mapping[str, Rule | None]) -> Siblings:
    """The groups of quantized modules by a recipe and its target. assigned: the rule of each module.

    InputError for a pattern of the recipe that makes no group, and for one that groups modules with
    different schemes.
    """
    quantized = {name: rule for name, rule in assigned.items() if rule and rule.scheme}
    fused = recipe.target.fused_name
    names = {module: name for module in quantized if (name := fused(module)) is not None}
    parents: dict[str, str] = {}  # of names that are one group
    given: set[str] = set()  # modules that the recipe groups
    for pattern in recipe.siblings:
        keys = {module: key for module in quantized if (key := pattern.key(module)) is not None}
        if max(Counter(keys.values()).values(), default=0) < 2:
            what = "makes no group of two modules" if keys else "matches no quantized module"
            fix = "it matches whole module names; those with equal capture groups are siblings"
            raise InputError(f"`{pattern.text}` {what}", where=pattern.where, fix=fix)
        first: dict[tuple[str | None, ...], str] = {}
        for module, key in keys.items():
            name = _root(parents, names.setdefault(module, module))
            other = _root(parents, first.setdefault(key, name))
            if name != other:
                parents[name] = other
        given |= keys.keys()
    names = {module: _root(parents, name) for module, name in names.items()}
    siblings = Siblings(names, frozenset(names[module] for module in given))
    _check(siblings, quantized)
    return siblings


def _root(parents: Mapping[str, str], name: str) -> str:
    while name in parents:
        name = parents[name]
    return name


def _check(siblings: Siblings, quantized: Mapping[str, Rule]) -> None:
    """InputError for modules with different schemes in one of the groups that the recipe makes."""
    first: dict[str, str] = {}
    for module, name in siblings.names.items():
        if name not in siblings.given:
            continue
        other = first.setdefault(name, module)
        rule, other_rule = quantized[module], quantized[other]
        if _shared(rule.scheme) != _shared(other_rule.scheme):
            raise InputError(
                f"siblings must have one scheme, and `{other}` has another ({other_rule.where})",
                where=f"`{module}` ({rule.where})",
                fix="match them by one rule, or leave one of them out of `siblings`",
            )


def _shared(scheme: Scheme | None) -> tuple[type, Scheme | None]:
    """What siblings must have in common: all of a scheme but how inputs weigh the errors of weights,
    which a module that no token reaches does without."""
    if scheme is not None and scheme.clips_by_inputs:
        scheme = scheme.without_inputs
    return type(scheme), scheme
