from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from quantcli.checkpoint.header import MAX_HEADER, MAX_TENSORS, encode_header, layout, read_header
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import Exit, InputError, MachineError
from quantcli.core.untrusted.tables import parse_json
from tests.builders import pack, tensor, write_safetensors

HEADER, TENSOR, FILE = " (header)", ", tensor `a`", ""  # what `where` says after the path
NOT_JSON = "not valid JSON: "


def length(claimed: int, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", claimed) + rest


def entry(**changes: Any) -> bytes:
    """A file of one tensor `a` of 8 bytes; None takes a field out."""
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return pack({"a": {k: v for k, v in fields.items() if v is not None}}, bytes(8))


def named(name: str) -> bytes:
    return pack({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))


def raw(text: str | bytes) -> bytes:
    return pack(text.encode() if isinstance(text, str) else text, bytes(8))


def spans(size: int, **places: list[int]) -> bytes:
    """Byte tensors at the given places of a data section of `size` bytes."""
    table = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in places.items()
    }
    return pack(table, bytes(size))


ENTRY = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'
BIG = 2**40

# content of the file, `what`, the end of `where`
MALFORMED = [
    # the length of the header
    pytest.param(b"", "file has 0 bytes; a safetensors file has at least 8", FILE, id="empty-file"),
    pytest.param(
        bytes(7), "file has 7 bytes; a safetensors file has at least 8", FILE, id="seven-bytes"
    ),
    pytest.param(length(0), "header is empty", FILE, id="length-zero"),
    pytest.param(
        length(3, b"{}"),
        "header length 3 is past the end of the file (10 bytes)",
        FILE,
        id="length-one-past-end",
    ),
    pytest.param(
        length(MAX_HEADER, b"{}"),
        "header length 100000000 is past the end of the file (10 bytes)",
        FILE,
        id="length-at-limit-past-end",
    ),
    pytest.param(
        length(MAX_HEADER + 1, b"{}"),
        "header length 100000001 is over the limit of 100000000 bytes",
        FILE,
        id="length-one-over-limit",
    ),
    pytest.param(
        length(2**63, b"{}"),
        "header length 9223372036854775808 is over the limit of 100000000 bytes",
        FILE,
        id="length-2-to-63",
    ),
    pytest.param(
        length(2**64 - 1, b"{}"),
        "header length 18446744073709551615 is over the limit of 100000000 bytes",
        FILE,
        id="length-all-ones",
    ),
    pytest.param(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n",
        "file is a pointer of Git LFS, not the weights themselves",
        FILE,
        id="git-lfs-pointer",
    ),
    # JSON
    pytest.param(
        raw(b"hello, world"), "header starts with b'hello, w' and not with `{`", FILE, id="text"
    ),
    pytest.param(raw("[]"), "header starts with b'[]' and not with `{`", FILE, id="array-on-top"),
    pytest.param(raw("null"), "header starts with b'null' and not with `{`", FILE, id="null"),
    pytest.param(
        raw(" {}"), "header starts with b' {}' and not with `{`", FILE, id="space-before-object"
    ),
    pytest.param(
        raw(b"\xef\xbb\xbf{}"),
        "header starts with b'\\xef\\xbb\\xbf{}' and not with `{`",
        FILE,
        id="byte-order-mark",
    ),
    pytest.param(
        raw("{hello}"),
        NOT_JSON + "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        HEADER,
        id="not-json",
    ),
    pytest.param(
        raw('{"a":'), NOT_JSON + "Expecting value: line 1 column 6 (char 5)", HEADER, id="cut-off"
    ),
    pytest.param(
        raw("{}!"), NOT_JSON + "Extra data: line 1 column 3 (char 2)", HEADER, id="trailing-garbage"
    ),
    pytest.param(
        raw("{} {}"), NOT_JSON + "Extra data: line 1 column 4 (char 3)", HEADER, id="two-documents"
    ),
    pytest.param(
        raw("{}\n\0"), NOT_JSON + "Extra data: line 2 column 1 (char 3)", HEADER, id="nul-padding"
    ),
    pytest.param(
        raw('{"a\n":{' + ENTRY + "}}"),
        NOT_JSON + "Invalid control character at: line 1 column 4 (char 3)",
        HEADER,
        id="raw-newline-in-a-name",
    ),
    pytest.param(raw(b'{"\xff":{}}'), "not UTF-8 (byte 2)", HEADER, id="not-utf-8"),
    pytest.param(raw(b'{"abc\xed\xa0\x80":{}}'), "not UTF-8 (byte 5)", HEADER, id="surrogate-in-utf-8"),
    pytest.param(
        raw(r'{"\ud800":{' + ENTRY + "}}"),
        "text holds half a surrogate pair",
        HEADER,
        id="surrogate-escaped-in-a-name",
    ),
    pytest.param(
        raw('{"a":' + "[" * 200_000), "JSON is nested too deeply", HEADER, id="nested-lists-bomb"
    ),
    pytest.param(
        raw('{"__metadata__":' * 100_000),
        "JSON is nested too deeply",
        HEADER,
        id="nested-objects-bomb",
    ),
    pytest.param(
        raw('{"a":{' + ENTRY + '},"a":{' + ENTRY + "}}"),
        "key 'a' stands twice",
        HEADER,
        id="duplicate-tensor",
    ),
    pytest.param(
        raw('{"a":{"dtype":"U8",' + ENTRY + "}}"),
        "key 'dtype' stands twice",
        HEADER,
        id="duplicate-field",
    ),
    pytest.param(
        raw('{"__metadata__":{},"__metadata__":{}}'),
        "key '__metadata__' stands twice",
        HEADER,
        id="duplicate-metadata",
    ),
    pytest.param(
        pack(b'{"__metadata__":{"format":"pt","format":"np"}}'),
        "key 'format' stands twice",
        HEADER,
        id="duplicate-key-in-metadata",
    ),
    pytest.param(
        raw('{"a":{"dtype":"F32","shape":[' + "9" * 500_000 + '],"data_offsets":[0,8]}}'),
        "a number has 500000 digits",
        HEADER,
        id="huge-integer",
    ),
    # names
    pytest.param(named(""), "a tensor has an empty name", FILE, id="name-empty"),
    pytest.param(named("a\0b"), "tensor name `a\\x00b` has control characters", FILE, id="name-nul"),
    pytest.param(named("a\nb"), "tensor name `a\\nb` has control characters", FILE, id="name-newline"),
    pytest.param(
        named("\x1b[31m"),
        "tensor name `\\x1b[31m` has control characters",
        FILE,
        id="name-escape-code",
    ),
    pytest.param(
        named("a\u202eb"),
        "tensor name `a\\u202eb` has control characters",
        FILE,
        id="name-right-to-left-override",
    ),
    pytest.param(
        named("x" * 513),
        f"tensor name starting '{'x' * 40}' is over 512 bytes",
        FILE,
        id="name-over-long",
    ),
    pytest.param(
        named("é" * 257),
        f"tensor name starting '{'é' * 40}' is over 512 bytes",
        FILE,
        id="name-over-long-in-bytes",
    ),
    pytest.param(
        named("\0" * 100_000),
        "tensor name `" + r"\x00" * 50 + "` has control characters",
        FILE,
        id="name-long-and-unprintable",
    ),
    # entries
    pytest.param(pack({"a": None}), "entry is None, not an object", TENSOR, id="entry-null"),
    pytest.param(pack({"a": []}), "entry is [], not an object", TENSOR, id="entry-list"),
    pytest.param(pack({"a": "F32"}), "entry is 'F32', not an object", TENSOR, id="entry-string"),
    pytest.param(raw('{"a":NaN}'), "entry is nan, not an object", TENSOR, id="entry-nan"),
    pytest.param(pack({"a": {}}), "entry has no data_offsets, dtype, shape", TENSOR, id="entry-empty"),
    pytest.param(entry(dtype=None), "entry has no dtype", TENSOR, id="dtype-missing"),
    pytest.param(entry(shape=None), "entry has no shape", TENSOR, id="shape-missing"),
    pytest.param(entry(data_offsets=None), "entry has no data_offsets", TENSOR, id="offsets-missing"),
    pytest.param(
        entry(strides=[1]),
        "entry has fields of no meaning: ['strides']",
        TENSOR,
        id="field-unknown",
    ),
    pytest.param(entry(dtype="F128"), "unknown dtype 'F128'", TENSOR, id="dtype-unknown"),
    pytest.param(entry(dtype="f32"), "unknown dtype 'f32'", TENSOR, id="dtype-small-letters"),
    pytest.param(entry(dtype=32), "unknown dtype 32", TENSOR, id="dtype-number"),
    pytest.param(entry(dtype=["F32"]), "unknown dtype ['F32']", TENSOR, id="dtype-list"),
    pytest.param(
        entry(dtype="F" * 100_000),
        "unknown dtype 'FFFFFFFFFFFF...FFFFFFFFFFFFF'",
        TENSOR,
        id="dtype-over-long",
    ),
    pytest.param(
        raw('{"a":{"dtype":' + "[" * 500 + "]" * 500 + ',"shape":[2],"data_offsets":[0,8]}}'),
        "unknown dtype [[[[[[[...]]]]]]]",
        TENSOR,
        id="dtype-nested",
    ),
    pytest.param(entry(shape=2), "shape 2 is not a list of whole numbers", TENSOR, id="shape-number"),
    pytest.param(
        entry(shape="2"), "shape '2' is not a list of whole numbers", TENSOR, id="shape-string"
    ),
    pytest.param(
        entry(shape={"0": 2}),
        "shape {'0': 2} is not a list of whole numbers",
        TENSOR,
        id="shape-object",
    ),
    pytest.param(
        entry(shape=[-2]), "shape [-2] is not a list of whole numbers", TENSOR, id="side-negative"
    ),
    pytest.param(
        entry(shape=[2.0]), "shape [2.0] is not a list of whole numbers", TENSOR, id="side-float"
    ),
    pytest.param(
        entry(dtype="F64", shape=[True]),
        "shape [True] is not a list of whole numbers",
        TENSOR,
        id="side-bool",
    ),
    pytest.param(
        entry(shape=["2"]), "shape ['2'] is not a list of whole numbers", TENSOR, id="side-string"
    ),
    pytest.param(
        entry(shape=[[2]]), "shape [[2]] is not a list of whole numbers", TENSOR, id="side-list"
    ),
    pytest.param(
        pack(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "shape [-0.0] is not a list of whole numbers",
        TENSOR,
        id="side-minus-zero",
    ),
    pytest.param(
        entry(shape=[2**63]),
        "shape [9223372036854775808] is not a list of whole numbers",
        TENSOR,
        id="side-over-63-bits",
    ),
    pytest.param(
        entry(shape=[2**63 - 1]),
        "F32 [9223372036854775807] is larger than any memory",
        TENSOR,
        id="side-of-63-bits",
    ),
    pytest.param(
        entry(shape=[1] * 16 + [2]),
        "shape has 17 dimensions; the limit is 16",
        TENSOR,
        id="too-many-dimensions",
    ),
    pytest.param(
        entry(shape=[BIG, BIG]),
        f"F32 [{BIG}, {BIG}] is larger than any memory",
        TENSOR,
        id="product-overflows",
    ),
    pytest.param(
        entry(shape=[2**32, 2**32, 2]),
        "F32 [4294967296, 4294967296, 2] is larger than any memory",
        TENSOR,
        id="product-wraps-to-a-small-number",
    ),
    pytest.param(
        pack({"a": {"dtype": "F32", "shape": [BIG, BIG, 0], "data_offsets": [0, 0]}}),
        f"F32 [{BIG}, {BIG}, 0] is larger than any memory",
        TENSOR,
        id="product-overflow-hidden-by-zero",
    ),
    pytest.param(
        entry(data_offsets=8),
        "data_offsets 8 are not two whole numbers",
        TENSOR,
        id="offsets-number",
    ),
    pytest.param(
        entry(data_offsets={"0": 0}),
        "data_offsets {'0': 0} are not two whole numbers",
        TENSOR,
        id="offsets-object",
    ),
    pytest.param(
        entry(data_offsets=[8]),
        "data_offsets [8] are not two whole numbers",
        TENSOR,
        id="offsets-one",
    ),
    pytest.param(
        entry(data_offsets=[0, 8, 8]),
        "data_offsets [0, 8, 8] are not two whole numbers",
        TENSOR,
        id="offsets-three",
    ),
    pytest.param(
        entry(data_offsets=[-8, 0]),
        "data_offsets [-8, 0] are not two whole numbers",
        TENSOR,
        id="offset-negative",
    ),
    pytest.param(
        entry(data_offsets=[0, 8.0]),
        "data_offsets [0, 8.0] are not two whole numbers",
        TENSOR,
        id="offset-float",
    ),
    pytest.param(
        entry(data_offsets=[False, 8]),
        "data_offsets [False, 8] are not two whole numbers",
        TENSOR,
        id="offset-bool",
    ),
    pytest.param(
        entry(data_offsets=["0", "8"]),
        "data_offsets ['0', '8'] are not two whole numbers",
        TENSOR,
        id="offset-string",
    ),
    pytest.param(
        entry(data_offsets=[0, 2**64]),
        "data_offsets [0, 18446744073709551616] are not two whole numbers",
        TENSOR,
        id="offset-over-64-bits",
    ),
    pytest.param(
        entry(data_offsets=[8, 0]),
        "data_offsets [8, 0] run backwards",
        TENSOR,
        id="offsets-backwards",
    ),
    pytest.param(entry(shape=[1]), "F32 [1] does not take 8 bytes", TENSOR, id="shape-too-small"),
    pytest.param(entry(shape=[3]), "F32 [3] does not take 8 bytes", TENSOR, id="shape-too-large"),
    pytest.param(entry(shape=[]), "F32 [] does not take 8 bytes", TENSOR, id="scalar-of-two-values"),
    pytest.param(entry(dtype="F16"), "F16 [2] does not take 8 bytes", TENSOR, id="dtype-too-narrow"),
    pytest.param(entry(shape=[0]), "F32 [0] does not take 8 bytes", TENSOR, id="bytes-for-no-values"),
    pytest.param(
        entry(dtype="F4", shape=[17]),
        "F4 [17] takes 68 bits, which is not a whole number of bytes",
        TENSOR,
        id="four-bits-odd-count",
    ),
    # the place of the data
    pytest.param(
        spans(8, b=[0, 2], a=[4, 8]),
        "data at 4 leaves a gap before it (expected 2)",
        TENSOR,
        id="gap",
    ),
    pytest.param(
        spans(8, a=[1, 8]),
        "data at 1 leaves a gap before it (expected 0)",
        TENSOR,
        id="first-not-at-zero",
    ),
    pytest.param(
        spans(8, b=[0, 6], a=[4, 8]),
        "data at 4 overlaps the tensor before it (expected 6)",
        TENSOR,
        id="overlap",
    ),
    pytest.param(
        spans(8, b=[0, 8], a=[0, 8]),
        "data at 0 overlaps the tensor before it (expected 8)",
        TENSOR,
        id="two-in-one-place",
    ),
    pytest.param(
        spans(8, b=[0, 8], a=[3, 3]),
        "data at 3 overlaps the tensor before it (expected 8)",
        TENSOR,
        id="empty-tensor-inside-another",
    ),
    pytest.param(
        spans(7, a=[0, 8]),
        "file is truncated: tensors take 8 bytes, the data section has 7",
        FILE,
        id="truncated",
    ),
    pytest.param(
        spans(0, a=[0, 2**50]),
        f"file is truncated: tensors take {2**50} bytes, the data section has 0",
        FILE,
        id="petabyte-tensor",
    ),
    pytest.param(
        spans(9, a=[0, 8]),
        "bytes belong to no tensor: tensors take 8 bytes, the data section has 9",
        FILE,
        id="trailing-byte",
    ),
    pytest.param(
        pack({}, bytes(4)),
        "bytes belong to no tensor: tensors take 0 bytes, the data section has 4",
        FILE,
        id="data-without-tensors",
    ),
    # __metadata__
    pytest.param(
        pack({"__metadata__": []}), "`__metadata__` is [], not an object", FILE, id="metadata-list"
    ),
    pytest.param(
        pack({"__metadata__": None}),
        "`__metadata__` is None, not an object",
        FILE,
        id="metadata-null",
    ),
    pytest.param(
        pack({"__metadata__": {"step": 1}}),
        "`__metadata__` holds 1, not a string",
        FILE,
        id="metadata-number",
    ),
    pytest.param(
        pack({"__metadata__": {"format": "pt", "more": {}}}),
        "`__metadata__` holds {}, not a string",
        FILE,
        id="metadata-nested",
    ),
    pytest.param(
        pack(rb'{"__metadata__":{"format":"\udc00"}}'),
        "text holds half a surrogate pair",
        HEADER,
        id="metadata-surrogate",
    ),
]
TABLE = pytest.mark.parametrize(("content", "what", "place"), MALFORMED)

# What the reference library reads and this reader refuses.
STRICTER = {
    "name-empty", "name-nul", "name-newline", "name-escape-code", "name-right-to-left-override",
    "name-over-long", "name-over-long-in-bytes", "name-long-and-unprintable",
    "duplicate-tensor", "duplicate-key-in-metadata", "field-unknown", "too-many-dimensions",
    "metadata-null",
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@TABLE
def test_malformed_is_refused(file: Path, content: bytes, what: str, place: str) -> None:
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert caught.value.what == what
    assert caught.value.where == f"{file}{place}"
    assert caught.value.fix is not None
    assert caught.value.fix.endswith(("fetch it again", "run `git lfs pull` in the model's folder"))
    assert caught.value.exit_code == Exit.FIX_INPUT == 2


def test_malformed_messages_are_distinct_and_short() -> None:
    said = [case.values[1] for case in MALFORMED]
    twice = {"JSON is nested too deeply", "text holds half a surrogate pair"}
    assert len(MALFORMED) >= 90
    assert {what for what in said if said.count(what) > 1} == twice
    assert max(map(len, said)) < 250


def test_the_reference_library_refuses_the_same_but_for_a_few(file: Path) -> None:
    accepted = set()
    for case in MALFORMED:
        file.write_bytes(case.values[0])
        try:
            with safe_open(file, framework="np"):
                accepted.add(case.id)
        except (SafetensorError, OSError):
            continue
    assert accepted <= STRICTER  # all else is refused by both


def test_malformed_is_cheap(file: Path) -> None:
    tracemalloc.start()
    try:
        for case in MALFORMED:
            file.write_bytes(case.values[0])
            tracemalloc.reset_peak()
            with pytest.raises(InputError):
                read_header(file)
            assert tracemalloc.get_traced_memory()[1] < 30_000_000, case.id
    finally:
        tracemalloc.stop()


def test_a_header_over_the_limit_is_not_read_though_the_file_is_long_enough(file: Path) -> None:
    file.write_bytes(length(MAX_HEADER + 1))
    os.truncate(file, 2 * MAX_HEADER)  # a sparse file
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="over the limit of 100000000 bytes"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_too_many_tensors(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TENSORS == 10**6
    monkeypatch.setattr("quantcli.checkpoint.header.MAX_TENSORS", 2)
    file.write_bytes(spans(3, a=[0, 1], b=[1, 2], c=[2, 3]))
    with pytest.raises(InputError, match=r"^3 tensors; the limit is 2\n") as caught:
        read_header(file)
    assert caught.value.where == str(file)


@pytest.mark.parametrize(
    ("name", "what"),
    [("absent", "cannot read: No such file or directory"), ("", "cannot read: Is a directory")],
)
def test_an_unreadable_file_is_the_machines_fault(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(MachineError) as caught:
        read_header(tmp_path / name)
    assert (caught.value.what, caught.value.where) == (what, str(tmp_path / name))
    assert caught.value.exit_code == Exit.FIX_MACHINE == 3


def test_reads_what_the_reference_library_reads(file: Path) -> None:
    held = {
        "wide": tensor("F64", 3, fill=1),
        "scalar": tensor("F32", fill=2),
        "model.layers.0.weight": tensor("F32", 2, 3, fill=3),
        "größe/重み": tensor("I16", 5, fill=4),
        "none": tensor("U8", 0, 7),
        "odd": tensor("U8", 3, fill=5),
        "flags": tensor("BOOL", 2, fill=1),
    }
    write_safetensors(file, held)
    stored, metadata = read_header(file)
    content = file.read_bytes()
    assert metadata == {"format": "pt"}
    with safe_open(file, framework="np") as reference:
        assert reference.metadata() == metadata
        assert sorted(reference.keys()) == sorted(s.spec.name for s in stored)
        for found in stored:
            spec = found.spec
            view = reference.get_slice(spec.name)
            assert (spec.dtype, list(spec.shape)) == (view.get_dtype(), view.get_shape())
            data = reference.get_tensor(spec.name).tobytes()
            assert content[found.offset : found.offset + spec.nbytes] == data == held[spec.name][2]
            assert found.file == file


def test_tensors_come_in_the_order_of_their_data(file: Path) -> None:
    file.write_bytes(spans(6, c=[4, 6], a=[2, 4], b=[0, 2], z=[2, 2]))
    stored, _ = read_header(file)
    assert [s.spec.name for s in stored] == ["b", "z", "a", "c"]
    start = file.stat().st_size - 6
    assert [s.offset - start for s in stored] == [0, 2, 2, 4]


@pytest.mark.parametrize("header", [b"{}", b"{}  \n\t\r", b'{"__metadata__":{}}'])
def test_a_file_without_tensors(file: Path, header: bytes) -> None:
    file.write_bytes(pack(header))
    assert read_header(file) == ([], {})


def test_the_longest_name_and_the_most_dimensions_pass(file: Path) -> None:
    write_safetensors(file, {"x" * 512: tensor("U8", *[1] * 15, 2)})
    (stored,), _ = read_header(file)
    assert (len(stored.spec.name), stored.spec.shape) == (512, (1,) * 15 + (2,))


def test_layout_goes_by_name_and_puts_odd_sizes_last_the_widest_first() -> None:
    odd = [("b", "U8"), ("f", "F4"), ("a", "U8"), ("c", "F32"), ("e", "BF16")]
    names = [("g.weight", "I8"), ("g.scale", "F32"), ("d", "I64"), ("h", "BF16"), ("empty", "U8")]
    specs = [TensorSpec(name, dtype, (3 if dtype != "F4" else 2,)) for name, dtype in odd]
    specs += [TensorSpec(name, dtype, (8 * (name != "empty"),)) for name, dtype in names]
    ordered = [spec.name for spec in layout(specs)]
    assert ordered == ["d", "empty", "g.scale", "g.weight", "h", "c", "e", "a", "b", "f"]


def test_encode_header_gives_these_bytes() -> None:
    specs = [TensorSpec("a", "BF16", (2, 3)), TensorSpec("ü", "I8", ())]
    header = encode_header(specs)
    text = (
        '{"__metadata__":{"format":"pt"},'
        '"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        '"ü":{"dtype":"I8","shape":[],"data_offsets":[12,13]}}'
    )
    padded = text.encode() + b" " * (-len(text.encode()) % 8)
    assert header == struct.pack("<Q", len(padded)) + padded
    assert len(header) % 8 == 0


def test_the_reference_library_reads_what_we_write(file: Path) -> None:
    specs = layout([TensorSpec("a", "U8", (3,)), TensorSpec("b", "F32", (1, 2))])
    file.write_bytes(encode_header(specs) + bytes(range(11)))
    with safe_open(file, framework="np") as reference:
        assert reference.metadata() == {"format": "pt"}
        assert reference.get_tensor("a").tolist() == [8, 9, 10]
        assert reference.get_tensor("b").tobytes() == bytes(range(8))


def test_json_of_a_model_may_hold_infinity_big_numbers_and_pairs_of_surrogates() -> None:
    text = r'{"limit":[0.0,Infinity],"length":1000000000000000019884624838656,"face":"\ud83d\ude00"}'
    assert parse_json(text.encode(), "config.json") == {
        "limit": [0.0, float("inf")],
        "length": 1000000000000000019884624838656,
        "face": "\U0001f600",
    }


def test_json_problems_name_the_place_they_were_given() -> None:
    with pytest.raises(InputError) as caught:
        parse_json(json.dumps({"a": "\ud800"}).encode(), "config.json")
    assert str(caught.value) == (
        "text holds half a surrogate pair\n  --> config.json\n  fix: fetch the file again"
    )
