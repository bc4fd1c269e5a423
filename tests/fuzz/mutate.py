"""Changes of good inputs that a stranger might make: of values in JSON and YAML, of text, of bytes.

A mutation is a function of a seed and a good input, so that a run can be repeated.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

Path = tuple[str | int, ...]

ODD_NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 255, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), 10**9, 10**400, 0.5, -0.0,
    1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "x", "null", "../x", "/etc/passwd", "a/b", "..", "\0", "\n", "\x1b[2J", "\x9b", "\u202e",
    "\ud800", "\ufeff", "é", "a" * 300, "a" * 5000, "re:", "re:(", "re:(([a-z_.0-9])+)+!", "re:.*" * 6,
    "{{ 1 }}", "{{ x", "{% for", "%s", "{0}", "*", "1e999", "0x" + "f" * 2000, "!!int ''", "~", "true",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, *ODD_NUMBERS, *ODD_TEXTS, [], {}, [[]], [{}], [None], ["x"], [0], {"x": "y"},
    {"x": {}}, {"": None}, [1, "a", None, {}],
)  # fmt: skip
PIECES: tuple[bytes, ...] = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\n", b"\r", b"\t", b" ", b'"', b"'",
    b"\\", b"\\ud800", b"\\u0000", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1e999", b"NaN",
    b"null", b"9" * 400, b'"x":1,', b"version ",
)  # fmt: skip
YAML_PIECES: tuple[bytes, ...] = (
    b"!!bool maybe", b"!!int ''", b"!!float .", b"!!float x", b"!!binary '*'", b"!!set {a, b}", b"!x y",
    b"!!timestamp 2001-99-99", b"!!python/object:os.x ", b"&a ", b"*a", b"<<: *a\n", b"<<: {a: 1}\n",
    b"&a [*a]", b"? ", b"- ", b"|\n", b">-\n", b"---\n", b"...\n", b"%YAML 9.9\n", b"%TAG ! x\n", b"#",
    b"0x" + b"f" * 300, b"0b2", b"0o9", b"1:99:99", b"1_000", b".inf", b".nan", b"-.inf", b"yes", b"~",
    b"2001-01-01", b"[" * 60, b"{a: " * 30, b"\xe2\x80\xa8", b"\xc2\x85", b"=", b"a: b: c", b"\t- x",
)  # fmt: skip
_DEEP = 4000  # levels of nesting


@dataclass(frozen=True)
class Kind:
    """What an input is.

    tree:   the JSON value in it; None if it is none. join: the input with another such text in place.
    pieces: what is put between its bytes.
    """

    tree: Callable[[bytes], Any] | None
    join: Callable[[bytes, bytes], bytes] = field(default=lambda _, text: text)
    pieces: tuple[bytes, ...] = PIECES


def _header_text(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _with_header(data: bytes, text: bytes) -> bytes:
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    return len(text).to_bytes(8, "little") + text + rest


def _lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


def _as_lines(_: bytes, text: bytes) -> bytes:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return text
    lines = table if isinstance(table, list) else [table]
    return b"".join(_dump(line) + b"\n" for line in lines)


def _yaml_tree(data: bytes) -> Any:
    import yaml

    return yaml.safe_load(data)


KINDS: dict[str, Kind] = {
    "json": Kind(json.loads),
    "header": Kind(lambda data: json.loads(_header_text(data)), _with_header),
    "lines": Kind(_lines, _as_lines),
    "yaml": Kind(_yaml_tree, pieces=PIECES + YAML_PIECES),
    "text": Kind(None),
}


def mutate(data: bytes, kind: str, number: int, words: Sequence[Any] = ()) -> bytes:
    """A changed input: the same one for the same arguments.

    number: the seed. words: values that mean something to the reader.
    """
    rng = random.Random(number)
    found = KINDS[kind]
    if found.tree is None or rng.random() < 0.2:
        return mutate_bytes(data, rng, found.pieces)
    tree, paths = _parsed(data, kind)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _changed(tree, rng.choice(paths), rng, words, paths)
    text = _dump(tree)
    if rng.random() < 0.05:
        text = _spoilt(text, rng)
    return found.join(data, text)


@cache
def _parsed(data: bytes, kind: str) -> tuple[Any, list[Path]]:
    parse = KINDS[kind].tree
    assert parse is not None
    tree = parse(data)
    return tree, list(_paths(tree, ()))


def _paths(tree: Any, above: Path) -> list[Path]:
    found = [above]
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        found += _paths(value, (*above, key))
    return found


def _dump(tree: Any) -> bytes:
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return b"[" * _DEEP


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _replaced(tree: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """A copy with another value at a path; the tree itself if an earlier change took the path away."""
    if not path:
        return change(tree)
    key, *rest = path
    if isinstance(tree, dict) and key in tree:
        return {**tree, key: _replaced(tree[key], tuple(rest), change)}
    if isinstance(tree, list) and isinstance(key, int) and key < len(tree):
        return [*tree[:key], _replaced(tree[key], tuple(rest), change), *tree[key + 1 :]]
    return tree


def _changed(
    tree: Any, path: Path, rng: random.Random, words: Sequence[Any], paths: Sequence[Path]
) -> Any:
    how = rng.randrange(10)
    if how == 0 and path:  # take it away
        return _replaced(tree, path[:-1], lambda parent: _without(parent, path[-1]))
    if how == 1 and path:  # another key
        name = rng.choice((*ODD_TEXTS, *(word for word in words if isinstance(word, str))))
        return _replaced(tree, path[:-1], lambda parent: _renamed(parent, path[-1], name))
    if how == 2:  # what stands elsewhere
        other = rng.choice(paths)
        try:
            value = _at(tree, other)
        except (KeyError, IndexError, TypeError):
            value = None
        return _replaced(tree, path, lambda _: value)
    if how == 3:  # one more entry
        name, value = rng.choice(ODD_TEXTS), rng.choice(ODD)
        return _replaced(tree, path, lambda old: _more(old, name, value))
    if how == 4:
        return _replaced(tree, path, lambda old: [old] if rng.random() < 0.5 else {"x": old})
    if how in {5, 6} or not words:
        return _replaced(tree, path, lambda old: _nudged(old, rng))
    if how in {7, 8}:
        return _replaced(tree, path, lambda _: rng.choice(words))
    return _replaced(tree, path, lambda _: rng.choice(ODD))


def _without(parent: Any, key: str | int) -> Any:
    if isinstance(parent, dict):
        return {k: v for k, v in parent.items() if k != key}
    return [v for k, v in enumerate(parent) if k != key] if isinstance(parent, list) else parent


def _renamed(parent: Any, key: str | int, name: str) -> Any:
    if not isinstance(parent, dict):
        return parent
    return {name if k == key else k: v for k, v in parent.items()}


def _more(old: Any, name: str, value: Any) -> Any:
    if isinstance(old, dict):
        return {**old, name: value}
    return [*old, value] if isinstance(old, list) else value


def _nudged(old: Any, rng: random.Random) -> Any:
    """A value of the same type, or an odd one."""
    if isinstance(old, bool) or old is None:
        return rng.choice((True, False, None, 0, 1, "true"))
    if isinstance(old, int) and abs(old) < 2**70:
        step = rng.choice((old + 1, old - 1, -old, old * 2, old // 2, old << 20, old << 40, old + 0.5))
        return rng.choice((step, str(old), rng.choice(ODD_NUMBERS)))
    if isinstance(old, float):
        return rng.choice((-old, old * 1e6, int(old) if abs(old) < 1e9 else 0, *ODD_NUMBERS))
    if isinstance(old, str):
        place = rng.randint(0, len(old))
        piece = rng.choice(ODD_TEXTS)
        return rng.choice((old[:place] + piece + old[place:], old[:place], old * 2, old.upper(), piece))
    if isinstance(old, list):
        return rng.choice((old * 2, old[:1], old[::-1], old[0] if old else None))
    return rng.choice(ODD)


def _spoilt(text: bytes, rng: random.Random) -> bytes:
    """JSON that is none, or that is odd in ways which no value is."""
    how = rng.randrange(3)
    if how == 0:
        place = text.find(b":") + 1  # the first value of the first key
        return text[:place] + b"[" * _DEEP + b"]" * _DEEP + text[place:]
    if how == 1:  # a key twice
        place = text.rfind(b"{") + 1
        end = text.find(b":", place)
        return text[:place] + text[place:end] + b":1," + text[place:] if end > place else text
    return text.replace(b"\\ud800", b"\xed\xa0\x80").replace(b"1", b"1" * 1200, 1)


def mutate_bytes(data: bytes, rng: random.Random, pieces: Sequence[bytes] = PIECES) -> bytes:
    """A text or any bytes, changed at one place or a few."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randint(0, len(data))
        end = min(len(data), place + rng.choice((1, 1, 4, 16, 200)))
        how = rng.randrange(7)
        if how == 0:
            data = data[:place]
        elif how == 1:
            data = data[:place] + data[end:]
        elif how == 2:
            data = data[:place] + data[place:end] * rng.choice((2, 2, 3, 50)) + data[end:]
        elif how == 3:
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif how == 4 and data.count(b"\n") > 1:
            lines = data.splitlines(keepends=True)
            i, k = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[i], lines[k] = (lines[k], lines[i]) if rng.random() < 0.5 else (lines[k], lines[k])
            data = b"".join(lines)
        else:
            data = data[:place] + rng.choice(pieces) + data[place if how == 5 else end :]
    return data[: 2**20]
