"""The numbers of a quantized module from one format to another: the same ones, or an error.

Codes and scales are taken over by value. Only static int8 inputs are stored differently: an engine that
holds input_scale in 16 bits multiplies inputs with r = multiplier(input_scale), so its step is 1 / r,
and knows weights by deq_scale = weight_scale / r; one that holds it in float32 divides by it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantcli.checkpoint.spec import torch_dtype
from quantcli.core.errors import InputError
from quantcli.core.numerics import Numerics, Parts, multiplier
from quantcli.planning.plan import Repack
from quantcli.schemes.arithmetic.static_int8 import deq_grid, row_parts
from quantcli.targets.base import ScalePart, Target
from quantcli.targets.layouts import stray_signs

# How far two steps of inputs may be apart, relatively, and still be one: some last bits of float32.
# At 127 steps that is a ten thousandth of a step.
_SAME_STEP = 2.0**-20
_LAST_BIT = 2.0**-23  # of a float32, relative to it, at most
WORDS = {"BF16": "bfloat16", "F16": "float16"}
_NEIGHBOURS = 8  # floats on either side of the nearest that are tried


def recode(
    item: Repack, target: Target, stored: Mapping[str, Tensor], first_row: int, bias: Tensor | None
) -> dict[str, Tensor]:
    """Stored tensors of some rows of a module, by suffix -> those of `target`.

    bias: of these rows [n]. InputError with tensor and row for a number that `target` cannot hold.
    The result was unpacked again and is equal; a global scale may be next to it, see `moved_scales`.
    """
    numerics = item.numerics
    parts = item.origin.unpack(numerics, stored)
    _sound(parts, item, target, first_row)
    if "input_offset" in parts:
        parts = _static(parts, item, target, first_row, bias)
    elif "input_scale" in parts:
        parts["input_scale"] = _cast(parts, "input_scale", item, target, 0)
    parts["weight_scale"] = _cast(parts, "weight_scale", item, target, first_row)
    packed = target.pack_module(item.module.name, numerics, parts, item.module.shape)
    again = target.unpack(numerics, packed)
    for name, tensor in again.items():
        expected = parts.get(name)
        if (
            expected is not None
            and not _equal(tensor, expected)
            and not _neighbours(name, tensor, expected)
        ):
            raise InputError(
                f"target `{target.name}` cannot hold this {name} as it is",
                where=_place(item, name, first_row),
                fix="keep the checkpoint as it is",
            )
    return packed


def _sound(parts: Parts, item: Repack, target: Target, first_row: int) -> None:
    """InputError for NaN and Inf, and for scales that are not positive.

    Negative ones pass if both formats take them.
    """
    for name in sorted(parts):
        tensor = parts[name]
        values = tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise _damaged(f"holds a {name} that is NaN or Inf", _place(item, name, first_row))
        if name.endswith("_scale") and values.is_floating_point() and bool((values <= 0).any()):
            first = (values <= 0).nonzero()[0].tolist()
            signed = item.module.layout.signed and name == "weight_scale"
            if signed and not bool(((values == 0) | stray_signs(values)).any()):
                if target.layout(item.numerics).signed:
                    continue
                raise InputError(
                    f"{name} is {float(values[tuple(first)]):g}: {target.name} is not known to take "
                    "negative scales",
                    where=_place(item, name, first_row, first[0] if first else 0),
                    fix="quantize it instead: `quantcli quantize` decodes it",
                )
            what = f"{name} is {float(values[tuple(first)]):g}: a scale is a positive number"
            raise _damaged(what, _place(item, name, first_row, first[0] if first else 0))


def _damaged(what: str, where: str) -> InputError:
    fix = "the checkpoint is damaged: copy it again, or convert the model again"
    return InputError(what, where=where, fix=fix)


def _cast(parts: Parts, name: str, item: Repack, target: Target, first_row: int) -> Tensor:
    """A scale in the dtype in which the engine will hold it. InputError if it would be rounded."""
    scale = parts[name]
    part: ScalePart = "input_scale" if name == "input_scale" else "weight_scale"
    kind = target.engine_dtype(item.numerics, part, item.module.serving_dtype)
    cast = scale.to(torch_dtype(kind))
    unlike = cast.float() != scale.float()
    rounded = (unlike.any(1) if unlike.dim() > 1 else unlike).nonzero()
    if len(rounded):
        row = int(rounded[0])
        word = WORDS.get(kind, kind)
        values = scale[row].float().flatten()
        value = float(values[(cast[row].float().flatten() != values).nonzero()[0]])
        raise InputError(
            f"{name} {value!r} would be rounded: {target.name} holds it in {word}",
            where=_place(item, name, first_row, row),
            fix=f"quantize the float model with `target: {target.name}` instead: its codes will be "
            "chosen for that scale",
        )
    return cast


def _static(parts: Parts, item: Repack, target: Target, first_row: int, bias: Tensor | None) -> Parts:
    """Static int8: the same codes, offset and steps in the parts that `target` stores."""
    numerics, serving = item.numerics, item.module.serving_dtype
    before = torch_dtype(item.origin.engine_dtype(numerics, "input_scale", serving))
    after = torch_dtype(target.engine_dtype(numerics, "input_scale", serving))
    if before == after:
        return parts
    scale, offset = parts["input_scale"].reshape(1), parts["input_offset"].reshape(1).float()
    shared = {"input_offset": offset}
    if after == torch.float32:
        _bias_is_there(parts, item, first_row, bias)
        shared["input_scale"] = _divisor(multiplier(scale.to(before)), offset, item)
        return {"weight": parts["weight"], "weight_scale": parts["weight_scale"], **shared}
    shared["input_scale"] = _multiplied(scale, after, item, target)
    r = multiplier(shared["input_scale"])
    deq = _quotient(parts["weight_scale"], r, after)
    rest = row_parts(parts["weight"], deq, bias, shared)
    return (
        {"weight": parts["weight"], "weight_scale": deq * r, **rest}
        if _equal(deq * r, parts["weight_scale"])
        else _inexact(item, target, parts["weight_scale"], deq * r, first_row)
    )


def _inexact(
    item: Repack, target: Target, scale: Tensor, engine_scale: Tensor, first_row: int
) -> Parts:
    row = int((scale != engine_scale).flatten().nonzero()[0])
    raise InputError(
        f"weight_scale {float(scale[row])!r} would be rounded: {target.name} holds deq_scale, its "
        "quotient by what inputs are multiplied with",
        where=_place(item, "weight_scale", first_row, row),
        fix=f"quantize the float model with `target: {target.name}` instead",
    )


def _divisor(r: Tensor, offset: Tensor, item: Repack) -> Tensor:
    """The float32 that is nearest to 1 / r among those with which engines keep the offset: [1].

    With an offset they find both again from the ends of the range, and cut the fraction off.
    """
    exact = (1 / r.double()).float()
    for candidate in _around(exact):
        high, low = candidate * (127 - offset), candidate * (-128 - offset)
        again = (-128 - low / ((high - low) / 255)).to(torch.int32)
        symmetric = item.numerics.input is not None and item.numerics.input.symmetric
        if symmetric or int(again) == int(offset):
            return candidate
    raise InputError(
        f"an engine that divides by input_scale {float(exact)!r} would lose input_offset {int(offset)}",
        where=f"`{item.module.name}`",
        fix="quantize the float model for that engine instead",
    )


def _multiplied(scale: Tensor, engine_dtype: torch.dtype, item: Repack, target: Target) -> Tensor:
    """The number of 16 bits, nearest to `scale`, whose multiplier makes the same step: [1].

    Often two numbers have the same multiplier; this is the one with which division, as other kernels
    of that engine do it, is nearest to it. InputError if none makes the step.
    """
    r = (1 / scale.double()).to(engine_dtype)
    if bool(((r.double() * scale.double() - 1).abs() <= _SAME_STEP).all()):
        candidates = [
            c for c in _around(scale.to(engine_dtype)) if torch.equal(multiplier(c), r.float())
        ]
        if candidates:
            return min(candidates, key=lambda c: abs(float(c) - float(scale)))
    raise InputError(
        f"input_scale {float(scale)!r} makes other steps than {target.name} can: it multiplies inputs "
        f"with numbers of 16 bits, here {float(r)!r}",
        where=_place(item, "input_scale", 0),
        fix=f"quantize the float model with `target: {target.name}` instead",
    )


def _quotient(weight_scale: Tensor, r: Tensor, serving: torch.dtype) -> Tensor:
    """deq_scale [n, 1] with deq_scale * r = weight_scale in float32, if there is one.

    Of several numbers the one with most zeros at its end.
    """
    nearest = deq_grid((weight_scale.double() / r.double()).float(), serving, up=False)
    best, zeros = nearest, torch.zeros_like(nearest)
    for candidate in _around(nearest, 2):
        bits = candidate.view(torch.int32)
        ends = (bits & -bits).float()  # the lowest one that is set
        better = (candidate * r == weight_scale) & (ends > zeros)
        if serving == torch.float16:
            better &= deq_grid(candidate, serving, up=False) == candidate
        best = torch.where(better, candidate, best)
        zeros = torch.where(better, ends, zeros)
    return best


def _around(value: Tensor, most: int = _NEIGHBOURS) -> list[Tensor]:
    """A positive number and those next to it in its dtype, the nearest first."""
    integer = torch.int32 if value.dtype == torch.float32 else torch.int16
    steps = sorted(range(-most, most + 1), key=lambda step: (abs(step), step))
    bits = value.view(integer)
    return [(bits + step).view(value.dtype) for step in steps]


def _bias_is_there(parts: Parts, item: Repack, first_row: int, bias: Tensor | None) -> None:
    """InputError if quant_bias disagrees with the float bias that is stored next to it.

    It is rounded to a step of the sum, and producers round its two terms together or one by one.
    """
    if "quant_bias" not in parts:
        return
    deq = parts["deq_scale"].double()
    offset = parts["input_offset"].double()
    total = -offset * parts["weight"].sum(-1, dtype=torch.int32).double()
    if bias is not None:
        total = total + bias.double() / deq
    stored = parts["quant_bias"].double()
    slack = 1 + total.abs() * 2.0**-20
    wrong = ((stored - total).abs() > slack).nonzero()
    if len(wrong):
        row = int(wrong[0])
        bias_text = "the stored bias gives" if bias is not None else "a module without a bias gives"
        raise InputError(
            f"quant_bias is {int(stored[row])}, but {bias_text} {float(total[row]):.0f}",
            where=_place(item, "quant_bias", first_row, row),
            fix="only the engine that it was made for can add it: keep the checkpoint as it is",
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    """By value, whatever the dtypes; codes of fp8 by their bits."""
    if a.dtype == b.dtype == torch.float8_e4m3fn:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return torch.equal(a.double(), b.double())


def _neighbours(name: str, a: Tensor, b: Tensor) -> bool:
    """Whether two global scales are next to each other."""
    if not name.endswith("_global_scale"):
        return False
    return bool(((a.double() - b.double()).abs() <= b.double() * _LAST_BIT).all())


def moved_scales(numerics: Numerics, parts: Parts, target: Target) -> list[str]:
    """The global scales among `parts`, float32 [1] each, that `target` cannot hold as they are.

    One format stores the number with which engines multiply, another its reciprocal, and some float32
    are the reciprocal of none: the engine then multiplies with a number next to it.
    """
    again = target.unpack(numerics, target.pack(numerics, parts, (0, 0)))
    names = [name for name in parts if name.endswith("_global_scale")]
    return [name for name in names if not _equal(again[name], parts[name])]


def _place(item: Repack, name: str, first_row: int, row: int = 0) -> str:
    """Where a part is stored, as text; `row` of those from `first_row` of the weight on."""
    params = [
        p
        for p in item.module.layout.params
        if name in {p.suffix, p.part} and p.suffix in item.module.tensors
    ]
    stored = item.module.tensors[params[0].suffix] if params else item.module.codes
    rows = ""
    if params and params[0].rows:
        rows = f"[{':, ' * params[0].axis}{first_row // params[0].rows + row}]"
    return f"`{stored.spec.name}`{rows} in {stored.file.name}"
