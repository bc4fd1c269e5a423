"""A recipe's file: where things stand, and --set."""

import pytest

from quantcli.core.errors import InputError, MachineError
from quantcli.core.untrusted.yaml_text import MAX_BYTES
from quantcli.recipe.document import load_document


@pytest.fixture
def load(tmp_path):
    def read(text):
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_document(path)

    return read


GOOD = """\
# a comment
target: ascend
rules:
  - match: [a, "b"]
    scheme: {name: w8a16}
  - match: "*"

    optional: yes
day: 2024-01-02
numbers: [1, -2, 0x1F, 1.5, .inf, ~, off]
"""


def test_plain_data(load):
    data = load(GOOD).data
    assert data["rules"] == [
        {"match": ["a", "b"], "scheme": {"name": "w8a16"}},
        {"match": "*", "optional": True},
    ]
    assert data["day"] == "2024-01-02"
    assert data["numbers"] == [1, -2, 31, 1.5, float("inf"), None, False]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ((), 2),
        (("target",), 2),
        (("rules",), 3),
        (("rules", 0), 4),
        (("rules", 0, "match", 1), 4),
        (("rules", 0, "scheme", "name"), 5),
        (("rules", 1), 6),
        (("rules", 1, "optional"), 8),
        (("rules", 1, "no such key"), 6),
        (("numbers", 3), 10),
        (("no such block", "key"), 2),
    ],
)
def test_places(load, place, line):
    document = load(GOOD)
    assert document.where(place) == f"{document.path}:{line}"


def test_byte_order_mark_and_windows_lines(load):
    document = load(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert document.data == {"a": 1, "b": 2}
    assert document.where(("b",)).endswith(":2")


@pytest.mark.parametrize("text", ["", "# only a comment", "- a", "word", "---", "--- # comment"])
def test_what_is_not_a_mapping(load, text):
    with pytest.raises(InputError) as caught:
        load(text)
    kind = "not a mapping" if text in {"- a", "word"} else "empty"
    assert caught.value.what == f"the recipe is {kind}"
    assert caught.value.where.endswith("r.yaml:1")
    assert caught.value.fix == "it needs the keys `target` and `rules`"


def test_the_reader_refuses_with_its_place(load):
    with pytest.raises(InputError, match="key `a` appears twice") as caught:
        load("a: 1\nb: 2\na: 3")
    assert caught.value.where.endswith("r.yaml:3:1")
    assert caught.value.fix.endswith("r.yaml:1")


def test_not_a_text_file(tmp_path):
    path = tmp_path / "r.yaml"
    with pytest.raises(MachineError, match="cannot read the recipe: Is a directory"):
        load_document(tmp_path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(InputError, match="not UTF-8 \\(byte 3\\)"):
        load_document(path)
    path.write_bytes(b"#" * MAX_BYTES)
    with pytest.raises(InputError, match="recipe is empty"):
        load_document(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(InputError, match="over 262,144 bytes"):
        load_document(path)


def test_unreadable(tmp_path):
    with pytest.raises(MachineError, match="cannot read the recipe") as caught:
        load_document(tmp_path / ("x" * 300))
    assert caught.value.fix


# --set


@pytest.mark.parametrize(
    ("assignment", "place", "value"),
    [
        ("target=other", ("target",), "other"),
        ("rules.0.scheme=keep", ("rules", 0, "scheme"), "keep"),
        ("rules.0.match.1=x", ("rules", 0, "match", 1), "x"),
        ("rules.0.scheme.name=fp8", ("rules", 0, "scheme", "name"), "fp8"),
        ("rules.1.optional=false", ("rules", 1, "optional"), False),
        ("rules.1.match=[a, b]", ("rules", 1, "match"), ["a", "b"]),
        ("rules.1.match=*_proj", ("rules", 1, "match"), "*_proj"),
        ("rules.1.match=re:a=b", ("rules", 1, "match"), "re:a=b"),
        ('rules.1.match="*_proj"', ("rules", 1, "match"), "*_proj"),
        ("expect.output_gib=>= 90", ("expect", "output_gib"), ">= 90"),
        ("expect.output_gib=<= 90", ("expect", "output_gib"), "<= 90"),
        ("max_shard=5GB", ("max_shard",), "5GB"),
        ("max_shard=5", ("max_shard",), 5),
        ("max_shard=1e-5", ("max_shard",), 1e-5),  # as JSON and Python write it
        ("day=", ("day",), None),
        ("rules=[]", ("rules",), []),
    ],
)
def test_set(load, assignment, place, value):
    document = load(GOOD)
    before = dict(document.places)
    document.override(assignment)
    data = document.data
    for step in place:
        data = data[step]
    assert data == value
    assert document.where(place) == f"--set {assignment}"
    assert document.where((*place, "below")) == f"--set {assignment}"
    others = {key: where for key, where in before.items() if key[: len(place)] != place}
    assert {key: document.where(key) for key in others} == others


def test_later_set_wins(load):
    document = load(GOOD)
    document.override("rules.0.scheme=keep")
    document.override("rules.0={match: z, scheme: w8a16}")
    document.override("rules.0.match=y")
    assert document.data["rules"][0] == {"match": "y", "scheme": "w8a16"}
    assert document.where(("rules", 0, "match")) == "--set rules.0.match=y"
    assert document.where(("rules", 0, "scheme")) == "--set rules.0={match: z, scheme: w8a16}"


def test_set_opens_a_block_that_is_empty_or_absent(load):
    document = load("a: 1\nexpect:\n")
    document.override("expect.x=1")
    document.override("verify.y=2")
    assert document.data == {"a": 1, "expect": {"x": 1}, "verify": {"y": 2}}


@pytest.mark.parametrize(
    ("assignment", "what", "fix"),
    [
        ("rules\udcff=1", "`rules\\xff=1` is not UTF-8", "write it in UTF-8"),
        ("nonsense", "is not of the form KEY=VALUE", "--set target=ascend"),
        ("", "is not of the form KEY=VALUE", "--set target=ascend"),
        ("=x", "is not of the form KEY=VALUE", "--set target=ascend"),
        ("rules.2.scheme=x", "the list has no item `2`", "0 to 1"),
        ("rules.-1.scheme=x", "the list has no item `-1`", "0 to 1"),
        ("rules.²=x", "the list has no item `²`", "0 to 1"),
        ("rules." + "9" * 5000 + "=x", "the list has no item", "0 to 1"),
        ("rules.x=1", "the list has no item `x`", "0 to 1"),
        ("rulez.0.scheme=x", "no key `rulez` to set", "`rules`"),
        ("rules.0.schema.name=x", "no key `schema` to set", "`scheme`"),
        ("target.name=x", "no key `name` to set", "`target` has a single value"),
        ("target.a.b=x", "no key `a` to set", "`target` has a single value"),
        ("a.b.c=x", "no key `a` to set", None),
        ("target=!!python/name:os.system", "YAML tag", "remove"),
        ("target=[", "not valid YAML", None),
        ("target={a: 1, a: 2}", "appears twice", None),
    ],
)
def test_set_refused(load, assignment, what, fix):
    document = load(GOOD)
    with pytest.raises(InputError) as caught:
        document.override(assignment)
    assert what in caught.value.what
    assert caught.value.where.startswith(f"--set {assignment}"[:50])
    assert fix is None or fix in caught.value.fix


def test_set_refused_says_how_an_option_of_a_scheme_is_given(load):
    document = load("rules:\n  - scheme: w4a4_flatquant\n")
    with pytest.raises(InputError) as caught:
        document.override("rules.0.scheme.epochs=1")
    assignment = "rules.0.scheme={name: w4a4_flatquant, epochs: 1}"
    assert f"--set '{assignment}'" in caught.value.fix
    document.override(assignment)
    assert document.data["rules"][0]["scheme"] == {"name": "w4a4_flatquant", "epochs": 1}
