"""Numbers of a stored Ascend module that follow from its others, computed again in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.findings import COPY_AGAIN, Finding, failed
from quantcli.targets.ascend.types import QuantType, deq_from_stored
from quantcli.targets.layouts import StoredModule
from quantcli.targets.module_rows import ModuleReader

_BLOCK = 2**21  # bytes of codes that are summed at a time
_COUNTS = 64  # tolerance of quant_bias: the reference producer sums in float32
_DEQ = 2.0**-5  # relative: three scales are rounded to bfloat16, each to 2^-8, one of them twice
_CONDITION = 2.0**12  # of a transform: beyond it no bit of a bfloat16 input is left


def check_arithmetic(module: StoredModule) -> Iterator[Finding]:
    """Findings for quant_bias, deq_scale, scale_bias and transforms, as far as the module has them."""
    if "left_trans" in module.tensors:
        yield from _transforms(module)
    if "quant_bias" in module.tensors:
        yield from _quant_bias(module)
    if "deq_scale" in module.tensors and "weight_scale" in module.tensors:
        yield from _deq_scale(module)
    if "scale_bias" in module.tensors:
        yield from _scale_bias(module)


def _wrong(module: StoredModule, what: str) -> Finding:
    return failed("arithmetic", what, f"`{module.name}`", COPY_AGAIN)


def _transforms(module: StoredModule) -> Iterator[Finding]:
    """Kronecker transforms can be inverted, and left ones are zero outside of their blocks: on several
    devices each keeps its part of the diagonal. Numbers that are not finite are left to `values`.
    """
    layout = module.layout
    assert isinstance(layout, QuantType)
    for suffix in ("left_trans", "right_trans"):
        matrix = read_tensor(module.tensors[suffix]).double()
        if suffix == "left_trans" and layout.blocks > 1:
            side = len(matrix) // layout.blocks
            block = torch.arange(len(matrix)) // side
            outside = matrix.masked_fill(block.unsqueeze(1) == block, 0)
            if bool((outside != 0).any()):
                row, column = divmod(int((outside != 0).int().argmax()), len(matrix))
                yield _wrong(
                    module,
                    f"its left_trans is not zero at [{row}, {column}], outside of the {layout.blocks} "
                    f"blocks of {side} on its diagonal that devices keep",
                )
        if bool(torch.isfinite(matrix).all()):
            condition = float(torch.linalg.cond(matrix))
            if not condition < _CONDITION:
                yield _wrong(module, f"its {suffix} cannot be inverted: condition {condition:.3g}")


def _deq_scale(module: StoredModule) -> Iterator[Finding]:
    """deq_scale = weight_scale * input_scale, if both scales are stored."""
    parts = {s: read_tensor(module.tensors[s]) for s in ("input_scale", "weight_scale")}
    deq = deq_from_stored(read_tensor(module.tensors["deq_scale"]))[0].double()
    expected = parts["weight_scale"].double().squeeze(1) * parts["input_scale"].double()
    error = (deq / expected - 1).abs()
    if bool((error > _DEQ).any()):
        row = int(error.argmax())
        yield _wrong(
            module,
            f"deq_scale of row {row} is {deq[row]:.6g}; weight_scale and input_scale make it "
            f"{expected[row]:.6g}",
        )


def _quant_bias(module: StoredModule) -> Iterator[Finding]:
    """quant_bias = rint(bias / deq_scale - input_offset * sum of codes).

    Numbers that are not finite are left to `values`.
    """
    parts = {s: read_tensor(t) for s, t in module.tensors.items() if s != "weight"}
    if not all(bool(torch.isfinite(part).all()) for part in parts.values()):
        return
    expected = -parts["input_offset"].double() * _code_sums(module)
    if "bias" in parts:
        expected = expected + parts["bias"].double() / deq_from_stored(parts["deq_scale"])[0].double()
    error = (parts["quant_bias"].double() - expected).abs()
    tolerance = _COUNTS + expected.abs() * 2.0**-7 * ("bias" in parts)
    if bool((error > tolerance).any()) or not bool(torch.isfinite(error).all()):
        row = int(torch.where(torch.isfinite(error), error - tolerance, math.inf).argmax())
        yield _wrong(
            module,
            f"quant_bias of row {row} is {int(parts['quant_bias'][row])}; codes, input_offset and bias "
            f"make it {float(expected[row]):.0f}",
        )


def _code_sums(module: StoredModule) -> Tensor:
    """Sum over k of each row's codes, exact in float64 [n]."""
    spec = module.codes.spec
    sums = []
    with module.codes.open() as reader:
        step = max(1, _BLOCK // max(1, spec.row_nbytes))
        for start in range(0, spec.shape[0], step):
            sums.append(reader.weight(start, step).sum(1, dtype=torch.int64))
    return torch.cat(sums).double()


def _scale_bias(module: StoredModule) -> Iterator[Finding]:
    """scale_bias = 8 * sum of codes * weight_scale, over all of k or over each of its slices."""
    scale = read_tensor(module.tensors["weight_scale"]).double()
    scale_bias = read_tensor(module.tensors["scale_bias"]).double()
    n, k = module.shape
    slices = scale_bias.shape[1]
    if k % slices:
        yield _wrong(module, f"its scale_bias has {slices} slices, which do not divide {k} inputs")
        return
    step = max(8, _BLOCK // (4 * k) // 8 * 8)
    sums = []
    with ModuleReader(module) as reader:
        for start in range(0, n, step):
            block = reader.weight(start, step)
            sums.append(block.view(len(block), slices, -1).sum(2, dtype=torch.float64))
    expected = 8 * torch.cat(sums)
    tolerance = 8 * scale * (k // slices) * 2.0**-8 + scale_bias.abs() * 2.0**-6
    excess = (scale_bias - expected).abs() - tolerance
    if bool((excess > 0).any()):
        row, part = divmod(int(excess.argmax()), slices)
        of_slice = f" in slice {part}" if slices > 1 else ""
        yield _wrong(
            module,
            f"scale_bias of row {row} is {scale_bias[row, part]:.6g}{of_slice}; codes make it "
            f"{expected[row, part]:.6g}",
        )
