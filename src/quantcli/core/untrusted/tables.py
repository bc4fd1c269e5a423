"""Untrusted JSON, and its values by their types: a wrong one is an InputError that names the file and
the key."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

from quantcli.core.errors import InputError, MachineError
from quantcli.core.untrusted.names import printable

MAX_DIGITS = 1000  # of one number
MAX_JSON = 256 * 2**20  # bytes of an index, a config or a description
_DEEPEST = 64  # objects and lists within each other
_MOST = 2**63 - 1
_DIGEST = re.compile("[0-9a-f]{64}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_FETCH = "fetch the file again"

D = TypeVar("D")


class _Missing:
    """In place of a default: the key must be there."""


_REQUIRED = _Missing()


class _Refused(Exception):
    """JSON that is not to be trusted."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"key {key!r:.200} stands twice")
            seen.add(key)
    return table


def _integer(digits: str) -> int | float:
    if len(digits) > MAX_DIGITS:
        raise _Refused(f"a number has {len(digits)} digits")
    return int(digits) if digits != "-0" else -0.0  # as the reference library reads it


def parse_json(data: bytes, where: str, fix: str | None = _FETCH) -> Any:
    """JSON that came with a model: duplicate keys and bottomless nesting are refused.

    So is text that no file can hold: half a surrogate pair. `Infinity` and `NaN` pass: real
    config.json files hold them (`time_step_limit` of Mamba 2). A byte order mark passes, too: editors
    on Windows write one.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _Refused as refused:
        raise InputError(str(refused), where=where, fix=fix) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", where=where, fix=fix) from None
    except UnicodeEncodeError:
        raise InputError("text holds half a surrogate pair", where=where, fix=fix) from None
    except RecursionError:
        raise InputError("JSON is nested too deeply", where=where, fix=fix) from None
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", where=where, fix=fix) from None
    return value


def parse_table(data: bytes, where: str, fix: str | None = _FETCH) -> Table:
    """The object of a JSON file with these bytes. where: the file. InputError as `parse_json`, for what
    is not an object, and for one with more levels than what reads it could follow."""
    value = parse_json(data, where, fix)
    if not isinstance(value, dict):
        what = f"{where.rpartition('/')[2]} must hold a JSON object"
        raise InputError(what, where=where, fix=fix)
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return Table(value, where, fix=fix)
    raise InputError(f"JSON has over {_DEEPEST} levels", where=where, fix=fix)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that is read as a whole. InputError for one that is too large, MachineError
    for one that cannot be read."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise InputError(f"{path.name} is over {MAX_JSON} bytes", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise MachineError(f"cannot read: {error.strerror}", where=str(path)) from None


def read_table(path: Path, fix: str | None = _FETCH) -> Table:
    """The object in a JSON file: see `parse_table` and `read_bytes`."""
    return parse_table(read_bytes(path), str(path), fix)


_KINDS = {str: "text", bool: "true or false", dict: "an object", list: "a list", type(None): "null"}


def kind_of(value: Any) -> str:
    """What a value of JSON is, as text: `a list`."""
    return _KINDS.get(type(value), f"the number {value!r:.40}")


@dataclass(frozen=True, slots=True)
class Table:
    """An object of JSON: keys to values that may be anything.

    Each method reads one value and raises InputError if it has another type than asked for. A key that
    is missing, or null, gives the default; without a default it is an error.

    value: the object. where: its file. place: the keys that lead to it, with dots. fix: for errors.
    """

    value: Mapping[str, Any]
    where: str
    place: str = ""
    fix: str | None = _FETCH

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def __iter__(self) -> Iterator[str]:
        return iter(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def path(self, key: str) -> str:
        """The keys that lead to a value, with dots."""
        return f"{self.place}.{key}" if self.place else key

    def refuse(self, key: str, what: str) -> NoReturn:
        """Raise the InputError for the value of a key. what: what is wrong: `should be text`."""
        raise InputError(f"`{printable(self.path(key)):.300}` {what}", where=self.where, fix=self.fix)

    def only(self, required: Collection[str], optional: Collection[str] = ()) -> None:
        """InputError unless these are its keys."""
        for key in required:
            if key not in self.value:
                self.refuse(key, "is missing")
        for key in self.value:
            if key not in required and key not in optional:
                self.refuse(key, "has no meaning to this version")

    def raw(self, key: str) -> Any:
        """The value as it is; None if it is missing."""
        return self.value.get(key)

    def _get(self, key: str, kind: type, default: Any, words: str) -> Any:
        found = self.value.get(key)
        if found is None:
            if default is not _REQUIRED:
                return default
            self.refuse(key, f"should be {words}, not null" if key in self.value else "is missing")
        if type(found) is not kind:
            self.refuse(key, f"should be {words}, not {kind_of(found)}")
        return found

    @overload
    def text(self, key: str) -> str: ...
    @overload
    def text(self, key: str, default: D) -> str | D: ...
    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A text."""
        return self._get(key, str, default, "text")

    @overload
    def digest(self, key: str) -> str: ...
    @overload
    def digest(self, key: str, default: D) -> str | D: ...
    def digest(self, key: str, default: Any = _REQUIRED) -> Any:
        """A hash of 32 bytes, as 64 hexadecimal digits: sha256 or blake3."""
        found = self.text(key, default)
        if found is not default and not _DIGEST.fullmatch(found):
            self.refuse(key, f"should be a hash of 64 hexadecimal digits, not {found!r:.40}")
        return found

    @overload
    def flag(self, key: str) -> bool: ...
    @overload
    def flag(self, key: str, default: D) -> bool | D: ...
    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """A truth value."""
        return self._get(key, bool, default, "true or false")

    @overload
    def integer(self, key: str, *, least: int = 0, most: int = _MOST) -> int: ...
    @overload
    def integer(self, key: str, default: D, *, least: int = 0, most: int = _MOST) -> int | D: ...
    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 0, most: int = _MOST) -> Any:
        """A whole number from `least` to `most`."""
        found = self._get(key, int, default, "a whole number")
        if found is not default and not least <= found <= most:
            bound = f"at least {least}" if found < least else f"at most {most}"
            self.refuse(key, f"should be {bound}, not {found!r:.40}")
        return found

    @overload
    def number(self, key: str) -> float: ...
    @overload
    def number(self, key: str, default: D) -> float | D: ...
    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number, as a float."""
        found = self.value.get(key)
        kind = int if type(found) is int else float
        found = self._get(key, kind, default, "a number")
        if found is default:
            return found
        if not abs(found) <= 1e300:
            self.refuse(key, f"should be a finite number, not {found!r:.40}")
        return float(found)

    @overload
    def sequence(self, key: str) -> list[Any]: ...
    @overload
    def sequence(self, key: str, default: D) -> list[Any] | D: ...
    def sequence(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of anything."""
        return self._get(key, list, default, "a list")

    @overload
    def texts(self, key: str) -> tuple[str, ...]: ...
    @overload
    def texts(self, key: str, default: D) -> tuple[str, ...] | D: ...
    def texts(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of texts."""
        return self._items(key, default, str, "a list of texts")

    @overload
    def integers(self, key: str) -> tuple[int, ...]: ...
    @overload
    def integers(self, key: str, default: D) -> tuple[int, ...] | D: ...
    def integers(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of whole numbers."""
        return self._items(key, default, int, "a list of whole numbers")

    def _items(self, key: str, default: Any, kind: type, words: str) -> Any:
        found = self._get(key, list, default, words)
        if found is default:
            return found
        for index, item in enumerate(found):
            if type(item) is not kind:
                what = f"should be {_KINDS.get(kind, 'a whole number')}, not {kind_of(item)}"
                self.refuse(f"{key}[{index}]", what)
        return tuple(found)

    @overload
    def table(self, key: str) -> Table: ...
    @overload
    def table(self, key: str, default: D) -> Table | D: ...
    def table(self, key: str, default: Any = _REQUIRED) -> Any:
        """An object."""
        found = self._get(key, dict, default, "an object")
        return found if found is default else self._inner(key, found)

    @overload
    def tables(self, key: str) -> dict[str, Table]: ...
    @overload
    def tables(self, key: str, default: D) -> dict[str, Table] | D: ...
    def tables(self, key: str, default: Any = _REQUIRED) -> Any:
        """An object of objects: key -> object."""
        found = self.table(key, default)
        return found if found is default else found.inner

    @property
    def inner(self) -> dict[str, Table]:
        """All its values, which should be objects."""
        return {name: self.table(name) for name in self}

    @overload
    def list_of_tables(self, key: str) -> tuple[Table, ...]: ...
    @overload
    def list_of_tables(self, key: str, default: D) -> tuple[Table, ...] | D: ...
    def list_of_tables(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of objects."""
        found = self._items(key, default, dict, "a list of objects")
        if found is default:
            return found
        return tuple(self._inner(f"{key}[{index}]", item) for index, item in enumerate(found))

    def _inner(self, key: str, value: Mapping[str, Any]) -> Table:
        return Table(value, self.where, self.path(key), self.fix)
