"""A recipe, checked as far as possible without the model."""

from __future__ import annotations

import operator
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from quantcli.checkpoint.roles import Role
from quantcli.core.errors import InputError, one_of
from quantcli.core.numerics import Cache
from quantcli.core.place import expanded
from quantcli.core.registry import discover
from quantcli.core.untrusted.patterns import Expression
from quantcli.core.untrusted.yaml_text import Place, write_yaml
from quantcli.recipe.document import Document
from quantcli.recipe.fields import RecipeFile, matches
from quantcli.recipe.methods import MethodOptions, recipe_methods
from quantcli.recipe.shipped import is_sample_digest, is_sample_text, sample_text
from quantcli.recipe.written import (
    BUDGET,
    KV_CACHE,
    SMOOTH,
    GivenRecipe,
    WrittenRecipe,
    check_patterns,
    explain,
    read_recipe,
)
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target

# Keywords in place of a scheme.
KEEP = "keep"  # the weights stay as they are
PLAIN = "bf16"  # the weights become floats of the serving dtype
KEYWORDS = (KEEP, PLAIN)
_COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}


T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Rule:
    """One rule: patterns or roles of modules, and their scheme, or None if they stay float.

    keyword: in place of a scheme that is None: `keep`, or `bf16` for the serving dtype.
    choice:  the number of the scheme among the `choices` of the recipe's, from 1; 0 if it has none.
    roles: those that it takes; empty for a rule that selects by patterns alone.
    """

    patterns: tuple[str, ...]
    optional: bool
    where: str  # file:line
    number: int  # from 1
    scheme: Scheme | None
    keyword: str = KEEP
    roles: frozenset[Role] = frozenset()
    choice: int = 0

    def matches(self, module: str, role: Role | None = None) -> bool:
        """Whether the rule selects a module: by its role, by its whole name, or by both.

        role: None for a module that has none, such as a norm. InputError for a pattern that takes too
        long to match.
        """
        if self.roles and not self._has(role):
            return False
        return not self.patterns or matches(self.patterns, module, self.where)

    def _has(self, role: Role | None) -> bool:
        """Whether a role is among those of the rule, or a part of one: `mlp.out` of `mlp`."""
        return role is not None and (role in self.roles or role.partition(".")[0] in self.roles)

    @property
    def selector(self) -> str:
        """What it selects by, as in the recipe."""
        roles = f"role: {', '.join(sorted(self.roles))}" if self.roles else ""
        patterns = f"match: {', '.join(self.patterns)}" if self.patterns else ""
        return "   ".join(filter(None, (patterns, roles)))

    @cached_property  # experts come in tens of thousands
    def key(self) -> tuple[int, str, int]:
        """The identity of a rule; another one if its scheme was replaced because data was missing, and
        for each choice."""
        return self.number, self.scheme.name if self.scheme else self.keyword, self.choice


@dataclass(frozen=True)
class NamedMethod:
    """A calibration method that the recipe names, and where: `smooth`, or an entry of `methods`."""

    method: MethodOptions
    place: Place


@dataclass(frozen=True)
class SiblingPattern:
    """A regular expression whose capture groups say which modules are siblings."""

    text: str
    where: str  # file:line

    @cached_property
    def _compiled(self) -> Expression:
        return Expression(self.text, self.where)

    def key(self, module: str) -> tuple[str | None, ...] | None:
        """The captured parts of a module's name, the same for siblings; None if it does not match.

        InputError if no capture group takes part in the match.
        """
        match = self._compiled.fullmatch(module)
        if match is None:
            return None
        captured: tuple[str | None, ...] = match.groups()
        if captured.count(None) == len(captured):
            raise InputError(
                f"`{self.text}` matches `{module}` and captures nothing of it",
                where=self.where,
                fix="put what siblings have in common in parentheses, in each alternative",
            )
        return captured


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: names are resolved, options parsed, places kept for later messages."""

    file: RecipeFile
    target: Target
    rules: tuple[Rule, ...]
    named_methods: tuple[NamedMethod, ...]
    siblings: tuple[SiblingPattern, ...]
    document: Document

    @property
    def methods(self) -> tuple[MethodOptions, ...]:
        """The calibration methods that the recipe names, in their order."""
        return tuple(named.method for named in self.named_methods)

    @property
    def cache(self) -> Cache | None:
        """How the cache of keys and values is to be quantized; None: it is not."""
        return next(filter(None, (method.cache for method in self.methods)), None)

    def where(self, *place: str | int) -> str:
        """file:line of a key, for messages."""
        return self.document.where(place)

    def rule_of(self, module: str, role: Role | None = None) -> Rule | None:
        """The first rule that matches a module with this role."""
        key = module, role
        if key not in self._rules_of:  # asked again by the plan after a calibration
            first = next((rule for rule in self.rules if rule.matches(module, role)), None)
            self._rules_of[key] = first
        return self._rules_of[key]

    @cached_property
    def _rules_of(self) -> dict[tuple[str, Role | None], Rule | None]:
        return {}

    def data_path(self) -> str:
        """`calibration.data`, relative to the recipe if the file names it, to here if --set does."""
        block = self.file.calibration
        assert block is not None
        assert block.data is not None
        given = self.document.is_overridden("calibration", "data")
        if block.data.startswith("datasets:") or given:
            return block.data
        path = os.path.normpath(self.document.path.parent / expanded(block.data))
        there = os.path.isfile(path)  # noqa: PTH113 - false for a name that is too long
        if block.sha256 is not None and not there and is_sample_digest(block.sha256):
            return str(sample_text())
        return path

    def calibrates_on_sample(self) -> bool:
        """Whether the recipe itself, and not --set, names the text that comes with quantcli."""
        block = self.file.calibration
        if block is None or block.data is None:
            return False
        given = self.document.is_overridden("calibration", "data")
        return not given and is_sample_text(self.data_path())

    def effective(self, text: str | None = None) -> str:
        """The applied recipe as YAML, without paths of this machine.

        text: sha256 of the text that it was calibrated on, if that is known.
        """
        file, block = self.file, self.file.calibration
        if block is not None and text is not None:
            pinned = block.model_copy(update={"sha256": text})
            file = file.model_copy(update={"calibration": pinned})
        table = file.model_dump(mode="json", exclude_none=True, exclude={"model", "output"})
        table["expect"] = {k: v for k, v in table["expect"].items() if v is not None}
        if data := table.get("calibration", {}).get("data"):
            table["calibration"]["data"] = name_of_data(data)
        if not table["expect"]:
            del table["expect"]
        for rule, entry in zip(self.rules, table["rules"], strict=True):
            if rule.scheme is not None:
                entry["scheme"] = {"name": rule.scheme.name, **rule.scheme.model_dump(mode="json")}
        table["target"] = {"name": self.target.name, **self.target.model_dump(mode="json")}
        for named in self.named_methods:
            method = named.method.model_dump(mode="json", exclude_none=True)
            if named.place in {SMOOTH, KV_CACHE}:
                table[str(named.place[0])] = method
            else:
                table["methods"][named.place[1]] = {"name": named.method.name, **method}
        return write_yaml(table)


def name_of_data(data: str) -> str:
    """The name of a text, without its folder: that of a file, or datasets:ID."""
    return data if data.startswith("datasets:") else Path(data).name


def compare(limit: str, value: float) -> bool:
    """Whether `value` satisfies a limit such as ">= 90"."""
    match = re.fullmatch(r"(>=|<=|==|>|<)\s*(.+)", limit)
    assert match is not None
    return bool(_COMPARISONS[match[1]](value, float(match[2])))


def load_recipe(
    recipe: GivenRecipe, overrides: tuple[str, ...] = (), *, command: str = "quantize"
) -> Recipe:
    """Read and check a recipe: a file, a shipped recipe by name, or a mapping with a file's content.

    overrides: `KEY=VALUE` strings that win over the file. command: for the message if `recipe` is a
    model. Raises InputError with file:line; for a misspelt name its fix has the closest names.
    """
    return resolve(read_recipe(recipe, overrides, command=command))


def resolve(written: WrittenRecipe) -> Recipe:
    """A recipe with its schemes, its target and its methods. InputError as `load_recipe` raises it."""
    file, document = written.file, written.document
    if file.budget is not None:
        raise InputError(
            "this recipe has a budget, which only `quantcli quantize` spends",
            where=document.where((BUDGET,)),
            fix="run `quantcli quantize` with it; the recipe that it writes works here, too",
        )
    target = _resolve(file.target, discover(Target), "target", document, ("target",))
    rules = []
    for number, rule in enumerate(file.rules):
        place: Place = ("rules", number)
        scheme = None
        keyword = rule.scheme if rule.scheme in KEYWORDS else KEEP
        if rule.scheme not in KEYWORDS:
            scheme = resolve_scheme(rule.scheme, document, (*place, "scheme"))
        where = document.where(place)
        changed = (at for at in document.places if at[:2] == place and at != place)
        where += "".join(f", {document.where(at)}" for at in changed if at in document.overridden)
        patterns, roles = tuple(rule.match or ()), frozenset(rule.role or ())
        rules.append(Rule(patterns, rule.optional, where, number + 1, scheme, str(keyword), roles))
    methods = _named_methods(file, document)
    schemes = [rule.scheme for rule in rules if rule.scheme is not None]
    if any(named.method.of_weights for named in methods) or any(
        scheme.needs_data for scheme in schemes
    ):
        rules = [
            rule if rule.scheme is None else replace(rule, scheme=rule.scheme.when_calibrating)
            for rule in rules
        ]
    siblings = tuple(
        SiblingPattern(text, document.where(("siblings", number)))
        for number, text in enumerate(file.siblings or ())
    )
    return Recipe(file, target, tuple(rules), methods, siblings, document)


def resolve_scheme(value: str | dict[str, Any], document: Document, place: Place) -> Scheme:
    """A scheme as a recipe has it at a place: its name, or with options. InputError if it is none."""
    schemes: dict[str, type[Scheme]] = discover(Scheme)
    scheme: Scheme = _resolve(value, schemes, "scheme", document, place)
    return scheme


def _named_methods(file: RecipeFile, document: Document) -> tuple[NamedMethod, ...]:
    """The block `smooth`, then the list `methods`, then the block `kv_cache`.

    InputError for a method that is there twice.
    """
    methods: list[NamedMethod] = []
    if file.smooth is not None:
        smooth = _validated(recipe_methods()[SMOOTH[0]], file.smooth, document, SMOOTH)
        methods.append(NamedMethod(smooth, SMOOTH))
    for index, entry in enumerate(file.methods or ()):
        place: Place = ("methods", index)
        method = _resolve(entry, recipe_methods(), "method", document, place)
        methods.append(NamedMethod(method, place))
    if file.kv_cache is not None:
        block = file.kv_cache if isinstance(file.kv_cache, dict) else {"format": file.kv_cache}
        cache = _validated(recipe_methods()[KV_CACHE[0]], block, document, KV_CACHE)
        methods.append(NamedMethod(cache, KV_CACHE))
    first: dict[str, Place] = {}
    for method, place in ((named.method, named.place) for named in methods):
        for number, rule in enumerate(method.module_rules):
            check_patterns(rule.match, (*place, "rules", number), document)
        if method.name in first:
            raise InputError(
                f"the method `{method.name}` is there twice",
                where=document.where(place),
                fix=f"remove it here, or at {document.where(first[method.name])}",
            )
        first[method.name] = place
    return tuple(methods)


def _resolve(
    value: str | dict[str, Any],
    classes: dict[str, type[T]],
    kind: Literal["scheme", "target", "method"],
    document: Document,
    place: Place,
) -> T:
    options = dict(value) if isinstance(value, dict) else {"name": value}
    name = options.pop("name", None)
    where = document.where((*place, "name"))
    if not isinstance(name, str):
        odd = "".join(f"; it has `{key}`" for key in list(options)[:1])
        fix = f"such as {{name: {next(iter(classes))}}}"
        raise InputError(f"the {kind} needs a `name`{odd}", where=where, fix=fix)
    if kind == "scheme" and name in KEYWORDS:
        raise InputError(f"`{name}` takes no options", where=where, fix=f"write `scheme: {name}`")
    if name not in classes:
        names = [*classes, *KEYWORDS] if kind == "scheme" else list(classes)
        raise InputError(f"unknown {kind} `{name}`", where=where, fix=one_of(name, names))
    return _validated(classes[name], options, document, place)


def _validated(cls: type[T], options: dict[str, Any], document: Document, place: Place) -> T:
    """A scheme, target or method with its options. InputError for wrong ones."""
    try:
        return cls.model_validate(options)
    except ValidationError as error:
        raise explain(error, document, cls, place) from None
