"""Every byte read: hashes against the manifest, and numbers that no sound checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import DTYPES, FLOATS
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.disk import blake3_of, sha256_of
from quantcli.core.events import Progress
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.threads import thread_pool
from quantcli.targets.base import StoredCheckpoint
from quantcli.targets.layouts import StoredModule, Values
from quantcli.targets.module_rows import ModuleReader
from quantcli.verification.structure import Structure

_BLOCK = 2**21  # bytes that are looked at together
_COUNTS = 64  # by which quant_bias may be off: the reference producer sums in float32
_DEQ = 2.0**-5  # relative: three scales are rounded to bfloat16, each to 2^-8, one of them twice
_CONDITION = 2.0**12  # of a transform: beyond it bfloat16 inputs keep no bit
_AGAIN = "copy the checkpoint again, or convert the model again"


def verify_full(structure: Structure, workers: int, progress: Progress) -> None:
    """Hash every file and look at every number; findings go to the report."""
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
        jobs += [pool.submit(_arithmetic, module) for module in stored.modules.values()]
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
    return [failed("hashes", "file has changed since it was written", name, _AGAIN)]


def _rules(stored: StoredCheckpoint) -> dict[str, Values]:
    return {
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
                return [failed("values", f"{what}: {_show(block, place)}", where, _AGAIN)]
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
    return _first(~((block > 0) & torch.isfinite(block)))


def _not_int4(block: Tensor) -> int | None:
    low, high = block.aminmax()
    return _first((block < -8) | (block > 7)) if int(low) < -8 or int(high) > 7 else None


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
    "bits": (_bad_bits, "a deq_scale does not hold the bits of a positive float32"),
    "zero": (lambda block: _first(block != 0), "an offset of weights is not zero"),
    "integer": (_bad_integer, "an input_offset is not an int8"),
    "finite": (_not_finite, "a number is not finite"),
    "ratio": (
        lambda block: _first(~((block > 0) & (block <= 1))),
        "a clip ratio is not in (0, 1], such as one stored before its sigmoid",
    ),
}


# -- numbers that follow from others -----------------------------------------------------------------


def _arithmetic(module: StoredModule) -> list[Finding]:
    return list(_follows(module))


def _follows(module: StoredModule) -> Iterator[Finding]:
    names = module.tensors
    where = f"`{module.name}`"
    if "left_trans" in names:
        for suffix in ("left_trans", "right_trans"):
            matrix = read_tensor(names[suffix]).double()
            if not bool(torch.isfinite(matrix).all()):
                continue  # told by its values
            condition = float(torch.linalg.cond(matrix))
            if not condition < _CONDITION:
                what = f"its {suffix} cannot be inverted: condition {condition:.3g}"
                yield failed("arithmetic", what, where, _AGAIN)
    if "quant_bias" in names:
        yield from _quant_bias(module)
    if "deq_scale" in names and "weight_scale" in names:
        yield from _deq_scale(module)
    if "scale_bias" in names:
        yield from _scale_bias(module)


def _deq_scale(module: StoredModule) -> Iterator[Finding]:
    """deq_scale = weight_scale * input_scale, where both scales of weights are stored."""
    parts = {s: read_tensor(module.tensors[s]) for s in ("input_scale", "weight_scale")}
    deq = _as_float(read_tensor(module.tensors["deq_scale"])).double()
    expected = parts["weight_scale"].double().squeeze(1) * parts["input_scale"].double()
    off = (deq / expected - 1).abs()
    if bool((off > _DEQ).any()):
        row = int(off.argmax())
        what = (
            f"deq_scale of row {row} is {deq[row]:.6g}; weight_scale and input_scale make it "
            f"{expected[row]:.6g}"
        )
        yield failed("arithmetic", what, f"`{module.name}`", _AGAIN)


def _as_float(deq: Tensor) -> Tensor:
    """Float32 numbers of which int64 ones hold the bits."""
    return deq.to(torch.int32).view(torch.float32) if deq.dtype == torch.int64 else deq


def _code_sums(module: StoredModule) -> Tensor:
    """Sum over k of each row's codes, exact in float64 [n]."""
    spec = module.codes.spec
    sums = []
    with module.codes.open() as reader:
        step = max(1, _BLOCK // max(1, spec.row_nbytes))
        for start in range(0, spec.shape[0], step):
            sums.append(reader.weight(start, step).sum(1, dtype=torch.int64))
    return torch.cat(sums).double()


def _quant_bias(module: StoredModule) -> Iterator[Finding]:
    """quant_bias = rint(bias / deq_scale - input_offset * sum of codes)."""
    parts = {s: read_tensor(t) for s, t in module.tensors.items() if s != "weight"}
    if not all(bool(torch.isfinite(part).all()) for part in parts.values()):
        return  # told by its values
    deq = _as_float(parts["deq_scale"])
    expected = -parts["input_offset"].double() * _code_sums(module)
    if "bias" in parts:
        expected = expected + parts["bias"].double() / deq.double()
    off = (parts["quant_bias"].double() - expected).abs()
    allowed = _COUNTS + expected.abs() * 2.0**-7 * ("bias" in parts)
    if bool((off > allowed).any()) or not bool(torch.isfinite(off).all()):
        row = int(torch.where(torch.isfinite(off), off - allowed, math.inf).argmax())
        yield failed(
            "arithmetic",
            f"quant_bias of row {row} is {int(parts['quant_bias'][row])}; codes, input_offset and bias "
            f"make it {float(expected[row]):.0f}",
            f"`{module.name}`",
            _AGAIN,
        )


def _scale_bias(module: StoredModule) -> Iterator[Finding]:
    """scale_bias = 8 * sum of codes * weight_scale, over all of k or over each of its slices."""
    scale = read_tensor(module.tensors["weight_scale"]).double()
    stored = read_tensor(module.tensors["scale_bias"]).double()
    n, k = module.shape
    slices = stored.shape[1]
    if k % slices:
        what = f"its scale_bias has {slices} slices, which do not divide {k} inputs"
        yield failed("arithmetic", what, f"`{module.name}`", _AGAIN)
        return
    step = max(8, _BLOCK // (4 * k) // 8 * 8)
    sums = []
    with ModuleReader(module) as reader:
        for start in range(0, n, step):
            block = reader.weight(start, step)
            parts = block.view(len(block), slices, -1)
            sums.append(parts.sum(2, dtype=torch.float64))
    expected = 8 * torch.cat(sums)
    off = (stored - expected).abs() - 8 * scale * (k // slices) * 2.0**-8 - stored.abs() * 2.0**-6
    if bool((off > 0).any()):
        row, part = divmod(int(off.argmax()), slices)
        what = f"scale_bias of row {row} is {stored[row, part]:.6g}"
        what += f" in slice {part}" if slices > 1 else ""
        what += f"; codes make it {expected[row, part]:.6g}"
        yield failed("arithmetic", what, f"`{module.name}`", _AGAIN)
