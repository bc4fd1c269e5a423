"""Checks that read every byte: hashes of the manifest, rules for numbers, the format's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from quantcli.core.threads import thread_pool
from quantcli.targets.base import StoredCheckpoint
from quantcli.targets.layouts import Values, stray_signs
from quantcli.verification.structure import Structure

_INT4 = ELEMENTS["int4"]
_BLOCK = 2**21  # bytes of a tensor that are checked at a time


def verify_full(structure: Structure, workers: int, progress: Progress) -> None:
    """Hash every file and check every number; findings go to the report. Uses `workers` threads."""
    stored, report = structure.stored, structure.report
    assert stored is not None
    report.depths.append("full")
    files = structure.manifest["files"] if structure.manifest else {}
    tensors = stored.checkpoint.tensors.values()
    total = sum(s.spec.nbytes for s in tensors) + sum(int(e["bytes"] or 0) for e in files.values())
    progress.begin(total, len(stored.checkpoint.shards))
    with thread_pool(workers) as pool:
        jobs = [pool.submit(_hash, stored, name, entry, progress) for name, entry in files.items()]
        rules = _rules(stored)
        jobs += [pool.submit(_scan, s, rules.get(s.spec.name), progress) for s in tensors]
        modules = stored.modules.values()
        jobs += [pool.submit(lambda m: list(stored.check_arithmetic(m)), module) for module in modules]
        for job in jobs:
            report.add(job.result())
    report.count("hashes", sum(entry.get("sha256") is not None for entry in files.values()))
    report.count("values", len(stored.checkpoint.tensors))
    report.count("arithmetic", len(stored.modules))
    if files and not report.checked["hashes"]:
        report.add([noted("hashes", "the manifest holds no hashes: it was written with --no-checksum")])


def _hash(
    stored: StoredCheckpoint, name: str, entry: dict[str, Any], progress: Progress
) -> list[Finding]:
    path = stored.checkpoint.path / name
    if entry.get("sha256") is None or not path.is_file():
        return []
    fast = isinstance(entry.get("blake3"), str)
    same = blake3_of(path) == entry["blake3"] if fast else sha256_of(path) == entry["sha256"]
    progress.advance(path.stat().st_size)
    if same:
        return []
    return [failed("hashes", "file has changed since it was written", name, COPY_AGAIN)]


def _rules(stored: StoredCheckpoint) -> dict[str, Values]:
    return stored.values | {
        module.tensors[param.suffix].spec.name: param.values
        for module in stored.modules.values()
        for param in module.layout.params
        if param.suffix in module.tensors
    }


# -- values --------------------------------------------------------------------------------------


def _scan(stored: StoredTensor, rule: Values | None, progress: Progress) -> list[Finding]:
    """The first number of a tensor that its rule does not allow."""
    spec = stored.spec
    if rule is None:
        rule = "finite" if spec.dtype in FLOATS else "codes"
    if rule == "bits":
        rule = "bits" if spec.dtype == "I64" else "positive"
    fault, what = _FAULTS.get(rule, (None, ""))
    progress.advance(spec.nbytes)
    if fault is None or not spec.numel or spec.dtype not in DTYPES:
        return []
    with stored.open() as reader:
        step = max(1, _BLOCK // max(1, spec.row_nbytes))
        for start in range(0, spec.shape[0] if spec.shape else 1, step):
            block = reader.weight(start, step)
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
