"""Checks that read every byte: hashes of the manifest, rules for numbers, the format's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import DTYPES, FLOATS
from quantcli.core.codes import scale_values
from quantcli.core.disk import blake3_of, sha256_of
from quantcli.core.events import Progress
from quantcli.core.findings import COPY_AGAIN, Finding, failed, noted
from quantcli.core.number_types import ELEMENTS
from quantcli.targets.base import StoredCheckpoint
from quantcli.targets.layouts import Values, stray_signs
from quantcli.verification.spread.pool import Pool
from quantcli.verification.structure import Structure

_INT4 = ELEMENTS["int4"]
_BLOCK = 2**21  # bytes of a tensor that are checked at a time
_SPAN = 64 * 2**20  # bytes of a tensor in one request


def verify_full(structure: Structure, pool: Pool, progress: Progress) -> None:
    """Hash every file and check every number; findings go to the report."""
    stored, report = structure.stored, structure.report
    assert stored is not None
    report.depths.append("full")
    files = structure.manifest["files"] if structure.manifest else {}
    tensors = stored.checkpoint.tensors.values()
    total = sum(s.spec.nbytes for s in tensors) + sum(int(e["bytes"] or 0) for e in files.values())
    progress.begin(total, len(stored.checkpoint.shards))
    requests = [*_requests(stored, files)]
    ranks = {name: rank for rank, name in enumerate(stored.checkpoint.shards)}
    order = sorted(range(len(requests)), key=lambda index: ranks.get(requests[index].file.name, -1))
    by_file = [requests[index] for index in order]  # what reads a file stands together
    common = _Stored(stored, _rules(stored))
    results = pool.each(_check, common, by_file, [each.nbytes for each in by_file], progress)
    found = dict(zip(order, results, strict=True))
    faulty: set[str] = set()  # tensors whose first fault is reported
    for index, request in enumerate(requests):
        findings = found[index]
        if isinstance(request, _Rows) and findings:
            if request.name in faulty:
                continue
            faulty.add(request.name)
        report.add(findings)
    report.count("hashes", sum(entry.get("sha256") is not None for entry in files.values()))
    report.count("values", len(stored.checkpoint.tensors))
    report.count("arithmetic", len(stored.modules))
    if files and not report.checked["hashes"]:
        report.add([noted("hashes", "the manifest holds no hashes: it was written with --no-checksum")])


@dataclass(frozen=True)
class _Stored:
    """What all requests share. rules: for numbers, by the tensor's name."""

    stored: StoredCheckpoint
    rules: Mapping[str, Values]


@dataclass(frozen=True)
class _Hash:
    """A file to hash. name, entry: of the manifest."""

    name: str
    file: Path
    nbytes: int
    entry: Mapping[str, Any]

    def check(self, common: _Stored, progress: Progress) -> list[Finding]:
        """A finding if it has another hash."""
        fast = isinstance(self.entry.get("blake3"), str)
        same = (
            blake3_of(self.file) == self.entry["blake3"]
            if fast
            else sha256_of(self.file) == self.entry["sha256"]
        )
        progress.advance(self.nbytes)
        return [] if same else [failed("hashes", _CHANGED, self.name, COPY_AGAIN)]


@dataclass(frozen=True)
class _Rows:
    """Rows [start, stop) of a tensor whose numbers are checked."""

    name: str
    file: Path
    nbytes: int
    start: int
    stop: int

    def check(self, common: _Stored, progress: Progress) -> list[Finding]:
        """A finding for the first number that the tensor's rule does not allow."""
        progress.advance(self.nbytes)
        stored = common.stored.checkpoint.tensors[self.name]
        return _scan(stored, common.rules.get(self.name), self.start, self.stop)


@dataclass(frozen=True)
class _Arithmetic:
    """A module whose numbers must follow from each other."""

    module: str
    file: Path
    nbytes = 0  # read as well by `_Rows`, which count

    def check(self, common: _Stored, progress: Progress) -> list[Finding]:
        """Findings for numbers that do not."""
        return list(common.stored.check_arithmetic(common.stored.modules[self.module]))


_Request: TypeAlias = _Hash | _Rows | _Arithmetic
_CHANGED = "file has changed since it was written"


def _requests(stored: StoredCheckpoint, files: Mapping[str, Any]) -> Iterator[_Request]:
    """All checks, in the order in which their findings are reported. files: of the manifest."""
    for name, entry in files.items():
        path = stored.checkpoint.path / name
        if entry.get("sha256") is not None and path.is_file():
            yield _Hash(name, path, path.stat().st_size, entry)
    for name, tensor in stored.checkpoint.tensors.items():
        height = tensor.spec.shape[0] if tensor.spec.shape else 1
        width = max(1, tensor.spec.row_nbytes)
        step = max(1, _SPAN // width)
        for start in range(0, max(1, height), step):
            stop = min(start + step, height)
            yield _Rows(name, tensor.file, (stop - start) * width, start, stop)
    for name, module in stored.modules.items():
        yield _Arithmetic(name, module.codes.file)


def _check(common: _Stored, request: _Request, progress: Progress) -> list[Finding]:
    return request.check(common, progress)


def _rules(stored: StoredCheckpoint) -> dict[str, Values]:
    return stored.values | {
        module.tensors[param.suffix].spec.name: param.values
        for module in stored.modules.values()
        for param in module.layout.params
        if param.suffix in module.tensors
    }


# -- values --------------------------------------------------------------------------------------


def _scan(stored: StoredTensor, rule: Values | None, begin: int, end: int) -> list[Finding]:
    """The first number in rows [begin, end) of a tensor that its rule does not allow."""
    spec = stored.spec
    if rule is None:
        rule = "finite" if spec.dtype in FLOATS else "codes"
    if rule == "bits":
        rule = "bits" if spec.dtype == "I64" else "positive"
    fault, what = _FAULTS.get(rule, (None, ""))
    if fault is None or not spec.numel or spec.dtype not in DTYPES:
        return []
    with stored.open() as reader:
        step = max(1, _BLOCK // max(1, spec.row_nbytes))
        for start in range(begin, end, step):
            block = reader.weight(start, min(step, end - start))
            place = fault(block)
            if place is not None:
                index = np.unravel_index(place, block.shape) if block.dim() else ()
                first, *rest = [int(i) for i in index] or [0]
                where = f"`{spec.name}`[{', '.join(map(str, (start + first, *rest)))}]"
                return [failed("values", f"{what}: {_show(block, place)}", where, COPY_AGAIN)]
    return []


def _show(block: Tensor, place: int) -> str:
    value = block.reshape(-1)[place]
    if block.dtype == torch.float8_e4m3fn:
        return f"code 0x{int(value.view(torch.uint8)):02X}"
    return f"{float(value):.9g}" if block.is_floating_point() else str(int(value))


def _first(bad: Tensor) -> int | None:
    return int(bad.reshape(-1).int().argmax()) if bool(bad.any()) else None


def _not_finite(block: Tensor) -> int | None:
    if block.dtype in (torch.bfloat16, torch.float16):  # the exponent's bits, without a float32 copy
        infinity = 0x7F80 if block.dtype == torch.bfloat16 else 0x7C00
        bits = block.view(torch.int16) & 0x7FFF
        return _first(bits >= infinity) if int(bits.max()) >= infinity else None
    return _first(~torch.isfinite(block))


def _not_positive(block: Tensor) -> int | None:
    block = scale_values(block)  # torch compares no floats of eight bits
    return _first(~((block > 0) & torch.isfinite(block)))


def _not_a_scale(block: Tensor) -> int | None:
    return _first(~((block != 0) & torch.isfinite(block)) | stray_signs(block))


def _not_int4(block: Tensor) -> int | None:
    least, largest = _INT4.least, _INT4.largest
    low, high = block.aminmax()
    outside = int(low) < least or int(high) > largest
    return _first((block < least) | (block > largest)) if outside else None


def _nan_code(block: Tensor) -> int | None:
    codes = block.view(torch.uint8) & 0x7F
    return _first(codes == 0x7F) if int(codes.max()) == 0x7F else None


def _bad_bits(block: Tensor) -> int | None:
    """int64 with the bits of a positive float32 in its low half."""
    whole = (block >= 0) & (block < 2**31)
    value = torch.where(whole, block, 0).to(torch.int32).view(torch.float32)
    return _first(~(whole & (value > 0) & torch.isfinite(value)))


def _bad_integer(block: Tensor) -> int | None:
    value = block.float()
    return _first(~((value >= -128) & (value <= 127) & (value.frac() == 0)))


_FAULTS: dict[str, tuple[Callable[[Tensor], int | None], str]] = {
    "int4": (_not_int4, "a code is outside of -8..7"),
    "fp8": (_nan_code, "a code is NaN"),
    "exponent": (lambda block: _first(block == 255), "an E8M0 scale is NaN"),
    "positive": (_not_positive, "a scale is not a positive number"),
    "signed": (_not_a_scale, "a scale is not a positive number"),
    "multiplier": (
        lambda block: _first(~((block > 0) & (block <= 1))),
        "a multiplier of weights is not a number above 0 and up to 1, as if it were their divisor",
    ),
    "divisor": (
        lambda block: _first(~((block >= 1) & torch.isfinite(block))),
        "a divisor of weights is not a finite number from 1 on, as if it were their multiplier",
    ),
    "bits": (_bad_bits, "an integer does not hold the bits of a positive float32"),
    "zero": (lambda block: _first(block != 0), "an offset is not zero"),
    "integer": (_bad_integer, "an offset is not an int8"),
    "finite": (_not_finite, "a number is not finite"),
    "ratio": (
        lambda block: _first(~((block > 0) & (block <= 1))),
        "a clip ratio is not in (0, 1], such as one stored before its sigmoid",
    ),
}
