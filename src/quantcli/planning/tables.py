"""The tables of a plan: the effect of each rule, and what stays float."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.inspection import fold
from quantcli.checkpoint.roles import BODY, LINEAR
from quantcli.planning.matching import Matched, family_of
from quantcli.planning.plan import Copy, Coverage, Item, Kept, Quantize, RuleLine
from quantcli.recipe.methods import methods_for
from quantcli.recipe.recipe import Recipe, Rule
from quantcli.sources.expert_stack import ExpertMatrix


def tables(
    recipe: Recipe, checkpoint: Checkpoint, items: list[Item], matched: Matched
) -> tuple[tuple[RuleLine, ...], tuple[Kept, ...], Coverage]:
    """Both tables of a plan, and how much of the model is quantized."""
    lines = _rule_lines(recipe, items, matched.rules)
    kept = tuple(_kept(recipe, checkpoint, items, matched))
    body = linears = 0
    for item in items:
        if isinstance(item, Quantize):
            role = matched.roles.get(item.module)
            body += item.source.spec.numel if role in BODY else 0
            linears += item.source.spec.numel if role in LINEAR else 0
    coverage = Coverage(
        quantized=body,
        quantizable=body + sum(group.quantizable for group in kept),
        quantized_linears=linears,
        linears=linears + sum(group.linears for group in kept),
    )
    return tuple(lines), kept, coverage


def _rule_lines(
    recipe: Recipe, items: list[Item], assigned: Mapping[str, Rule | None]
) -> Iterator[RuleLine]:
    by_rule: dict[tuple[int, str, int], list[Quantize]] = defaultdict(list)
    for item in items:
        if isinstance(item, Quantize) and (rule := assigned[item.module]):
            by_rule[rule.key].append(item)
    used = {id(rule): rule for rule in assigned.values() if rule}
    instead = {rule.key: rule for rule in used.values() if rule not in recipe.rules}
    chosen = {number for number, _, choice in instead if choice}
    rules = [rule for rule in recipe.rules if rule.number not in chosen]
    for rule in sorted([*rules, *instead.values()], key=lambda rule: (rule.number, rule.choice)):
        if rule.scheme is not None:
            rule_items = by_rule[rule.key]
            label = recipe.target.label(rule.scheme.numerics)
            yield RuleLine(
                number=rule.number,
                scheme=rule.scheme.name,
                label=label,
                modules=len(rule_items),
                nbytes_before=sum(item.source.nbytes for item in rule_items),
                nbytes_after=sum(out.spec.nbytes for item in rule_items for out in item.outputs),
                loads_on=recipe.target.loads_on(label),
            )


def _refuses_experts(recipe: Recipe, checkpoint: Checkpoint, matched: Matched) -> bool:
    """Whether the engine takes no quantized experts of the family, with any scheme of the recipe."""
    experts = [module for module in matched.modules if matched.roles.get(module.name) == "expert"]
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme]
    if not experts or not schemes:
        return False
    first = replace(experts[0], numerics=schemes[0].numerics)
    return any(recipe.target.check_family([first], family_of(checkpoint)))


def _kept(
    recipe: Recipe, checkpoint: Checkpoint, items: list[Item], matched: Matched
) -> Iterator[Kept]:
    assigned, roles, names = matched.rules, matched.roles, matched.rules.keys()
    schemes = {item.scheme: None for item in items if isinstance(item, Quantize)}
    edited = dict.fromkeys(method.edited_as for method in methods_for(recipe.methods, schemes))
    matrices = {  # in each stack of experts
        stored.stack.spec.name: name
        for name, stored in checkpoint.tensors.items()
        if isinstance(stored, ExpertMatrix)
    }
    experts_refused = _refuses_experts(recipe, checkpoint, matched)
    groups: dict[str, list[Copy]] = defaultdict(list)
    linears: Counter[str] = Counter()  # weights by reason
    quantizable: Counter[str] = Counter()
    for item in items:
        if isinstance(item, Copy):
            spec = item.outputs[0].spec
            module, _, suffix = matrices.get(spec.name, spec.name).rpartition(".")
            rule = assigned.get(module) if suffix == "weight" else None
            role = roles.get(module) if suffix == "weight" else roles.get(spec.name)
            refusal = matched.refused.get(module) if suffix == "weight" else None
            if rule is not None and rule.scheme is None:
                reason = f"rules.{rule.number - 1}: {rule.keyword}"
            elif refusal is not None:
                reason = refusal.what
            elif role is None:
                reason = "not a matrix"
            else:
                reason = f"no rule matches: {role}"
            if item.edit is not None:
                reason = f"{' or '.join(filter(None, edited))}; else as it is"
            if item.source.kind:
                reason += ", decoded" if checkpoint.rotation is None else ", rotated or folded"
            if role in LINEAR:
                linears[reason] += spec.numel
                never = refusal or recipe.target.built_float(module, names)
                if role in BODY and not never and not (role == "expert" and experts_refused):
                    quantizable[reason] += spec.numel
            groups[reason].append(item)
    for reason, copies in sorted(groups.items()):
        specs = [out.spec for copy in copies for out in copy.outputs]
        folded = tuple(group.name for group in fold(specs))
        before = sum(copy.source.nbytes for copy in copies)
        nbytes = sum(spec.nbytes for spec in specs)
        yield Kept(reason, len(specs), before, nbytes, folded, linears[reason], quantizable[reason])
