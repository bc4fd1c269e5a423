"""Schemes and targets by name, found by scanning their folders: adding a file registers its class."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import TypeVar

T = TypeVar("T")


@cache
def discover(base: type[T]) -> dict[str, type[T]]:
    """The classes that derive from `base` and have a `name` of their own, by name.

    Imports the modules next to that of `base`, and from each folder there the module that is named
    like `base`: for Target, `targets/NAME/target.py`.
    """
    package = importlib.import_module(base.__module__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        path = f"{package.__name__}.{module.name}"
        if not module.ispkg:
            importlib.import_module(path)
        elif importlib.util.find_spec(inner := f"{path}.{base.__name__.lower()}"):
            importlib.import_module(inner)
    classes: dict[str, type[T]] = {}
    for cls in _descendants(base):
        name = cls.__dict__.get("name")
        if isinstance(name, str):
            assert name not in classes, f"two classes are named {name}: {classes[name]}, {cls}"
            classes[name] = cls
    return dict(sorted(classes.items()))


def _descendants(base: type[T]) -> Iterator[type[T]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _descendants(cls)
