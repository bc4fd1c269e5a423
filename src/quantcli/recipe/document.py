"""A recipe or a release file as data with the place of each value, and changes of it by `--set`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.core.errors import InputError, MachineError, one_of, other_version
from quantcli.core.untrusted.names import utf8_fault
from quantcli.core.untrusted.yaml_text import MAX_BYTES, MAX_DEPTH, Place, read_yaml

VERSION = 1  # of the form of recipes and release files

MAPPING = "the recipe"  # the name of one that is not a file


class Assignment(str):
    """A `KEY=VALUE` that wins over a recipe, its value as YAML, and the place where it is written."""

    where: str

    @classmethod
    def at(cls, text: str, where: str) -> Assignment:
        """One that a file has at `where`."""
        assignment = cls(text)
        assignment.where = where
        return assignment


@dataclass
class Document:
    """The plain data of a YAML file, and the place of each value.

    overridden: places below which an override stands.
    """

    path: Path
    data: dict[str, Any]
    places: dict[Place, str]  # keys and indexes from the top -> "file:line" or "--set KEY=VALUE"
    overridden: set[Place] = field(default_factory=set)

    def where(self, place: Place) -> str:
        """The file and line of `place`, or of the closest block above it that has one."""
        while place and place not in self.places:
            place = place[:-1]
        return self.places.get(place, str(self.path))

    def override(self, assignment: str) -> None:
        """Apply one `--set KEY=VALUE`, such as `rules.0.scheme=keep`; the value is YAML."""
        flag = assignment.where if isinstance(assignment, Assignment) else f"--set {assignment}"
        if (fault := utf8_fault(assignment)) is not None:
            raise InputError(fault, where=flag, fix="write it in UTF-8")
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            what = f"`{assignment}` is not of the form KEY=VALUE"
            raise InputError(what, where=flag, fix="write for example --set target=ascend")
        # Globs and limits have a meaning in YAML, and the shell has removed their quotes.
        value = text if text.startswith(("*", ">")) else read_yaml(text, flag).data
        parent: Any = self.data
        place: list[str | int] = []
        *path, last = key.split(".")
        for step in path:
            if parent is self.data and len(path) == 1 and parent.get(step) is None:
                parent[step] = {}  # the command line may add a whole block, such as `expect`
                self.places[(step,)] = flag
            parent = parent[self._step(parent, step, place, flag)]
        if isinstance(parent, dict):
            parent[last] = value
            place.append(last)
        else:
            step = self._step(parent, last, place, flag)
            parent[step] = value
        below = tuple(place)
        self.places = {k: v for k, v in self.places.items() if k[: len(below)] != below}
        self.places[below] = flag
        self.overridden.add(below)

    def check_version(self, noun: str) -> None:
        """InputError for a `version` that is not read here: before unknown keys are, which it may have.

        noun: what the file is.
        """
        version = self.data.get("version")
        if version is not None and (type(version) is not int or version != VERSION):
            fix = f"write `version: {VERSION}`, and what that takes"
            raise other_version(noun, version, VERSION, self.where(("version",)), fix)

    def is_overridden(self, *place: str | int) -> bool:
        """Whether a value is not the file's own, but an override's."""
        return any(place[: len(above)] == above for above in self.overridden)

    @staticmethod
    def _step(parent: Any, step: str, place: list[str | int], flag: str) -> Any:
        key: str | int = step
        if isinstance(parent, list):
            if step not in map(str, range(len(parent))):
                items = f"0 to {len(parent) - 1}" if parent else "none, the list is empty"
                raise InputError(f"the list has no item `{step}`", where=flag, fix=f"items: {items}")
            key = int(step)
        elif not isinstance(parent, dict) or step not in parent:
            above = f"`{'.'.join(map(str, place))}`"
            fix = f"{above} has a single value: set it as a whole"
            if place[-1:] == ["scheme"] and isinstance(parent, str):
                key, _, value = flag.removeprefix("--set ").partition("=")
                whole = key.removesuffix(f".{step}")
                if whole != key:
                    fix += f": --set '{whole}={{name: {parent}, {step}: {value}}}'"
            if isinstance(parent, dict):
                fix = one_of(step, parent) if parent else f"{above} is empty"
            raise InputError(f"there is no key `{step}` to set", where=flag, fix=fix)
        place.append(key)
        return key


def load_document(path: Path, noun: str = "recipe", keys: str = "`target` and `rules`") -> Document:
    """Read a YAML file whose top level is a mapping. Raises InputError with file:line.

    noun, keys: what the file is, and what it must have, for messages.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = f"cannot read the {noun}: {error.strerror}"
        raise MachineError(what, where=str(path), fix="check the file and its permissions") from None
    data, lines = read_yaml(raw, str(path), noun)
    if not isinstance(data, dict):
        what = f"the {noun} is {'empty' if data is None else 'not a mapping'}"
        raise InputError(what, where=f"{path}:1", fix=f"it needs the keys {keys}")
    return Document(path, data, {place: f"{path}:{line}" for place, line in lines.items()})


def document_of(table: Mapping[str, Any], name: str = MAPPING) -> Document:
    """A recipe that a Python program made: a mapping with the content of a file.

    Its places are its keys. name: of the mapping, for messages. Raises InputError for what no file
    can hold.
    """
    places: dict[Place, str] = {}
    return Document(Path(name), _copied(table, (), places, name), places)


def _copied(value: Any, place: Place, places: dict[Place, str], name: str) -> Any:
    """Mappings as dicts and sequences as lists, as YAML would give them."""
    where = f"{name}, `{'.'.join(map(str, place))}`" if place else name
    places[place] = where
    if len(place) > MAX_DEPTH:
        raise InputError(f"{name} is nested too deeply", where=where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key.isprintable():
                raise InputError(f"key {key!r:.80} is not plain text", where=where)
        return {key: _copied(inner, (*place, key), places, name) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(inner, (*place, n), places, name) for n, inner in enumerate(value)]
    if value is not None and not isinstance(value, str | int | float):
        what = f"{reprlib.repr(value)} is not text, a number, True, False or None"
        raise InputError(what, where=where, fix="give what YAML can hold")
    return _printable(value, where)


def _printable(value: Any, where: str) -> Any:
    """A value; InputError for text with control characters."""
    if isinstance(value, str) and not value.isprintable():
        raise InputError(f"text {value[:80]!r} has unprintable characters", where=where)
    return value
