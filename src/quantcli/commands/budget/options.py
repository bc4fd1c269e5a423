"""The options of a budget: for each scheme the plan in which all modules of the budget take it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from quantcli.calibration.rotation.basis import in_basis
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.roles import roles_of
from quantcli.core.errors import InputError
from quantcli.core.registry import discover
from quantcli.core.untrusted.yaml_text import write_value
from quantcli.planning.budget.units import Option
from quantcli.planning.plan import Plan, quantized_items
from quantcli.planning.planner import make_plan
from quantcli.recipe.document import Document
from quantcli.recipe.fields import RecipeFile
from quantcli.recipe.recipe import KEEP, KEYWORDS, Recipe, resolve, resolve_scheme
from quantcli.recipe.written import BUDGET, WrittenRecipe
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target

_GROUPS = (128, 64, 32)  # of the schemes that a budget has if the recipe names none


def schemes_of(written: WrittenRecipe) -> list[Scheme]:
    """The schemes that modules may take, in the recipe's order; by default those with float inputs that
    the target stores: with int4 weights in groups, and with int8 weights; or else every other one that
    needs no data.

    Options that the recipe leaves open have the values that it means: all schemes know that there is
    data if one of them needs some. InputError for `bf16`, and for a scheme that is there twice.
    """
    file, document = written.file, written.document
    assert file.budget is not None
    target = resolve(_with_rule(written, KEEP)).target
    if file.budget.schemes is None:
        return _usual(target)
    schemes: list[Scheme] = []
    for number, value in enumerate(file.budget.schemes):
        place = (BUDGET, "schemes", number)
        if value == KEEP:
            continue  # always one
        if value in KEYWORDS:
            what = f"`{value}` is not a scheme that a budget can choose"
            raise InputError(what, where=document.where(place), fix="leave it out: keep is always one")
        scheme = resolve_scheme(value, document, place)
        schemes += scheme.choices or (scheme,)
    if not schemes:
        raise InputError(
            "the budget has no scheme to choose but keep",
            where=document.where((BUDGET, "schemes")),
            fix="name others, such as w4a16 and w8a16",
        )
    if any(scheme.needs_data for scheme in schemes):
        schemes = [scheme.when_calibrating for scheme in schemes]
    for scheme in schemes:
        if schemes.count(scheme) > 1:
            what = f"the scheme `{name_of(scheme)}` is there twice"
            raise InputError(what, where=document.where((BUDGET, "schemes")), fix="leave one out")
        try:
            target.label(scheme.numerics)
        except InputError as error:
            where = document.where((BUDGET, "schemes"))
            raise InputError(f"{name_of(scheme)}: {error.what}", where=where, fix=error.fix) from None
    return schemes


def _usual(target: Target) -> list[Scheme]:
    classes = discover(Scheme)
    first: list[tuple[str, dict[str, Any]]] = [("w4a16", {"group_size": size}) for size in _GROUPS]
    first.append(("w8a16", {}))
    schemes = [classes[name].model_validate(options) for name, options in first]
    stored = [scheme for scheme in schemes if _stores(target, scheme)]
    if stored:
        return stored
    usual = [scheme_class() for scheme_class in classes.values()]
    return [scheme for scheme in usual if not scheme.needs_data and _stores(target, scheme)]


def _stores(target: Target, scheme: Scheme) -> bool:
    try:
        target.label(scheme.numerics)
    except InputError:
        return False
    return True


def name_of(scheme: Scheme | None) -> str:
    """A scheme with the options that it has otherwise than usual, as a table shows it."""
    if scheme is None:
        return KEEP
    usual = type(scheme)().model_dump(by_alias=True)
    changed = scheme.model_dump(by_alias=True).items()
    options = (f"{key}={write_value(v)}" for key, v in changed if v != usual[key])
    return " ".join([scheme.name, *options]).replace('"', "")


def options_of(
    written: WrittenRecipe,
    schemes: Sequence[Scheme],
    checkpoint: Checkpoint,
    *,
    trust_remote_code: bool,
) -> list[Option]:
    """An option for each scheme, and one for floats at last, planned without statistics.

    InputError for a recipe that changes weights by data before it quantizes them: the change would be
    another one for each choice. And if no module takes any of the schemes.
    """
    options: list[Option] = []
    assert written.file.budget is not None
    named = written.file.budget.schemes is not None
    unquantized = resolve(_with_rule(written, KEEP))
    _check_methods(written, unquantized)
    checkpoint = in_basis(unquantized, checkpoint, trust_remote_code=trust_remote_code)
    kept = make_plan(unquantized, checkpoint)
    modules: set[str] = set()
    for scheme in schemes:
        recipe = resolve(_with_rule(written, as_written(scheme)))
        try:
            plan = make_plan(recipe, checkpoint)
        except InputError:
            if named or (scheme is schemes[-1] and not options):
                raise
            continue  # the engine takes no module with it, and nobody has asked for it
        own = frozenset(_selected(written, plan))
        modules |= own
        options.append(Option(name_of(scheme), scheme, plan, own))
    if not modules:
        raise InputError(
            "no module that rules with `scheme: budget` select takes any of its schemes",
            where=written.document.where((BUDGET,)),
            fix="name other schemes in the budget, or other modules in its rules",
        )
    return [*options, Option(KEEP, None, kept, frozenset(modules))]


def _selected(written: WrittenRecipe, plan: Plan) -> list[str]:
    """Modules that a plan quantizes by rules of the budget."""
    numbers = {n for n, rule in enumerate(written.file.rules, 1) if rule.scheme == BUDGET}
    role_of, recipe, found = roles_of(plan.checkpoint), plan.recipe, []
    for item in quantized_items(plan):
        rule = recipe.rule_of(item.module, role_of.get(item.module))
        if rule is not None and rule.number in numbers:
            found.append(item.module)
    return found


def _check_methods(written: WrittenRecipe, recipe: Recipe) -> None:
    """InputError for what changes weights by data."""
    if written.file.learns_rotation:
        raise InputError(
            "a rotation is learned for one choice of schemes, and a budget compares several",
            where=written.document.where(("rotate", "learn")),
            fix="spend the budget without `learn`, and add it to the recipe that is written",
        )
    for named in recipe.named_methods:
        if named.method.edited_as:
            raise InputError(
                f"`{named.method.name}` changes weights, and a budget measures those of the model",
                where=written.document.where(named.place),
                fix="spend the budget without it, and add it to the recipe that is written",
            )


def as_written(scheme: Scheme | None) -> str | dict[str, Any]:
    """A scheme with all its options, as a recipe has it."""
    return KEEP if scheme is None else {"name": scheme.name, **scheme.model_dump(mode="json")}


def _with_rule(written: WrittenRecipe, scheme: str | Mapping[str, Any]) -> WrittenRecipe:
    """The recipe without its budget; its rules of it have a scheme."""
    rules = [
        rule.model_copy(update={"scheme": scheme}) if rule.scheme == BUDGET else rule
        for rule in written.file.rules
    ]
    return ordinary(written, {"rules": rules})


def ordinary(written: WrittenRecipe, changes: Mapping[str, Any]) -> WrittenRecipe:
    """The recipe without its budget, and with other values for some keys."""
    file: RecipeFile = written.file.model_copy(update={BUDGET: None, **changes})
    document = written.document
    data = copy.copy(document.data)
    del data[BUDGET]
    return WrittenRecipe(file, Document(document.path, data, document.places, document.overridden))
