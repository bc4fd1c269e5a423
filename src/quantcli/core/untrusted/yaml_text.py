"""The one reader and the one writer of YAML. No other module of the package imports `yaml`.

YAML has more than a recipe needs, and most of it harms: tags make objects, aliases make a few lines
into gigabytes, and plain words become times or numbers in base 60. So the reader takes mappings, lists
and single values, and refuses the rest with its place. A plain word is a number, a truth value or
nothing only if it looks like one to everybody; all others are text.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from quantcli.core.errors import InputError

MAX_BYTES = 2**18
MAX_VALUES = 20_000  # keys count, too
MAX_DEPTH = 20
_LONGEST_NUMBER = 1000  # characters

Place = tuple[str | int, ...]  # keys and indexes from the top

# libyaml's scanner is twenty times as fast; a build without it takes PyYAML's own
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STRAY = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_HALF = re.compile("[\ud800-\udfff]")  # of a pair: no file of UTF-8 can hold it
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_OF_BITS = re.compile(r"[-+]?0(?:x[0-9a-fA-F]+|b[01]+)")
_FLOAT = re.compile(
    rf"[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+)"
)
_PLAIN: dict[str, bool | float | None] = {"": None, "~": None}
for _value, *_words in (
    (None, "null"), (True, "true", "yes", "on"), (False, "false", "no", "off"),
    (math.inf, ".inf", "+.inf"), (-math.inf, "-.inf"), (math.nan, ".nan"),
):  # fmt: skip
    for _word in _words:
        _PLAIN |= dict.fromkeys((_word, _word.upper(), _word.capitalize()), _value)
_PLAIN |= {".Inf": math.inf, "+.Inf": math.inf, "-.Inf": -math.inf, ".NaN": math.nan}

_SHORT = "it is a short text file in YAML"
_QUOTE = 'put quotes around text that begins with a star, such as "*_proj"'


class Yaml(NamedTuple):
    """The plain data of a text, and the line of each value, from 1."""

    data: Any
    lines: dict[Place, int]


def read_yaml(text: str | bytes, source: str, noun: str = "text", *, unprintable: bool = False) -> Yaml:
    """Read one document: None, bool, int, float, str, lists, and dicts with str keys.

    A key is the text that is written. source: the place of the text, such as a path; places in it are
    `source:line:column`. noun: what it is, for messages. unprintable: values may have characters that
    a terminal must not see, such as the end of a line; keys never do. Bytes are UTF-8, or UTF-16 with a
    byte order mark. Raises InputError.
    """
    if isinstance(text, bytes):
        text = _decoded(text, source, noun)
    elif len(text) > MAX_BYTES:
        raise _too_long(source, noun)
    text = text.removeprefix("\ufeff")
    if stray := _STRAY.search(text):
        line = 1 + text.count("\n", 0, stray.start())
        column = stray.start() - text.rfind("\n", 0, stray.start())
        what = f"the text is not valid YAML: character {stray[0]!r} is not allowed"
        raise InputError(what, where=f"{source}:{line}:{column}", fix="remove it")
    try:
        return _Reader(text, source, unprintable=unprintable).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        fix = _QUOTE if "alias" in (error.context or "") else None
        what = f"the text is not valid YAML: {error.problem}"
        raise InputError(what, where=f"{source}{place}", fix=fix) from None


def write_yaml(value: Any, width: int = 100) -> str:
    """Plain data as YAML that `read_yaml` takes, keys in their order, lines of about `width`."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=width)


def write_value(value: Any) -> str:
    """Plain data as YAML on one line, as in KEY=VALUE. ValueError for numbers that are not finite,
    TypeError and RecursionError for what YAML cannot hold."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)  # escapes of pairs are not YAML


class _Writer(yaml.SafeDumper):
    """Writes a list that is there twice as two lists, and puts quotes around all that looks like a
    number to the reader."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Writer.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])


def _too_long(source: str, noun: str) -> InputError:
    return InputError(f"the {noun} is over {MAX_BYTES:,} bytes", where=source, fix=_SHORT)


def _decoded(raw: bytes, source: str, noun: str) -> str:
    if len(raw) > MAX_BYTES:
        raise _too_long(source, noun)
    # editors on Windows write UTF-8 with a byte order mark, or UTF-16, which always has one
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return raw.decode("utf-16" if wide else "utf-8")
    except UnicodeDecodeError as error:
        what = f"the {noun} is not {'UTF-16' if wide else 'UTF-8'} (byte {error.start})"
        raise InputError(what, where=source, fix=_SHORT) from None


class _Reader:
    """Builds values from the parser's events, so that a text is scanned up to what is refused."""

    def __init__(self, text: str, source: str, *, unprintable: bool) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self._source = source
        self._unprintable = unprintable
        self._count = 0
        self._lines: dict[Place, int] = {}

    def document(self) -> Yaml:
        """The only document; None if there is none."""
        data = None
        for number, event in enumerate(self._events):
            if isinstance(event, yaml.DocumentStartEvent):
                if number > 1:
                    what = "the text is not valid YAML: a second document begins here"
                    raise self._refused(event, what, "leave out the line `---`")
                data = self._value(next(self._events), ())
        return Yaml(data, self._lines)

    def _refused(self, event: Any, what: str, fix: str | None = None) -> InputError:
        mark = event.start_mark
        return InputError(what, where=f"{self._source}:{mark.line + 1}:{mark.column + 1}", fix=fix)

    def _check(self, event: Any) -> None:
        """InputError for an alias, a tag, and one value more than there may be."""
        if isinstance(event, yaml.AliasEvent):
            what = f"YAML alias `*{event.anchor:.80}` is not allowed"
            raise self._refused(event, what, f"write the value out, or {_QUOTE}")
        if event.tag is not None:
            raise self._refused(event, f"YAML tag `{event.tag:.80}` is not allowed", "remove it")
        self._count += 1
        if self._count > MAX_VALUES:
            what = f"the text has over {MAX_VALUES:,} values"
            raise self._refused(event, what, "leave out what is not needed; globs stand for many names")

    def _value(self, event: Any, place: Place) -> Any:
        self._check(event)
        self._lines.setdefault(place, event.start_mark.line + 1)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if len(place) >= MAX_DEPTH:
            raise self._refused(event, "YAML is nested too deeply")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(event, (*place, len(items))))
            return items
        table: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event)
            below = (*place, key)
            if key in table:
                first = f"{self._source}:{self._lines[below]}"
                raise self._refused(event, f"key `{key:.80}` appears twice", f"see {first}")
            self._lines[below] = event.start_mark.line + 1
            table[key] = self._value(next(self._events), below)
        return table

    def _key(self, event: Any) -> str:
        if isinstance(event, yaml.CollectionStartEvent):
            raise self._refused(event, "a key must be plain text")
        self._check(event)
        key = str(event.value)
        if not key.isprintable():
            raise self._refused(event, f"key {key[:80]!r} has unprintable characters")
        if key == "<<" and event.implicit[0]:
            raise self._refused(event, "YAML merge key `<<` is not allowed", "write the keys out")
        return key

    def _scalar(self, event: Any) -> str | int | float | bool | None:
        text = str(event.value)
        if event.implicit[0]:
            if text in _PLAIN:
                return _PLAIN[text]
            if (number := self._number(event, text)) is not None:
                return number
        half = _HALF.search(text)
        if half or not (self._unprintable or text.isprintable()):
            raise self._refused(event, f"text {text[:80]!r} has unprintable characters")
        return text

    def _number(self, event: Any, text: str) -> int | float | None:
        """The number that a plain word is; None if it is text. InputError for one that is too large."""
        form = next((form for form in (_INTEGER, _OF_BITS, _FLOAT) if form.fullmatch(text)), None)
        if form is None:
            return None
        number: int | float = math.inf
        if len(text) <= _LONGEST_NUMBER:
            number = float(text) if form is _FLOAT else int(text, 0 if form is _OF_BITS else 10)
        if number in (math.inf, -math.inf):
            fix = "put quotes around it if it is text"
            raise self._refused(event, f"the number `{text[:80]}` is too large", fix)
        return number
