"""The safetensors header: read as hostile input, written the same way every time.

A file is 8 bytes (u64, little endian: header length), that many bytes of JSON, then the data. The
reader is stricter than the reference library: it also refuses control characters in names,
duplicate keys at every depth and unknown fields.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantcli.checkpoint.spec import DTYPES, TensorSpec
from quantcli.core.errors import InputError, MachineError
from quantcli.core.untrusted.names import tensor_name_fault
from quantcli.core.untrusted.tables import parse_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000  # bytes, the reference library's limit
MAX_TENSORS = 1_000_000
MAX_DIMS = 16
_MAX_SIZE = 2**63 - 1
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_REFETCH = "the file is damaged or not a safetensors file: fetch it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk: its spec and the absolute byte offset of its data in `file`."""

    spec: TensorSpec
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on disk."""
        return self.spec.nbytes

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that it is made of: itself, unless it is encoded."""
        return (self,)

    @property
    def kind(self) -> str:
        """The format of an encoded tensor as text; empty for any other."""
        return ""

    @property
    def in_source(self) -> StoredTensor:
        """The tensor in the model's own basis: itself, unless it is rotated."""
        return self

    @property
    def buffer_nbytes(self) -> int:
        """Bytes that a reader keeps in addition to the rows that it returns."""
        return 0

    def open(self) -> AbstractContextManager[Rows]:
        """A reader of its rows. One reader is one thread's."""
        from quantcli.checkpoint.rows import RowReader  # needs torch, which headers do not

        return RowReader(self)


class Rows(Protocol):
    """A tensor that is read by rows, however it is stored."""

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), as many as there are: [rows, ...] in the dtype of the tensor's
        spec. The next call may overwrite them, and the caller may too."""


class _Refused(Exception):
    """A header that is not to be trusted; carries the problem and, where known, the tensor."""

    def __init__(self, what: str, tensor: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.tensor = tensor


def read_header(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """Tensors of a safetensors file in the order of their data, and the `__metadata__` map.

    Raises InputError for anything that is not exactly a safetensors file: each byte of the data
    section must belong to exactly one tensor.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            if len(start) < 8:
                raise _Refused(f"file has {size} bytes; a safetensors file has at least 8")
            if start == b"version ":
                raise _Refused("file is a pointer of Git LFS, not the weights themselves")
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER:
                raise _Refused(f"header length {length} is over the limit of {MAX_HEADER} bytes")
            if length > size - 8:
                raise _Refused(f"header length {length} is past the end of the file ({size} bytes)")
            raw = file.read(length)
    except _Refused as refused:
        fix = "run `git lfs pull` in the model's folder" if "Git LFS" in refused.what else _REFETCH
        raise InputError(refused.what, where=str(path), fix=fix) from None
    except OSError as error:
        raise MachineError(f"cannot read: {error.strerror}", where=str(path)) from None
    if len(raw) != length:
        raise InputError("file shrank while it was read", where=str(path))
    if not raw.startswith(b"{"):
        what = f"header starts with {raw[:8]!r} and not with `{{`" if raw else "header is empty"
        raise InputError(what, where=str(path), fix=_REFETCH)
    table = parse_json(raw, f"{path} (header)", _REFETCH)
    try:
        return _check(path, table, size - 8 - length, 8 + length)
    except _Refused as refused:
        where = f"{path}, tensor `{refused.tensor}`" if refused.tensor else str(path)
        raise InputError(refused.what, where=where, fix=_REFETCH) from None


def _check(
    path: Path, table: Mapping[str, Any], data_size: int, data_start: int
) -> tuple[list[StoredTensor], dict[str, str]]:
    metadata = table.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _Refused(f"`__metadata__` is {reprlib.repr(metadata)}, not an object")
    if odd := [value for value in metadata.values() if not isinstance(value, str)]:
        raise _Refused(f"`__metadata__` holds {reprlib.repr(odd[0])}, not a string")
    if len(table) > MAX_TENSORS:
        raise _Refused(f"{len(table)} tensors; the limit is {MAX_TENSORS}")
    spans: list[tuple[int, int, TensorSpec]] = []
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        if fault := tensor_name_fault(name):
            raise _Refused(fault)
        spans.append(_span(name, entry))
    spans.sort(key=lambda span: (span[0], span[1]))
    position = 0
    for begin, end, spec in spans:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise _Refused(f"data at {begin} {kind} (expected {position})", spec.name)
        position = end
    if position != data_size:
        kind = "file is truncated" if position > data_size else "bytes belong to no tensor"
        raise _Refused(f"{kind}: tensors take {position} bytes, the data section has {data_size}")
    return [StoredTensor(spec, path, data_start + begin) for begin, _, spec in spans], metadata


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE  # bool is an int to isinstance


def _span(name: str, entry: Any) -> tuple[int, int, TensorSpec]:
    if not isinstance(entry, dict):
        raise _Refused(f"entry is {reprlib.repr(entry)}, not an object", name)
    if missing := sorted(_FIELDS - entry.keys()):
        raise _Refused(f"entry has no {', '.join(missing)}", name)
    if unknown := sorted(entry.keys() - _FIELDS):
        raise _Refused(f"entry has fields of no meaning: {reprlib.repr(unknown)}", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"unknown dtype {reprlib.repr(dtype)}", name)
    if not isinstance(shape, list) or not all(map(_whole, shape)):
        raise _Refused(f"shape {reprlib.repr(shape)} is not a list of whole numbers", name)
    if len(shape) > MAX_DIMS:
        raise _Refused(f"shape has {len(shape)} dimensions; the limit is {MAX_DIMS}", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise _Refused(f"data_offsets {reprlib.repr(offsets)} are not two whole numbers", name)
    begin, end = offsets
    if begin > end:
        raise _Refused(f"data_offsets [{begin}, {end}] run backwards", name)
    width = DTYPES[dtype][0]
    if math.prod(side or 1 for side in shape) * width > _MAX_SIZE:  # a 0 does not make up for it
        raise _Refused(f"{dtype} {shape} is larger than any memory", name)
    bits = math.prod(shape) * width
    if bits % 8:
        raise _Refused(f"{dtype} {shape} takes {bits} bits, which is not a whole number of bytes", name)
    if bits // 8 != end - begin:
        raise _Refused(f"{dtype} {shape} does not take {end - begin} bytes", name)
    return begin, end, TensorSpec(name, dtype, tuple(shape))


def layout(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The order of tensors in a file, in which each is aligned: by name, so that what is computed
    together stands together; in the end those of odd sizes, the widest dtype first, then by name."""
    return tuple(sorted(specs, key=lambda spec: (_odd_width(spec), spec.name)))


def _odd_width(spec: TensorSpec) -> float:
    """-inf for a tensor after which any other is aligned; else minus the bytes of its elements."""
    return -spec.itemsize if spec.nbytes % 8 else -math.inf


def encode_header(specs: Iterable[TensorSpec]) -> bytes:
    """Length, JSON and padding for `specs` in the given order; the data begins 8-byte aligned.

    The library's own writer orders metadata at random and makes files of mode 0600; this one gives
    the same bytes for the same specs. `{"format": "pt"}` is what transformers asks for.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        table[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
