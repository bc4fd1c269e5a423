"""Untrusted names and JSON: what is shown of them, and what is taken."""

import re
from pathlib import Path

import pytest

import quantcli
from quantcli.core.errors import InputError
from quantcli.core.untrusted.names import file_name_fault, printable, tensor_name_fault, utf8_fault
from quantcli.core.untrusted.tables import Table, parse_table

INVISIBLE = {
    "escape": ("\x1b[2J", "\\x1b[2J"),
    "c1": ("\x9b", "\\x9b"),
    "delete": ("\x7f", "\\x7f"),
    "nul": ("\0", "\\x00"),
    "line ends": ("\r\n", "\\r\\n"),
    "separators": ("\u2028\u2029", "\\u2028\\u2029"),
    "bidi": ("\u202e\u2066\u200f\u061c", "\\u202e\\u2066\\u200f\\u061c"),
    "no width": ("\u200b\ufeff\xad", "\\u200b\\ufeff\\xad"),
    "tag": ("\U000e0041", "\\U000e0041"),
    "half a character": ("\ud800", "\\ud800"),
    "byte": (b"\xff".decode(errors="surrogateescape"), "\\xff"),
}


@pytest.mark.parametrize(("text", "shown"), INVISIBLE.values(), ids=[*INVISIBLE])
def test_what_is_invisible_is_escaped(text, shown):
    assert printable(f"a{text}\xe4\u6f22") == f"a{shown}\xe4\u6f22"
    assert file_name_fault(f"a{text}") == f"file name `a{shown}` has control characters"
    assert tensor_name_fault(f"a{text}") == f"tensor name `a{shown}` has control characters"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "./a",
        "../a",
        "a/..",
        "x" * 256,
        "\xe4" * 128,
        "x/" * 2047 + "xx",
    ],
)
def test_a_name_outside_or_too_long_is_a_fault(name):
    assert "inside the folder" in (fault := file_name_fault(name) or "") or "longer" in fault
    assert file_name_fault("a/\xe4" + "x" * 253) is None
    assert "inside the folder" in (file_name_fault("a/b", folders=False) or "")
    assert "inside the folder" in (file_name_fault("a\\b", folders=False) or "")


def test_text_that_utf8_cannot_hold():
    assert utf8_fault("a\udcff") == "`a\\xff` is not UTF-8"
    assert utf8_fault("a\x9b") is None


TABLE = Table(
    {"t": "x", "i": 7, "f": True, "n": 1.5, "l": ["a"], "o": {"k": 1}, "null": None, "big": 10**400},
    "config.json",
    "a.b",
    "mend it",
)


def test_values_come_by_their_types():
    assert TABLE.text("t") == "x"
    assert TABLE.integer("i", least=7, most=7) == 7
    assert TABLE.flag("f") is True
    assert (TABLE.number("n"), TABLE.number("i")) == (1.5, 7.0)
    assert TABLE.texts("l") == ("a",)
    assert TABLE.table("o").integer("k") == 1
    assert TABLE.table("o").path("k") == "a.b.o.k"
    assert (TABLE.text("null", None), TABLE.texts("gone", ()), TABLE.table("gone", None)) == (
        None,
        (),
        None,
    )


FAULTS = {
    "missing": (lambda: TABLE.text("gone"), "gone` is missing"),
    "null": (lambda: TABLE.text("null"), "null` should be text, not null"),
    "list for text": (lambda: TABLE.text("l"), "l` should be text, not a list"),
    "flag for number": (lambda: TABLE.integer("f"), "f` should be a whole number, not true or false"),
    "flag for float": (lambda: TABLE.number("f"), "f` should be a number, not true or false"),
    "float for whole": (lambda: TABLE.integer("n"), "n` should be a whole number, not the number 1.5"),
    "too small": (lambda: TABLE.integer("i", least=8), "i` should be at least 8, not 7"),
    "too large": (lambda: TABLE.integer("i", most=6), "i` should be at most 6, not 7"),
    "beyond floats": (lambda: TABLE.number("big"), f"big` should be a finite number, not 1{'0' * 39}"),
    "text for list": (lambda: TABLE.texts("t"), "t` should be a list of texts, not text"),
    "item": (lambda: TABLE.integers("l"), "l[0]` should be a whole number, not text"),
    "text for object": (lambda: TABLE.table("t"), "t` should be an object, not text"),
    "number in objects": (lambda: TABLE.tables("o"), "o.k` should be an object, not the number 1"),
    "unknown": (lambda: TABLE.only({"t"}), "i` has no meaning to this version"),
    "escaped": (lambda: TABLE.text("\x9b"), "\\x9b` is missing"),
}


@pytest.mark.parametrize(("read", "what"), FAULTS.values(), ids=[*FAULTS])
def test_a_wrong_value_names_its_key(read, what):
    with pytest.raises(InputError) as caught:
        read()
    error = caught.value
    assert (error.what, error.where, error.fix) == (f"`a.b.{what}", "config.json", "mend it")


def test_json_is_bounded():
    assert parse_table(b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}", "x").sequence("a") != []
    faults = {
        b"[]": "c.json must hold a JSON object",
        b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}": "JSON has over 64 levels",
        b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}": "JSON is nested too deeply",
        b'{"a": 1, "a": 2}': "key 'a' stands twice",
        b'{"a": "\\ud800"}': "text holds half a surrogate pair",
        b'{"a": "\xff"}': "not UTF-8 (byte 7)",
        b'{"a": ' + b"9" * 1001 + b"}": "a number has 1001 digits",
    }
    for data, what in faults.items():
        with pytest.raises(InputError) as caught:
            parse_table(data, "b/c.json")
        assert caught.value.what == what


SOURCE = Path(quantcli.__file__).parent
# what reads JSON without `parse_json`: it was written by the same run, or has a hash
OWN_JSON = {
    "calibration/sets/identity.py",
    "calibration/text/documents.py",  # lines of the user's text, with errors of their own
    "commands/live.py",
    "core/kernels/machine.py",
    "core/untrusted/bounded.py",
    "core/untrusted/server.py",
    "core/untrusted/tables.py",
    "verification/again/compare.py",
}


def test_there_is_one_way_to_read_json_and_to_show_names():
    for file in SOURCE.rglob("*.py"):
        name, text = file.relative_to(SOURCE).as_posix(), file.read_text()
        assert "json.load" not in text or name in OWN_JSON, name
        escapes = re.search(r"(repr|ascii)\(\w+\)\[1:-1\]", text)
        assert escapes is None or name == "core/untrusted/names.py", name
