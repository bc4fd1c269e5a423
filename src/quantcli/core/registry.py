"""Classes by name, found by scanning a folder: a new file in `schemes/` is enough."""

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
    """Every class that derives from `base` and has a `name`, by name.

    Modules next to base's own are searched, and in folders there the module named like the base: for
    Target, `targets/NAME/target.py`.
    """
    package = importlib.import_module(base.__module__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        path = f"{package.__name__}.{module.name}"
        if not module.ispkg:
            importlib.import_module(path)
        elif importlib.util.find_spec(inner := f"{path}.{base.__name__.lower()}"):
            importlib.import_module(inner)
    found: dict[str, type[T]] = {}
    for cls in _descendants(base):
        name = cls.__dict__.get("name")
        if isinstance(name, str):
            assert name not in found, f"two classes are named {name}: {found[name]}, {cls}"
            found[name] = cls
    return dict(sorted(found.items()))


def _descendants(base: type[T]) -> Iterator[type[T]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _descendants(cls)
