"""Which rule each module gets: the first that matches, and no rule for nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.detect import draft_of
from quantcli.checkpoint.inspection import fold
from quantcli.checkpoint.roles import ROLES, Role, roles_of
from quantcli.checkpoint.spec import FLOATS, TensorSpec
from quantcli.core.errors import InputError, closest
from quantcli.core.numerics import Module, Numerics
from quantcli.core.registry import discover
from quantcli.planning.choices import choose, module_of
from quantcli.planning.measured import Measured
from quantcli.planning.reach import beyond_text
from quantcli.planning.siblings import Siblings, siblings_of
from quantcli.recipe.fields import matches
from quantcli.recipe.recipe import NamedMethod, Recipe, Rule
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Refusal, Target, others_that_store
from quantcli.targets.vllm_family import EXPERT


@dataclass(frozen=True)
class Matched:
    """The rule of every module with a weight, or None.

    modules:  all of these, as the target sees them.
    siblings: of quantized modules.
    notes:    on modules that take another scheme than their rule has, and on siblings.
    roles:    of matrices, by module.
    refused:  modules that a rule by role leaves float -> what the engine has against them.
    """

    rules: dict[str, Rule | None]
    modules: list[Module]
    siblings: Siblings
    notes: list[str]
    roles: Mapping[str, Role]
    refused: Mapping[str, Refusal]


def match(recipe: Recipe, checkpoint: Checkpoint, measured: Measured | None) -> Matched:
    """Match the rules of a recipe with the modules of a model, each module once with each rule.

    InputError for what the target cannot store or its engine does not load, for a rule without effect,
    and for siblings that do not fit together.
    """
    must_be_taken(checkpoint, recipe.target)  # before rules that would miss these tensors
    roles = roles_of(checkpoint)
    assigned, beyond = _within_reach(checkpoint, _assign(recipe, checkpoint, roles), roles)
    assigned, chosen = choose(recipe, checkpoint, assigned)
    _must_be_stored(assigned, recipe.target)
    assigned, notes = _served(checkpoint, assigned, recipe.target)
    notes += [*beyond, *chosen]
    assigned, refused = _taken(recipe, checkpoint, assigned, roles)
    if measured is not None:
        served = assigned
        assigned, more = _without_data(recipe, assigned, measured)
        notes += [*more, *_unseen(served, assigned, measured)]
    siblings = siblings_of(recipe, assigned)
    if recipe.siblings and not siblings.have_effect(assigned):
        notes.append("`siblings` has no effect: the schemes of these modules share nothing")
    modules = list(_modules(checkpoint, assigned))
    raise_first(recipe.target.check_family(modules, family_of(checkpoint)), assigned)
    raise_first(recipe.target.check(modules), assigned)
    return Matched(assigned, modules, siblings, notes, roles, refused)


def _modules(checkpoint: Checkpoint, assigned: dict[str, Rule | None]) -> Iterator[Module]:
    """Every module with a weight, as the target sees it."""
    cache: dict[tuple[int, str, int], tuple[Numerics, str]] = {}  # few are different, and slow to make
    for name, rule in assigned.items():
        if rule is None or rule.scheme is None:
            yield module_of(checkpoint, name)
            continue
        scheme = rule.scheme
        if rule.key not in cache:
            options = ", ".join(f"{key}: {value}" for key, value in scheme.model_dump().items())
            cache[rule.key] = scheme.numerics, options if scheme.shares_data else ""
        yield module_of(checkpoint, name, *cache[rule.key])


def must_be_taken(checkpoint: Checkpoint, target: Target) -> None:
    """InputError for tensors that the engine of a target does not take, whatever their numbers.

    checkpoint: with experts one by one, whoever has split them.
    """
    if draft := draft_of(checkpoint):
        raise_first(target.check_draft(draft), {})
    specs = {stored.spec.name: stored.spec for stored in checkpoint.tensors.values()}
    config = checkpoint.text_config.with_values(model_type=family_of(checkpoint))
    raise_first(target.check_tensors(specs, config), {})


def family_of(checkpoint: Checkpoint) -> str:
    """The model type of the language model, as config.json has it; else that of the whole model."""
    return checkpoint.text_config.text("model_type") or checkpoint.config.text("model_type") or ""


def raise_first(found: Iterable[Refusal], assigned: Mapping[str, Rule | None]) -> None:
    """InputError for the first refusal of a target, if there is one."""
    refusals = list(found)
    if refusals:
        first = refusals[0]
        rule = assigned.get(first.module)
        others = len({refusal.module for refusal in refusals}) - 1
        more = f" ({others} more like it)" if others else ""
        raise InputError(
            first.what + more,
            where=f"`{first.module}`" + (f" ({rule.where})" if rule else ""),
            fix=first.fix,
        )


def _assign(
    recipe: Recipe, checkpoint: Checkpoint, roles: Mapping[str, Role]
) -> dict[str, Rule | None]:
    """First matching rule of every module that has a `.weight`; only matrices are quantized.

    Raises InputError for a rule that takes nothing, and for a matrix that is not float.
    """
    if any(rule.scheme for rule in recipe.rules):
        refuse_transposed(checkpoint)
    names = [n.removesuffix(".weight") for n in checkpoint.tensors if n.endswith(".weight")]
    assigned: dict[str, Rule | None] = {}
    used: set[int] = set()  # rule numbers
    for name in names:
        spec = checkpoint.tensors[f"{name}.weight"].spec
        rule = recipe.rule_of(name, roles.get(name))
        if rule is not None and rule.scheme is not None:
            if len(spec.shape) == 2:
                _must_be_float(spec, rule)
            else:
                rule = None
        assigned[name] = rule
        if rule is not None:
            used.add(rule.number)
    for rule in recipe.rules:
        if rule.number not in used and not rule.optional:
            raise _dead_rule(rule, recipe, names, checkpoint, roles)
    quantized = [name for name, rule in assigned.items() if rule and rule.scheme]
    for named in recipe.named_methods:
        _check_method(recipe, named, quantized)
    return assigned


def _check_method(recipe: Recipe, named: NamedMethod, quantized: list[str]) -> None:
    """InputError for a rule of a calibration method that matches no quantized module, or only what
    earlier ones take."""
    left = quantized
    for number, rule in enumerate(named.method.module_rules):
        place = (*named.place, "rules", number)
        matched = {name for name in quantized if matches(rule.match, name, recipe.where(*place))}
        if not rule.optional and matched.isdisjoint(left):
            what = f"`{'.'.join(map(str, place))}` matches no quantized module"
            fix = (
                f"patterns match whole names of modules that read what is {named.method.edited_as}, "
                "such as *.down_proj; `optional: true` allows a rule that matches nothing"
            )
            if matched:
                what = f"`{'.'.join(map(str, place))}` matches only modules that earlier ones take"
                fix = "move it before them, or remove it"
            where = f"{recipe.where(*place)}   match: {', '.join(rule.match)}"
            raise InputError(what, where=where, fix=fix)
        left = [name for name in left if name not in matched]


def _must_be_stored(assigned: Mapping[str, Rule | None], target: Target) -> None:
    """InputError for a rule whose numerics `target` has no label for."""
    for rule in {rule.key: rule for rule in assigned.values() if rule}.values():
        if rule.scheme is not None:
            numerics = rule.scheme.numerics
            try:
                target.label(numerics)
            except InputError as error:
                raise InputError(
                    error.what,
                    where=f"{rule.where}, scheme `{rule.scheme.name}`",
                    fix=others_that_store(numerics),
                ) from None


def _without_data(
    recipe: Recipe, assigned: dict[str, Rule | None], measured: Measured
) -> tuple[dict[str, Rule | None], list[str]]:
    """`assigned` with another scheme for modules that no token reached: if the recipe wants that, or if
    their inputs would only weigh errors. And what there is to say about it."""
    assigned, notes = _without_inputs(assigned, measured)
    block = recipe.file.calibration
    if block is None or block.uncalibrated != "dynamic":
        return assigned, notes
    instead = _data_free(assigned, [name for name in assigned if name not in measured.stats])
    if instead:
        notes.append(f"no token reached {_few(instead)}: they take a scheme that needs no data")
    return assigned | instead, notes


def _within_reach(
    checkpoint: Checkpoint, assigned: dict[str, Rule | None], roles: Mapping[str, Role]
) -> tuple[dict[str, Rule | None], list[str]]:
    """`assigned` with another scheme for modules of next-token layers that no token can reach, and what
    there is to say about it. It is known before a calibration begins."""
    instead = _data_free(assigned, beyond_text(checkpoint, roles))
    if not instead:
        return assigned, []
    note = f"calibration cannot follow next-token layers here: {_few(instead)} take a scheme that needs"
    return assigned | instead, [f"{note} no data"]


def _data_free(assigned: Mapping[str, Rule | None], modules: Iterable[str]) -> dict[str, Rule | None]:
    """Some modules with the data-free scheme that theirs names, if it names one."""
    instead: dict[str, Rule | None] = {}
    for name in modules:
        rule = assigned.get(name)
        if rule and rule.scheme and rule.scheme.without_data:
            scheme = rule.scheme.without_data
            if isinstance(scheme, str):
                scheme = discover(Scheme)[scheme]()
            instead[name] = replace(rule, scheme=scheme)
    return instead


def _without_inputs(
    assigned: dict[str, Rule | None], measured: Measured
) -> tuple[dict[str, Rule | None], list[str]]:
    """The same for modules whose inputs would only weigh errors."""
    instead: dict[str, Rule | None] = {}
    for name, rule in assigned.items():
        if rule is None or rule.scheme is None or not rule.scheme.clips_by_inputs:
            continue
        stats = measured.stats.get(name)  # empty: it was measured, and the numbers are not known
        if stats is None and rule.scheme.shares_data:
            continue
        if stats is None or (stats and "input_square" not in stats):
            instead[name] = replace(rule, scheme=rule.scheme.without_inputs)
    if not instead:
        return assigned, []
    schemes = (rule.scheme for name in instead if (rule := assigned[name]))
    how = "clipped and rounded" if any(s and s.rounded_by_data for s in schemes) else "clipped"
    note = f"no token reached {_few(instead)}: their weights are {how} as without calibration"
    return assigned | instead, [note]


def _unseen(
    before: Mapping[str, Rule | None], assigned: Mapping[str, Rule | None], measured: Measured
) -> Iterator[str]:
    """A note on quantized modules that no token reached, and that keep the scheme that they had
    before: it shows whether the samples are any good."""
    names = [
        name
        for name in measured.no_tokens
        if (rule := assigned.get(name)) and rule.scheme and rule is before[name]
    ]
    if alone := [name for name in names if name not in measured.taken_from]:
        yield f"no token of the calibration text reached {_few(alone)}"
    if taken := [name for name in measured.taken_from if assigned.get(name)]:
        donor = f"`{taken[0]}` those of `{measured.taken_from[taken[0]]}`"
        yield (
            f"no token of the calibration text reached {_few(taken)}: they take the statistics of "
            f"experts that it reached, such as {donor}"
        )
    yield from measured.starved_experts()


def _few(names: Collection[str]) -> str:
    some = ", ".join(f"`{name}`" for name in list(names)[:5])
    return some + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _served(
    checkpoint: Checkpoint, assigned: dict[str, Rule | None], target: Target
) -> tuple[dict[str, Rule | None], list[str]]:
    """`assigned` with another scheme for modules that the engine does not take with theirs, where the
    scheme names one; what is merged stays together. And what there is to say about it."""
    instead: dict[str, Rule | None] = {}
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    merged: dict[tuple[str, tuple[int, str, int]], list[str]] = defaultdict(list)
    for name, rule in assigned.items():
        if rule and rule.scheme and rule.scheme.unserved:
            merged[target.fused_name(name) or name, rule.key].append(name)
    for names in merged.values():
        rule = assigned[names[0]]
        assert rule is not None
        assert rule.scheme is not None
        assert rule.scheme.unserved is not None
        for name in names:
            module = module_of(checkpoint, name, rule.scheme.numerics)
            refusal = next(target.refusals(module, assigned.keys()), None)
            if refusal is not None:
                scheme = discover(Scheme)[rule.scheme.unserved]()
                instead |= dict.fromkeys(names, replace(rule, scheme=scheme))
                reasons[scheme.name, refusal.what] += names
                break
    notes = [
        f"{', '.join(group.name for group in fold([_spec(checkpoint, name) for name in names]))} "
        f"({len(names)} modules) take {scheme}: {reason}"
        for (scheme, reason), names in reasons.items()
    ]
    return assigned | instead, notes


def _taken(
    recipe: Recipe,
    checkpoint: Checkpoint,
    assigned: dict[str, Rule | None],
    roles: Mapping[str, Role],
) -> tuple[dict[str, Rule | None], dict[str, Refusal]]:
    """`assigned` without modules that a rule by role selects and that the engine does not take by their
    name or width, with all that is merged with them; and the reasons.

    InputError if a rule that is not optional takes nothing then.
    """
    target, names = recipe.target, assigned.keys()
    refused: dict[str, Refusal] = {}
    sets: dict[tuple[int, str], list[str]] = defaultdict(list)  # what must have one scheme
    numerics = {}  # of rules: slow to make
    # experts of a layer come in hundreds, which differ in their number alone
    alike: dict[tuple[str, str, tuple[int, ...], tuple[int, str, int]], Refusal | None] = {}
    refusal: Refusal | None
    for name, rule in assigned.items():
        if rule and rule.scheme and rule.roles and not rule.patterns:
            expert = EXPERT.fullmatch(name)
            together = expert["experts"] if expert else target.fused_name(name) or name
            sets[rule.number, together].append(name)
            spec = _spec(checkpoint, name)
            key = None
            if expert is not None:
                key = expert["experts"], expert["rest"], spec.shape, rule.key
            if roles.get(name) == "embedding":
                refusal = Refusal(name, "the engine has no quantized embedding of this kind")
            elif key in alike:
                refusal = alike[key]
            else:
                if rule.key not in numerics:
                    numerics[rule.key] = rule.scheme.numerics
                module = module_of(checkpoint, name, numerics[rule.key])
                found = (r for r in target.refusals(module, names) if r.by != "numbers")
                refusal = next(found, None)
                if key is not None:
                    alike[key] = refusal
            if refusal is not None:
                refused[name] = replace(refusal, module=name)
    for members in sets.values() if refused else ():
        if (first := next((refused[name] for name in members if name in refused), None)) is not None:
            for name in members:
                refused.setdefault(name, first)
    for rule in recipe.rules:
        taken = [name for name, other in assigned.items() if other and other.number == rule.number]
        if taken and not rule.optional and all(name in refused for name in taken):
            raise InputError(
                f"the engine takes none of the {len(taken)} modules that `rules.{rule.number - 1}` "
                f"selects: {refused[taken[0]].what}",
                where=f"{rule.where}   {rule.selector}",
                fix=refused[taken[0]].fix,
            )
    return {name: None if name in refused else rule for name, rule in assigned.items()}, refused


def _spec(checkpoint: Checkpoint, module: str) -> TensorSpec:
    return checkpoint.tensors[f"{module}.weight"].spec


# Families of transformers' Conv1D, which stores its weights [in, out]: a scale per row would be one
# per input, and for a square matrix only the family tells. Source: transformers 5.23.0,
# pytorch_utils.py:95 and models/*/modeling_*.py.
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


def refuse_transposed(checkpoint: Checkpoint) -> None:
    """InputError for a family whose weights are [in, out]."""
    kind = checkpoint.config.text("model_type")
    if kind in _TRANSPOSED:
        raise InputError(
            f"weights of `{kind}` are stored transposed, which this version does not quantize",
            where=str(checkpoint.path / "config.json"),
            fix="no engine that this tool writes for serves this family quantized",
        )


def _dead_rule(
    rule: Rule,
    recipe: Recipe,
    names: list[str],
    checkpoint: Checkpoint,
    roles: Mapping[str, Role],
) -> InputError:
    matching = [name for name in names if rule.matches(name, roles.get(name))]
    earlier = recipe.rules[: rule.number - 1]
    shadow = next((r for name in matching for r in earlier if r.matches(name, roles.get(name))), None)
    what = f"`rules.{rule.number - 1}` matches no module"
    if shadow is not None:
        what = f"`rules.{rule.number - 1}` matches only modules that earlier rules take"
        fix = f"move it before the rule at {shadow.where}, or remove it"
    elif matching:
        spec = checkpoint.tensors[f"{matching[0]}.weight"].spec
        what = f"`rules.{rule.number - 1}` matches no matrix; only matrices can be quantized"
        fix = f"`{matching[0]}` is {spec}; use `scheme: keep` or another pattern"
    elif not rule.patterns:
        there = ", ".join(role for role in ROLES if role in roles.values())
        fix = f"this model has {there}; `optional: true` allows a rule that matches nothing"
    elif rule.patterns[0].endswith(".weight"):
        fix = "leave out `.weight`: patterns match module names"
    else:
        # comparing with each of 50,000 names would take minutes
        core = rule.patterns[0].removeprefix("re:").strip("*.")
        near = closest(core, {".".join(n.split(".")[-1 - core.count(".") :]): 0 for n in names[:2000]})
        hint = f"closest names: {near}; " if near else ""
        fix = f"{hint}patterns match whole names; `optional: true` allows a rule that matches nothing"
    return InputError(what, where=f"{rule.where}   {rule.selector}", fix=fix)


def _must_be_float(spec: TensorSpec, rule: Rule) -> None:
    if spec.name == ".weight":
        raise InputError(
            "the weight of a module without a name cannot be quantized",
            where=f"`{spec.name}` ({rule.where})",
            fix="rename the tensor; no engine looks for such a name",
        )
    if spec.dtype not in FLOATS or spec.numel == 0:
        raise InputError(
            f"cannot quantize {spec}; it must be bfloat16, float16 or float32, and not empty",
            where=f"`{spec.name}` ({rule.where})",
            fix="put a rule with `scheme: keep` for it before the others",
        )
