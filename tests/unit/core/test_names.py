"""Untrusted names at their limits."""

from __future__ import annotations

import json

import pytest

from quantcli.core.untrusted.names import (
    file_name_fault,
    printable,
    tensor_name_fault,
    utf8_fault,
    visible_json,
)


@pytest.mark.parametrize("name", ["a", "a" * 512, "é" * 256])
def test_names_of_tensors(name: str) -> None:
    assert tensor_name_fault(name) is None


@pytest.mark.parametrize("name", ["a" * 513, "é" * 256 + "b"])
def test_long_names_of_tensors(name: str) -> None:
    fault = f"tensor name starting {name[:40]!r} is over 512 bytes"
    assert tensor_name_fault(name) == fault


LONGEST = "/".join(["a" * 255] * 16)  # 4,095 bytes


@pytest.mark.parametrize("name", ["a", "a/b", "a" * 255, "é" * 127, LONGEST, "..a/b..", ".a"])
def test_names_of_files(name: str) -> None:
    assert file_name_fault(name) is None
    assert (file_name_fault(name, folders=False) is None) == ("/" not in name)


@pytest.mark.parametrize(
    "name", ["a" * 256, "é" * 128, "a/" + "b" * 256, LONGEST.replace("a/", "/b/", 1)]
)
def test_long_names_of_files(name: str) -> None:
    fault = file_name_fault(name)
    assert fault == f"file name `{name:.40}` is longer than a disk takes"


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", ".", "a/.", "..", "a/../b"])
def test_names_of_files_outside_of_a_folder(name: str) -> None:
    assert file_name_fault(name) == f"file name `{name}` is not one inside the folder"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\udc80", "\\x80"), ("\udcff", "\\xff"), ("\udc7f", "\\udc7f"), ("\udd00", "\\udd00"),
        ("\x9b", "\\x9b"), ("\u202e", "\\u202e"), ("é a", "é a"), ("a\nb", "a\\nb"), ("'\t", "'\\t"),
    ],
)  # fmt: skip
def test_what_a_screen_shows(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x7f", "\\u007f"), ("\x9b", "\\u009b"), ("\u202e", "\\u202e"), ("\uffff", "\\uffff"),
        ("\U00010000", "\U00010000"), ("\U000e0001", "\\udb40\\udc01"), ("é", "é"),
        ("\U000107ff", "\\ud801\\udfff"), ("\U000e0fff", "\\udb43\\udfff"),
        ("\U0010ffff", "\\udbff\\udfff"), ("\udc80", "\\udc80"),
    ],
)  # fmt: skip
def test_json_of_what_no_screen_shows(text: str, shown: str) -> None:
    table = f'{{\n  "a": "{text}"\n}}'
    assert visible_json(table) == f'{{\n  "a": "{shown}"\n}}'
    assert json.loads(visible_json(table)) == {"a": text}
    assert visible_json('"\t"') == '"\\u0009"'


def test_a_text_that_no_file_of_utf8_holds() -> None:
    assert utf8_fault("é\x9b") is None
    assert utf8_fault("a\udc80") == "`a\\x80` is not UTF-8"
    assert utf8_fault("b" * 300 + "\udc80") == f"`{'b' * 196}\\x80` is not UTF-8"
