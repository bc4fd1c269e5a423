"""YAML as untrusted input: what is read, what is refused and where; what is written is read."""

import ast
import math
import string
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import quantcli
from quantcli.core.errors import InputError
from quantcli.core.untrusted import yaml_text
from quantcli.core.untrusted.yaml_text import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_VALUES,
    read_yaml,
    write_value,
    write_yaml,
)
from quantcli.recipe.shipped import shipped_recipes

SOURCE = Path(quantcli.__file__).parent
SHIPPED = [*shipped_recipes().values(), *(SOURCE / "commands" / "choosing").glob("*.yaml")]


@pytest.fixture(params=["CSafeLoader", "SafeLoader"])
def scanner(request, monkeypatch):
    """Both scanners: an installation may lack the fast one."""
    monkeypatch.setattr(yaml_text, "_LOADER", getattr(yaml, request.param))


def refusal(text, **options):
    with pytest.raises(InputError) as caught:
        read_yaml(text, "r.yaml", **options)
    assert len(caught.value.what) < 200
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("# only a comment", None), ("---", None), ("~", None), ("Null", None),
        ("yes", True), ("True", True), ("ON", True), ("no", False), ("off", False), ("tRue", "tRue"),
        ("0", 0), ("-12", -12), ("+1_000", 1000), ("0x1F", 31), ("0b101", 5), ("1__0", "1__0"),
        ("1.5", 1.5), ("-.5", -0.5), ("1.", 1.0), ("1e-3", 0.001), ("1E5", 1e5), ("1.5e+3", 1500.0),
        (".inf", math.inf), ("-.Inf", -math.inf),
        # YAML 1.1 makes numbers, times and objects of these, and people mean text
        ("010", "010"), ("0o17", "0o17"), ("1:30", "1:30"), ("190:20:30.15", "190:20:30.15"),
        ("2024-01-02", "2024-01-02"), ("2024-99-99", "2024-99-99"), ("=", "="), ("y", "y"),
        ("1_", "1_"), ("0x", "0x"), ("'5'", "5"), ('"yes"', "yes"), ("\ufeffa", "a"),
        ("[a, {b: [1, ~]}]", ["a", {"b": [1, None]}]), ("{1: a, yes: b, ~: c}",
         {"1": "a", "yes": "b", "~": "c"}), ("a: &anchor 1", {"a": 1}), ("'<<': 1", {"<<": 1}),
        ("a: 10" + 99 * "0", {"a": 10**100}),
    ],
)  # fmt: skip
def test_values(scanner, text, value):
    found = read_yaml(text, "r.yaml").data
    assert found == value
    assert type(found) is type(value)


def test_nan(scanner):
    assert math.isnan(read_yaml(".nan", "r.yaml").data)


def test_lines_and_bytes(scanner):
    found = read_yaml(b"\xef\xbb\xbfa: 1\r\nb:\r\n  - c\r\n  - {d: 2}\r\n", "r.yaml")
    assert found.data == {"a": 1, "b": ["c", {"d": 2}]}
    assert found.lines == {
        (): 1, ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "d"): 4,
    }  # fmt: skip
    assert read_yaml("a: \u00e9".encode("utf-16"), "r.yaml").data == {"a": "\u00e9"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_files_mean_what_other_readers_see_in_them(file):
    assert read_yaml(file.read_bytes(), str(file)).data == yaml.safe_load(file.read_bytes())


@pytest.mark.parametrize(
    ("text", "what", "place"),
    [
        ("a: 1\nb: 2\na: 3", "key `a` appears twice", "3:1"),
        ("a:\n  b: {c: 1,\n c: 2}", "key `c` appears twice", "3:2"),
        ("a: 1\n'a': 2", "key `a` appears twice", "2:1"),
        ("1: a\n'1': b", "key `1` appears twice", "2:1"),
        ("a: &x 1\nb: *x", "YAML alias `*x` is not allowed", "2:4"),
        ("a: &x [1]\nb: {<<: *x}", "merge key `<<` is not allowed", "2:5"),
        ("? &a [*a]\n: 1", "a key must be plain text", "1:3"),
        ("&a b: 1\n*a : 2", "YAML alias `*a` is not allowed", "2:1"),
        ("a: *_proj", "YAML alias `*_proj` is not allowed", "1:4"),
        ("a: *.q_proj", "not valid YAML", "1:"),
        ("a: !!python/object/apply:os.system [id]", "python/object/apply:os.system`", "1:4"),
        ("a: !!python/name:os.system", "python/name:os.system` is not allowed", "1:4"),
        ("a: 1\nb: !mine x", "YAML tag `!mine` is not allowed", "2:4"),
        ("a: ! x", "YAML tag `!` is not allowed", "1:4"),
        ("a: !!bool maybe", "2002:bool` is not allowed", "1:4"),
        ("a: !!int ''", "2002:int` is not allowed", "1:4"),
        ("a: !!float " + "1:" * 999, "2002:float` is not allowed", "1:4"),
        ("a: !!timestamp 2024-99-99", "2002:timestamp` is not allowed", "1:4"),
        ("!!str a: 1", "2002:str` is not allowed", "1:1"),
        ("a: !!set {b, c}", "2002:set` is not allowed", "1:4"),
        ("a: !!binary aGk=", "2002:binary` is not allowed", "1:4"),
        ("a: !!omap [b: 1]", "2002:omap` is not allowed", "1:4"),
        ("a: !<" + "x" * 999 + "> 1", "YAML tag `xxx", "1:4"),
        ("? [a]\n: 1", "a key must be plain text", "1:3"),
        ("{{a: 1}: 1}", "a key must be plain text", "1:2"),
        ("a: " + "1" * 5000, "the number `111", "1:4"),
        ("a: 0x" + "f" * 5000, "the number `0xff", "1:4"),
        ("a: 1e999", "the number `1e999` is too large", "1:4"),
        ("a: -1.5e+999", "the number `-1.5e+999` is too large", "1:4"),
        ('a: "x\\0"', "unprintable characters", "1:4"),
        ('a: "\\e[31m"', "unprintable characters", "1:4"),
        ('"\\e[31m": 1', "unprintable characters", "1:1"),
        ("a: |\n  two\n  lines", "unprintable characters", "1:4"),
        ("a: 1\nb: \x01", "character '\\x01' is not allowed", "2:4"),
        ("a: 1\nbc\0", "character '\\x00' is not allowed", "2:3"),
        ("a: \udc80", "character '\\udc80' is not allowed", "1:4"),
        ('a: "\ud83d\ude00"', "character '\\ud83d' is not allowed", "1:5"),
        ("a: 1\n---\nb: 2", "not valid YAML: a second document begins here", "2:1"),
        ("a: 1\n...\nb: 2", "not valid YAML", "3:1"),
        ("a:\n\t- b", "not valid YAML", "2:1"),
        ("a: [1, 2\nb: 3\n", "not valid YAML", "2:"),
        ("a: 'open", "not valid YAML", "1:"),
        ("%YAML 9.0\n---\na: 1", "not valid YAML", "1:1"),
        ("\n".join(" " * depth + "a:" for depth in range(100)), "nested too deeply", "21:21"),
        ("- 1\n" * MAX_VALUES, f"the text has over {MAX_VALUES:,} values", f"{MAX_VALUES}:3"),
    ],
)  # fmt: skip
def test_refused(scanner, text, what, place):
    error = refusal(text)
    assert what in error.what
    assert error.where.startswith(f"r.yaml:{place}")


def test_refused_as_a_whole():
    assert refusal(b"a: \xff").what == "the text is not UTF-8 (byte 3)"
    assert refusal(b"\xff\xfea", noun="card").what == "the card is not UTF-16 (byte 2)"
    for text in ("#" * (MAX_BYTES + 1), b"#" * (MAX_BYTES + 1)):
        assert refusal(text).what == "the text is over 262,144 bytes"
    assert read_yaml(b"#" * MAX_BYTES, "r.yaml").data is None


def test_half_a_pair_of_an_escape_is_refused(scanner):
    assert refusal('a: "\\ud800"').where.startswith("r.yaml:1:")
    assert refusal('a: "\\ud800"', unprintable=True).where.startswith("r.yaml:1:")
    assert refusal('"\\udc80": 1', unprintable=True).where.startswith("r.yaml:1:")


def test_values_may_be_unprintable_and_keys_never():
    assert read_yaml("a: |\n  b\n  c\n", "r.yaml", unprintable=True).data == {"a": "b\nc\n"}
    assert "unprintable" in refusal('"\\0": 1', unprintable=True).what


@pytest.mark.parametrize("text", ["a: *_proj", "a: *.q_proj"])
def test_globs_want_quotes(scanner, text):
    assert 'put quotes around text that begins with a star, such as "*_proj"' in refusal(text).fix


def test_bombs_of_aliases_and_merge_keys_are_not_built():
    lines = ["a0: &a0 [lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert refusal("\n".join(lines)).where == "r.yaml:2:10"
    merged = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30)]
    assert refusal("\n".join(["a0: &a0 {b: 1}", *merged])).where == "r.yaml:2:10"


@pytest.mark.parametrize("opening", ["[", "{", "- ", "? ", "{a: ", "[? "])
def test_nesting_bombs_are_quick(scanner, opening):
    """In calls, which are the same on any machine: fewer than the text has bytes, most of which are
    thus not even scanned."""
    text, calls = "a: " * (opening in "[{") + opening * (MAX_BYTES // len(opening) - 9), 0

    def count(*_):
        nonlocal calls
        calls += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        error = refusal(text)
    finally:
        sys.setprofile(before)
    assert "nested too deeply" in error.what or "a key must be plain text" in error.what
    assert calls < MAX_BYTES // 2


# properties

WORDS = [
    "a", "1", "1e5", "0x", "yes", "~", "<<", "=", "2024-99-99", "1:2", ".inf", "*a", "&a", "!!int",
    "!!bool", "!", "? ", ": ", "- ", "[", "]", "{", "}", ", ", "'", '"', "\\", "|", ">", "#", "%",
    "---", "...", "\n", "\n  ", "\t", "\0", "\ufeff", "\x85", "\u2028", "\udc80", "@", "`",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(WORDS), max_size=30).map("".join) | st.text(max_size=40)
PRINTABLE = st.text(max_size=20).filter(str.isprintable)
LOOKALIKES = st.from_regex(yaml_text._FLOAT, fullmatch=True) | st.sampled_from(WORDS[:11])
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | PRINTABLE
    | LOOKALIKES.filter(str.isprintable) | st.text(string.digits + "+-_.:exob", max_size=8)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PRINTABLE, inner, max_size=4),
    max_leaves=15,
).filter(lambda value: depth(value) <= MAX_DEPTH)


def depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def is_plain(value):
    if type(value) is dict:
        return all(type(key) is str and key.isprintable() for key in value) and all(
            map(is_plain, value.values())
        )
    if type(value) is list:
        return all(map(is_plain, value))
    return type(value) in {type(None), bool, int, float} or (type(value) is str and value.isprintable())


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_any_text_is_plain_data_or_refused(text):
    try:
        found = read_yaml(text, "r.yaml")
    except InputError as error:
        place, shown = error.where, str(error)
    else:
        place, shown = "r.yaml", ""
        assert is_plain(found.data)
        assert set(found.lines.values()) <= set(range(1, len(text) + 2))
    assert place.startswith("r.yaml")
    assert shown.encode().decode() == shown  # it can be printed


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_what_is_written_is_read(value):
    for text in (write_yaml(value), write_yaml(value, width=10**6)):
        found = read_yaml(text, "r.yaml").data
        assert found == value
        assert write_yaml(found) == write_yaml(value)  # 1 is not True, and 1.0 not 1
        assert yaml.safe_load(text) == value or "e" in text.lower()  # of which YAML 1.1 makes text


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_what_is_written_on_a_line_is_read(value):
    try:
        text = write_value(value)
    except ValueError:
        assert "inf" in repr(value)
        return
    found = read_yaml(text, "r.yaml").data
    assert found == value
    assert write_value(found) == text


def test_a_list_that_is_there_twice_is_written_twice():
    both = ["a"]
    assert read_yaml(write_yaml({"b": both, "c": both}), "r.yaml").data == {"b": ["a"], "c": ["a"]}


def test_one_module_reads_and_writes_yaml():
    importers = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if "yaml" in path.read_text()
        for node in ast.walk(ast.parse(path.read_bytes()))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        )
        if name.partition(".")[0] in {"yaml", "_yaml", "ruamel"}
    }  # fmt: skip
    assert importers == {"core/untrusted/yaml_text.py"}
