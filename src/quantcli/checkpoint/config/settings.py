"""An object of an untrusted JSON file, whose values are read by type.

Nobody else looks into such an object: a value of another type than a reader expects is an InputError
that names the file and the key. Values that nobody reads may be anything.
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantcli.core.errors import InputError
from quantcli.core.untrusted.names import printable
from quantcli.core.untrusted.tables import kind_of

_FIX = "take the file of the model that was published, or correct the value"
_MOST: Final = 2**63 - 1  # no size and no count is larger


class WrongType(InputError):
    """A value of another type than it should have."""


@dataclass(frozen=True, eq=False, repr=False)
class Settings:
    """An object of a JSON file. A key whose value is null is absent.

    file:  the file's name, for messages. path: the whole path; empty if there is none.
    place: the keys that lead to the object, such as `quantization_config.config_groups.group_0`.

    Getters return None for an absent key, and raise InputError for a value of another type.
    """

    _values: Mapping[str, Any]
    file: str = "config.json"
    path: str = ""
    place: str = ""

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Settings({reprlib.repr(self._values)}, {self.key_path('')!r})"

    def plain(self) -> dict[str, Any]:
        """A copy of the values, to be written, compared or changed."""
        return copy.deepcopy(dict(self._values))

    def value(self, key: str) -> object:
        """The value as it is, for a comparison or a message."""
        return self._values.get(key)

    def key_path(self, key: str) -> str:
        """A key with the keys that lead to it."""
        return ".".join(filter(None, (self.place, key)))

    def with_values(self, **values: Any) -> Settings:
        """The same object with some values more, or other ones."""
        return Settings({**self._values, **values}, self.file, self.path, self.place)

    def wrong(self, key: str, expected: str) -> WrongType:
        """The error for a value that should be something else, such as "text"."""
        value = self._values.get(key)
        kind = kind_of(value)
        if isinstance(value, list) and expected.startswith("a list"):
            kind = "one of other things"
        content = f": it is {reprlib.repr(value)}" if isinstance(value, str) else ""
        place = f"{self.file}: `{printable(self.key_path(key)):.200}`"
        return WrongType(
            f"{place} should be {expected}, not {kind}{content}",
            where=self.path or self.file,
            fix=_FIX,
        )

    # -- one value -----------------------------------------------------------------------------------

    def text(self, key: str) -> str | None:
        """A text."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def flag(self, key: str) -> bool | None:
        """true or false."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def integer(self, key: str, least: int = -_MOST, most: int = _MOST) -> int | None:
        """A whole number from `least` to `most`."""
        value = self._values.get(key)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            bounds = f" of {least} or more" if least != -_MOST else ""
            bounds = f" from {least} to {most}" if least != -_MOST and most != _MOST else bounds
            raise self.wrong(key, f"a whole number{bounds}")
        return value

    def number(self, key: str) -> float | None:
        """A number."""
        value = self._values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.wrong(key, "a number")
        return value

    def size(self, key: str) -> int | None:
        """A number of things, from 0 on. None also if a list has a number for each layer."""
        value = self._values.get(key)
        if isinstance(value, list):
            if not all(isinstance(each, (int, float, type(None))) for each in value):
                raise self.wrong(key, "a number, or a number for each layer")
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (type(value) is not int or not 0 <= value <= _MOST):
            raise self.wrong(key, "a whole number of 0 or more")
        return value

    # -- several values ------------------------------------------------------------------------------

    def texts(self, key: str) -> tuple[str, ...]:
        """The texts of a list; none if the key is absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(key, "a list of texts")
        return tuple(value)

    def table(self, key: str) -> Settings | None:
        """An object."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Settings(value, self.file, self.path, self.key_path(key))

    def object_of(self, key: str) -> Settings | None:
        """The same, but None also for a value of another type, which is then a finding."""
        return self.table(key) if isinstance(self._values.get(key), dict) else None

    def tables(self, key: str) -> dict[str, Settings]:
        """The objects in an object, by their keys; none if the key is absent."""
        outer = self.table(key)
        if outer is None:
            return {}
        return {name: inner for name in outer if (inner := outer.table(name)) is not None}

    def listed(self, key: str) -> list[Settings]:
        """The objects of a list, or one that stands alone; none if the key is absent."""
        value = self._values.get(key)
        given = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(each, dict) for each in given):
            raise self.wrong(key, "an object, or a list of them")
        return [Settings(each, self.file, self.path, self.key_path(key)) for each in given]

    def inner(self) -> Iterator[tuple[str, Settings]]:
        """Each key whose value is an object, and the object."""
        for key, value in self._values.items():
            if isinstance(value, dict):
                yield key, Settings(value, self.file, self.path, self.key_path(key))
