from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from quantcli.checkpoint.header import encode_header, layout, read_header
from quantcli.checkpoint.spec import DTYPES, TensorSpec
from quantcli.core.errors import QuantError
from tests.builders import pack

FEW = settings(
    derandomize=True,
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MANY = settings(FEW, max_examples=600)

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.isprintable)
sides = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def even(spec: TensorSpec) -> TensorSpec:
    """4-bit values only come in pairs."""
    return TensorSpec(spec.name, spec.dtype, (*spec.shape, 2)) if spec.dtype == "F4" else spec


specs = st.builds(TensorSpec, names, st.sampled_from(sorted(DTYPES)), sides).map(even)
tables = st.lists(specs, max_size=8, unique_by=lambda spec: spec.name)


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "model.safetensors"


@FEW
@given(tables)
def test_what_was_written_is_read_back(file: Path, table: list[TensorSpec]) -> None:
    ordered = layout(table)
    header = encode_header(ordered)
    file.write_bytes(header + bytes(sum(spec.nbytes for spec in ordered)))
    stored, metadata = read_header(file)
    # Tensors without a byte share their place with the next one.
    assert sorted(map(repr, (s.spec for s in stored))) == sorted(map(repr, ordered))
    assert metadata == {"format": "pt"}
    offsets = {s.spec.name: s.offset for s in stored}
    position = len(header)
    for spec in ordered:
        assert offsets[spec.name] == position
        position += spec.nbytes


@FEW
@given(tables)
def test_layout_aligns_each_tensor(table: list[TensorSpec]) -> None:
    ordered = layout(table)
    assert sorted(map(repr, ordered)) == sorted(map(repr, table))
    assert ordered == layout(reversed(table))
    position = len(encode_header(ordered))
    for spec in ordered:
        assert position % max(spec.itemsize, 1) == 0
        position += spec.nbytes


def check_both_read(file: Path, content: bytes) -> None:
    """Whatever `content` is: refused with a QuantError, or read just as the library reads it."""
    file.write_bytes(content)
    try:
        stored, metadata = read_header(file)
    except QuantError:
        return
    try:
        with safe_open(file, framework="np") as reference:
            views = {name: reference.get_slice(name) for name in reference.keys()}  # noqa: SIM118
            shapes = {n: (v.get_dtype(), tuple(v.get_shape())) for n, v in views.items()}
            assert shapes == {s.spec.name: (s.spec.dtype, s.spec.shape) for s in stored}
            assert (reference.metadata() or {}) == metadata
    except SafetensorError as error:
        raise AssertionError(f"only the library refuses {content!r}") from error


TEXT = (
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"U8","shape":[0,3],"data_offsets":[8,8]},'
    b'"c":{"dtype":"F4","shape":[2,4],"data_offsets":[8,12]}}'
)
GOOD = pack(TEXT, bytes(range(12)))
PIECES = [
    b"0", b"-0", b"1e1", b"0.0", b"18446744073709551616", b"00", b"null", b"true", b"NaN", b"[]",
    b"{}", b'"', b"\\", b"\\u0061", b"\\ud800", b"\\ud83d\\ude00", b",", b":", b"\n", b"\0", b"\xff",
    b"\xc3\xa9", b"\xef\xbb\xbf", b"__metadata__", b"F64", b'"x":1,', b" ",
]  # fmt: skip


def test_the_header_that_is_spoilt_below_is_good(file: Path) -> None:
    file.write_bytes(GOOD)
    assert [s.spec.name for s in read_header(file)[0]] == ["a", "b", "c"]
    check_both_read(file, GOOD)


@MANY
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=3))
def test_flipped_bytes(file: Path, flips: list[tuple[int, int]]) -> None:
    spoilt = bytearray(GOOD)
    for place, value in flips:
        spoilt[place] = value
    check_both_read(file, bytes(spoilt))


def test_every_truncation_is_refused(file: Path) -> None:
    for size in range(len(GOOD)):
        file.write_bytes(GOOD[:size])
        with pytest.raises(QuantError):
            read_header(file)


@MANY
@given(st.integers(0, len(TEXT)), st.integers(0, 6), st.sampled_from(PIECES))
def test_spliced_json(file: Path, place: int, cut: int, piece: bytes) -> None:
    check_both_read(file, pack(TEXT[:place] + piece + TEXT[place + cut :], bytes(range(12))))


@FEW
@given(st.binary(max_size=64))
def test_random_bytes(file: Path, content: bytes) -> None:
    check_both_read(file, content)
    check_both_read(file, pack(content))
    check_both_read(file, pack(b"{" + content))
