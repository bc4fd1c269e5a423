"""Changes after which a checkpoint is consistent in itself: only making it again finds them."""

from __future__ import annotations

import pytest
import torch

from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.verify.damage import Copy

LAYER = "model.layers.1"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
GATE = f"{LAYER}.mlp.gate_proj"

INT8 = {
    "dynamic": ("qwen2", "w8a8_dynamic"),
    "w8a16": ("llama", "w8a16"),
    "static": ("qwen2", "static"),
    "half static": ("llama:float16", "static"),
    "symmetric": ("llama", "symmetric"),
    "mix": ("qwen2", "mix"),
    "smooth": ("llama", "smooth"),
    "ct dynamic": ("qwen3", "ct_dynamic"),
    "ct static": ("qwen2", "ct_static"),
    "ct symmetric": ("llama", "ct_symmetric"),
    "ct w8a16": ("llama", "ct_w8a16"),
}
OTHERS = {
    "fp8": ("llama", "fp8_dynamic"),
    "ct fp8": ("llama", "ct_fp8"),
    "ct fp8 static": ("llama", "ct_fp8_static"),
    "ct w4a16": ("llama", "ct_w4a16"),
    "ct w4a8": ("llama", "ct_w4a8"),
    "int4": ("qwen3", "int4"),
}
STATIC = ("static", "half static", "symmetric", "mix", "smooth", "ct static", "ct symmetric")


def calibration_of(good):
    folder = good.path.with_name(f"{good.path.name}.calibration")
    return folder if folder.exists() else None


def examine(path, source, calibration=None):
    return verify(VerifyOptions(path, full=True, against=str(source), calibration=calibration))


# -- consistent changes -------------------------------------------------------------------------------


def codes_of(tensors, module):
    """The name of a module's codes, and how much one more is in an element."""
    return next(
        f"{module}.{suffix}"
        for suffix in ("weight_packed", "weight")
        if f"{module}.{suffix}" in tensors
    )


def raised(codes):
    """The next code, where that is not out of range; packed ones in their lowest bits."""
    if codes.dtype == torch.int32:
        return torch.where(codes & 15 < 15, codes + 1, codes - 1)
    if codes.dtype == torch.int8:
        return torch.where(codes < 7, codes + 1, codes - 1)
    bits = codes.view(torch.uint8)  # fp8: the next number of the same sign
    return torch.where(bits & 127 < 126, bits + 1, bits - 1).to(torch.uint8).view(codes.dtype)


def settle(tensors, module):
    """Make quant_bias follow from codes, offset, bias and deq_scale."""
    if f"{module}.quant_bias" in tensors:
        offset = tensors[f"{module}.input_offset"].double()
        total = -offset * tensors[f"{module}.weight"].sum(1, dtype=torch.int64).double()
        if f"{module}.bias" in tensors:
            deq = tensors[f"{module}.deq_scale"]
            deq = deq.to(torch.int32).view(torch.float32) if deq.dtype == torch.int64 else deq
            total += tensors[f"{module}.bias"].double() / deq.double()
        tensors[f"{module}.quant_bias"] = total.round().to(torch.int32)


def one_code(tensors):
    name = codes_of(tensors, Q)
    codes = tensors[name].clone()
    codes[5, 3] = raised(codes[5, 3:4])[0]
    tensors[name] = codes
    settle(tensors, Q)
    return f"`{name}`[5, 3]"


def one_row(tensors):
    name = codes_of(tensors, GATE)
    codes = tensors[name].clone()
    codes[7] = raised(codes[7])
    tensors[name] = codes
    settle(tensors, GATE)
    return f"`{name}`[7, 0]"


def scaled(tensor, by):
    """Times a factor, or by one step of a dtype for which that is too little."""
    if tensor.dtype == torch.int64:  # bits of a float32, of which float16 honours the top 19
        value = tensor.to(torch.int32).view(torch.float32) * by
        return (value.view(torch.int32) & -(2**13)).to(torch.int64)
    return (
        tensor * by
        if tensor.dtype == torch.float32
        else (tensor.view(torch.int16) + 1).view(tensor.dtype)
    )


def scales(tensors):
    """All that says a weight's scale, a thousandth more."""
    names = [f"{OUT}.{s}" for s in ("weight_scale", "weight_scale_inv", "deq_scale")]
    for name in names:
        if name in tensors:
            tensors[name] = scaled(tensors[name], 1.001)
    settle(tensors, OUT)
    return f"`{next(name for name in names if name in tensors)}`[0"


def input_scales(tensors):
    """Of q, k and v, which share it."""
    for module in (Q, K, V):
        tensors[f"{module}.input_scale"] = tensors[f"{module}.input_scale"] * 4
        if f"{module}.deq_scale" in tensors:
            tensors[f"{module}.deq_scale"] = scaled(tensors[f"{module}.deq_scale"], 4)
        settle(tensors, module)
    return f"`{Q}.input_scale`[0]"


def input_offsets(tensors):
    suffix = "input_offset" if f"{Q}.input_offset" in tensors else "input_zero_point"
    for module in (Q, K, V):
        tensors[f"{module}.{suffix}"] = tensors[f"{module}.{suffix}"] + 1
        settle(tensors, module)
    return f"`{Q}.{suffix}`[0]"


def codes_shifted(tensors):
    """Each code of a weight one more, and the zero point of its inputs as well."""
    name = codes_of(tensors, OUT)
    tensors[name] = raised(tensors[name])
    for suffix in ("input_offset", "input_zero_point"):
        if f"{OUT}.{suffix}" in tensors:
            tensors[f"{OUT}.{suffix}"] = tensors[f"{OUT}.{suffix}"] + 1
    settle(tensors, OUT)
    return f"`{name}`[0, 0]"


CHANGES = [
    *((name, change) for name in INT8 for change in (one_code, one_row, scales, codes_shifted)),
    *((name, input_scales) for name in (*STATIC, "ct fp8 static")),
    *((name, input_offsets) for name in ("static", "half static", "mix", "smooth", "ct static")),
    *((name, change) for name in OTHERS for change in (one_code, one_row, scales)),
]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=lambda v: getattr(v, "__name__", v))
def test_a_consistent_change_is_found(stock, tmp_path, name, change):
    good = stock.good(*(INT8 | OTHERS)[name])
    copy = Copy(good, tmp_path / "copy")
    with copy.tensors() as tensors:
        where = change(tensors)
    copy.seal()
    report = examine(copy.path, good.source, calibration_of(good))
    assert {e.check for e in report.errors} == {"recomputed"}, report.errors[:3]
    places = [e.where for e in report.errors]
    assert any(place.startswith(where) for place in places), places
    module = where.strip("`").rpartition(".")[0].rpartition(".")[0]
    assert all(module in place for place in places), places
