"""The scheme of a module, if its rule leaves a choice to shapes, such as `group_size: auto`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.inspection import fold
from quantcli.core.errors import InputError
from quantcli.core.numerics import Module, Numerics
from quantcli.core.text import count
from quantcli.planning.siblings import siblings_of
from quantcli.recipe.recipe import Recipe, Rule
from quantcli.targets.base import Target
from quantcli.targets.vllm_family import expert_set


def choose(
    recipe: Recipe, checkpoint: Checkpoint, assigned: dict[str, Rule | None]
) -> tuple[dict[str, Rule | None], list[str]]:
    """`assigned` with the first of a scheme's `choices` that the engine takes, and notes on others.

    What the engine merges has one: siblings, and all experts of a layer. If it takes none of them, the
    last one stays, and the target's check says why.
    """
    groups: dict[tuple[str, tuple[int, str, int]], list[str]] = defaultdict(list)
    options: dict[tuple[int, str, int], list[Rule]] = {}
    group_of = group_names(recipe, assigned)
    for name, rule in assigned.items():
        if rule is None or rule.scheme is None:
            continue
        if rule.key not in options:
            options[rule.key] = list(_options(rule, recipe.target))
        if options[rule.key]:
            groups[group_of(name), rule.key].append(name)
    chosen: dict[str, Rule | None] = {}
    smaller: dict[tuple[int, str], list[str]] = defaultdict(list)
    for (_, key), names in groups.items():
        modules = [module_of(checkpoint, name) for name in names]
        rule, reason = _first(options[key], modules, recipe.target, assigned.keys())
        chosen |= dict.fromkeys(names, rule)
        if reason:
            smaller[rule.choice, f"{_changes(options[key][0], rule)}, as {reason}"] += names
    notes = []
    for (_, what), names in sorted(smaller.items()):
        folded = fold([checkpoint.tensors[f"{name}.weight"].spec for name in names])
        listing = ", ".join(group.name for group in folded)
        notes.append(f"{listing} ({count(names, 'module')}): {what}")
    return assigned | chosen, notes


def module_of(
    checkpoint: Checkpoint, name: str, numerics: Numerics | None = None, measured: str = ""
) -> Module:
    """A module of a checkpoint with a weight, as a target sees it."""
    shape = checkpoint.tensors[f"{name}.weight"].spec.shape
    return Module(name, shape, numerics, measured, f"{name}.bias" in checkpoint.tensors)


def group_names(recipe: Recipe, assigned: Mapping[str, Rule | None]) -> Callable[[str], str]:
    """What gives, for a module, the name of all that must have one scheme with it: siblings, and the
    experts of a layer."""
    siblings = siblings_of(recipe, assigned) if recipe.siblings else None

    def name_of(module: str) -> str:
        if siblings is not None and siblings.given_to(module):
            return siblings.group(module) or module
        return expert_set(recipe.target.fused_name(module) or module)

    return name_of


def _options(rule: Rule, target: Target) -> Iterator[Rule]:
    """A rule for each choice that the target can store."""
    assert rule.scheme is not None
    for number, scheme in enumerate(rule.scheme.choices, start=1):
        with suppress(InputError):
            target.label(scheme.numerics)
            yield replace(rule, scheme=scheme, choice=number)


def _first(
    options: Sequence[Rule],
    modules: Sequence[Module],
    target: Target,
    names: Collection[str],
) -> tuple[Rule, str]:
    """The first choice that the engine takes for all of some modules, and why not one before it.

    names: of all modules. What the engine builds as float by its name is so with every choice.
    """
    reason = ""
    for rule in options:
        assert rule.scheme is not None
        numerics = rule.scheme.numerics
        refusals = (
            refusal
            for module in modules
            for refusal in target.refusals(replace(module, numerics=numerics), names)
            if refusal.by != "name"
        )
        refusal = next(refusals, None)
        if refusal is None:
            return rule, reason
        reason = refusal.what
    return options[-1], ""


def _changes(first: Rule, rule: Rule) -> str:
    """The options that a choice has otherwise than the first one, as text."""
    assert first.scheme is not None
    assert rule.scheme is not None
    usual, options = first.scheme.model_dump(), rule.scheme.model_dump()
    return ", ".join(f"{key} {value}" for key, value in options.items() if value != usual[key])
