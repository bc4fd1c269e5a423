"""Calibration methods as recipes and plans know them: by name, with options, rules and words.

A method's work on a layer is in `calibration`, which imports this package. So its class is found by
name here, like a plug-in, and never imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from quantcli.core.errors import MachineError
from quantcli.core.numerics import Cache
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme

_INTERFACE = "quantcli.calibration.methods.base"


class ModuleRule(Protocol):
    """An entry of a method's option `rules`. Its patterns match whole names of quantized modules."""

    @property
    def match(self) -> list[str]:
        """Globs, or `re:REGEX`."""

    @property
    def optional(self) -> bool:
        """Whether it may match nothing."""


class MethodOptions(BaseModel):
    """A calibration method. The fields of a subclass are its options in a recipe.

    name:        what recipes or schemes call it.
    for_schemes: whether schemes ask for it (`Scheme.methods`), and recipes do not name it. Its options
                 then have their defaults.
    results:     the words for what it gives: a plural if modules have one each, such as ranges; else a
                 noun in the singular, such as smoothing.
    edited_as:   a participle for channels that it edits, which also names the list of them in reports,
                 such as smoothed. Empty if it edits nothing.
    of_weights:  whether it is of use to weights. A recipe with such a method has a text for them, which
                 schemes may use, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str]
    for_schemes: ClassVar[bool] = False
    results: ClassVar[tuple[str, ...]]
    edited_as: ClassVar[str] = ""
    of_weights: ClassVar[bool] = True

    @property
    def cache(self) -> Cache | None:
        """The cache of keys and values that it measures scales for; None: it measures none."""
        return None

    @property
    def module_rules(self) -> Sequence[ModuleRule]:
        """The option `rules`, if it has one: the first rule that matches wins."""
        return ()

    def uses(self, scheme: Scheme) -> Collection[str]:
        """Those of `results` that a module with this scheme is given."""
        return self.results if self.name in scheme.methods else ()


def discover_methods() -> dict[str, type[MethodOptions]]:
    """Every calibration method by name."""
    classes: dict[str, type[MethodOptions]] = discover(importlib.import_module(_INTERFACE).Method)
    return classes


def recipe_methods() -> dict[str, type[MethodOptions]]:
    """The methods that recipes may name."""
    return {name: cls for name, cls in discover_methods().items() if not cls.for_schemes}


def methods_for(named: Iterable[MethodOptions], schemes: Iterable[Scheme]) -> tuple[MethodOptions, ...]:
    """The methods of a calibration: `named` in their order, then those that schemes ask for, sorted.

    MachineError for a scheme that asks for a method which is not there, or not for schemes.
    """
    asked = {name: scheme.name for scheme in schemes for name in scheme.methods}
    if not asked:  # most plans need no calibration, and do not import it
        return tuple(named)
    classes = {name: cls for name, cls in discover_methods().items() if cls.for_schemes}
    if missing := asked.keys() - classes.keys():
        name = min(missing)
        raise MachineError(
            f"the scheme `{asked[name]}` needs the calibration method `{name}`, which is not installed",
            fix="install the package that has it",
        )
    return (*named, *(classes[name]() for name in sorted(asked)))
