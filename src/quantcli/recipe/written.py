"""A recipe as it is written: its keys, and all that can be checked without schemes and targets.

Those need torch, and whoever misspelt a key need not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from quantcli.core.errors import InputError, one_of
from quantcli.core.untrusted.patterns import Budget, Expression
from quantcli.core.untrusted.yaml_text import Place
from quantcli.recipe.document import MAPPING, Document, document_of, load_document
from quantcli.recipe.fields import REGEX, RecipeFile, expression
from quantcli.recipe.shipped import find_recipe

BUDGET = "budget"  # in place of a scheme: the budget chooses one
SMOOTH, KV_CACHE = ("smooth",), ("kv_cache",)  # methods that have a block of their own


@dataclass(frozen=True)
class WrittenRecipe:
    """The keys of a recipe file, and the places of them."""

    file: RecipeFile
    document: Document


GivenRecipe = str | Path | Mapping[str, Any]  # a name, a file, or its content


def name_of(recipe: GivenRecipe) -> str:
    """The name of a recipe in messages: as it was given."""
    return MAPPING if isinstance(recipe, Mapping) else str(recipe)


def read_recipe(
    recipe: GivenRecipe, overrides: tuple[str, ...] = (), *, command: str = "quantize"
) -> WrittenRecipe:
    """Read a recipe, as `load_recipe` does, and check its keys, values, patterns and siblings.

    Names of schemes, targets and methods, and their options, are not looked up. Raises InputError.
    """
    if isinstance(recipe, Mapping):
        document = document_of(recipe)
    else:
        document = load_document(find_recipe(recipe, command))
    for assignment in overrides:
        document.override(assignment)
    document.check_version("recipe")
    try:
        file = RecipeFile.model_validate(document.data)
    except ValidationError as error:
        raise explain(error, document, RecipeFile, ()) from None
    for number, rule in enumerate(file.rules):
        check_patterns(rule.match or [], ("rules", number), document)
    _check_siblings(file.siblings or (), document)
    _check_budget(file, document)
    return WrittenRecipe(file, document)


def _check_budget(file: RecipeFile, document: Document) -> None:
    """InputError for a budget that no rule takes part in, and for such a rule without a budget."""
    rule = next((n for n, rule in enumerate(file.rules) if rule.scheme == BUDGET), None)
    if file.budget is None and rule is not None:
        raise InputError(
            "the rule leaves its scheme to a budget, and the recipe has none",
            where=document.where(("rules", rule, "scheme")),
            fix="add a block such as `budget: {bits_per_quantizable: 5.0}`, or name a scheme",
        )
    if file.budget is not None and rule is None:
        raise InputError(
            "the recipe has a budget, and no rule takes part in it",
            where=document.where((BUDGET,)),
            fix="add a rule such as {role: [attention, mlp, expert], scheme: budget}",
        )


def _check_siblings(patterns: Sequence[str], document: Document) -> None:
    """InputError for a pattern of siblings that is not a regular expression with groups."""
    budget = Budget()
    for number, text in enumerate(patterns):
        where = document.where(("siblings", number))
        if not Expression(text, where, budget=budget).groups:
            raise InputError(
                f"`{text}` captures nothing, so that all modules that it matches would be siblings",
                where=where,
                fix="put the part of the name that siblings share in parentheses, such as "
                r"(.*\.mlp\.experts)\.\d+\.(?:gate|up)_proj",
            )


def check_patterns(patterns: list[str], place: Place, document: Document) -> None:
    """InputError for a pattern of a rule that is not a glob or a regular expression."""
    budget = Budget()
    for index, pattern in enumerate(patterns):
        where = document.where((*place, "match", index))
        if pattern in {"", REGEX}:
            raise InputError("the pattern is empty", where=where)
        if pattern.startswith(REGEX):
            expression(pattern, where, budget)


def explain(
    error: ValidationError,
    document: Document,
    model: type[BaseModel],
    place: Place,
    page: str = "docs/recipe.md",
) -> InputError:
    """The first error of pydantic as an InputError. Options are named alone, without the place of what
    they are options of; those of a block of the recipe with the block's name.

    page: the one that describes the keys.
    """
    errors = error.errors(include_url=False, include_input=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    loc, kind = first["loc"], first["type"]
    if loc and kind not in {"extra_forbidden", "missing"} and loc[-1] in {"str", "dict[str,any]"}:
        loc = loc[:-1]  # pydantic's name for one branch of a union
    loc = tuple(step for step in loc if step not in _TAGS)
    where = document.where((*place, *loc))
    key = ".".join(map(str, (*place, *loc) if place in {SMOOTH, KV_CACHE} else loc))
    if kind == "extra_forbidden":
        keys = _fields(model, loc[:-1])
        fix = one_of(str(loc[-1]), keys) if keys else "it takes no options"
        return InputError(f"unknown key `{key}`", where=where, fix=fix)
    if kind == "missing":
        return InputError(f"key `{key}` is missing", where=where, fix=f"write `{loc[-1]}: ...`")
    message = _MESSAGES.get(kind) or first["msg"].removeprefix("Value error, ")
    what = f"`{key}`: {message[:1].lower()}{message[1:]}"
    return InputError(what, where=where, fix=f"{page} describes each key")


# pydantic's names for branches that a discriminator chooses from
_TAGS = {"word", "options", "options of learned"}
_MESSAGES = {  # pydantic's error types -> messages in terms of YAML
    "model_type": "expected a mapping", "dict_type": "expected a mapping",
    "list_type": "expected a list", "too_short": "must not be empty",
    "string_type": "expected text", "bool_type": "expected true or false",
    "int_type": "expected a whole number", "float_type": "expected a number",
    "finite_number": "expected a finite number",
}  # fmt: skip


def _fields(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The keys of the block at `loc` below `model`."""
    for step in loc:
        if isinstance(step, int):
            continue
        model = next(_blocks(model.model_fields[step].annotation))
    return [field.alias or name for name, field in model.model_fields.items()]


def _blocks(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type such as list[RuleFile] or Verify | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _blocks(inner)
