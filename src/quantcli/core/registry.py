"""Schemes, targets and methods by name: those in their folders, and those of other people's packages.

A file in a folder registers its class. A package that is installed next to quantcli names its classes
in entry points, in its pyproject.toml:

    [project.entry-points."quantcli.schemes"]
    my_scheme = "my_package.module:MyScheme"
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from quantcli.core.errors import MachineError

T = TypeVar("T")
_PACKAGES: dict[type, tuple[str, str]] = {}  # class of an entry point -> its package and version


@cache
def discover(base: type[T]) -> dict[str, type[T]]:
    """The classes that derive from `base` and have a `name` of their own, by name.

    Imports the modules next to that of `base`, and from each folder there the module that is named
    like `base`: for Target, `targets/NAME/target.py`. Then what entry points name: for Target, those of
    the group `quantcli.targets`. MachineError for an entry point that does not load, is not such a
    class, or has a name that is taken.
    """
    package = importlib.import_module(base.__module__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        path = f"{package.__name__}.{module.name}"
        if not module.ispkg:
            importlib.import_module(path)
        elif importlib.util.find_spec(inner := f"{path}.{base.__name__.lower()}"):
            importlib.import_module(inner)
    group = f"quantcli.{package.__name__.rpartition('.')[2]}"
    entries = sorted(entry_points(group=group), key=lambda entry: (entry.name, _package(entry)))
    for entry in entries:
        _PACKAGES[_loaded(entry, base)] = _package(entry)
    classes: dict[str, type[T]] = {}
    for cls in dict.fromkeys(_descendants(base)):  # one with two bases is met twice
        name = cls.__dict__.get("name")
        if isinstance(name, str):
            if name in classes:
                raise _taken(name, classes[name], cls)
            classes[name] = cls
    return dict(sorted(classes.items()))


def packages_of(classes: Iterable[type]) -> dict[str, str]:
    """The packages that some classes come from, and their versions; without quantcli's own."""
    return dict(sorted(_PACKAGES[cls] for cls in {*classes} & _PACKAGES.keys()))


def blamed(error: BaseException) -> str | None:
    """The package and version of a class whose code an exception passed through last; None if all of
    it is quantcli's own or a library's."""
    packages = {cls.__module__.partition(".")[0]: " ".join(_PACKAGES[cls]) for cls in _PACKAGES}
    package, trace = None, error.__traceback__
    while trace is not None:
        top = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
        package, trace = packages.get(top, package), trace.tb_next
    return package


def _loaded(entry: EntryPoint, base: type[T]) -> type[T]:
    """The class that an entry point names. MachineError if it is not one that recipes can name."""
    try:
        cls = entry.load()
    except Exception as error:
        reason = f"cannot be loaded: {type(error).__name__}: {error}"
        raise _broken(entry, reason) from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise _broken(entry, f"is not a class that derives from {base.__module__}.{base.__name__}")
    name = cls.__dict__.get("name")
    if name != entry.name:
        raise _broken(entry, f"is a class with the name {name!r:.60}, not `{entry.name}`")
    return cls


def _broken(entry: EntryPoint, reason: str) -> MachineError:
    package, version = _package(entry)
    return MachineError(
        f"`{entry.name}` {reason}",
        where=f"{entry.value} of the package {package} {version} (entry points, {entry.group})",
        fix=f"install another version of {package}, or uninstall it",
    )


def _taken(name: str, *classes: type) -> MachineError:
    what = f"two classes are named `{name}`: "
    what += " and ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)
    packages = packages_of(classes)
    assert packages, what
    return MachineError(what, fix=f"uninstall {' or '.join(packages)}")


def _package(entry: EntryPoint) -> tuple[str, str]:
    """Name and version of the package that an entry point belongs to."""
    return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "")


def _descendants(base: type[T]) -> Iterator[type[T]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _descendants(cls)
