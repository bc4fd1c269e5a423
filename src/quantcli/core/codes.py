"""Codes of 8 and 4 bits as numbers: exact, and fast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_EXPONENTS = 2.0**8  # between the exponents of float16 and e4m3


def fp8_values(codes: Tensor, scale: Tensor | None = None, columns: int = 0) -> Tensor:
    """float8_e4m3fn, or uint8 with its bits, in any shape -> the numbers, float32.

    scale: of codes [r, k], for each group of `columns`: then the numbers times it, see scale_groups.

    The bits of an e4m3 number, moved up beside those of float16, are 2^-8 times the number, also
    where it is subnormal: a fifth of the time that torch's own conversion takes. NaN stays NaN.
    """
    bits = codes.view(torch.uint8)
    # NaN is the largest code of either sign; there is no infinity
    if bits.numel() and (int(bits.amax()) == 0xFF or int(bits.view(torch.int8).amax()) == 0x7F):
        values = bits.view(torch.float8_e4m3fn).float()
        return values if scale is None else scale_groups(values, scale, columns)
    wide = bits.view(torch.int8).to(torch.int16)  # the sign is extended into the upper byte
    wide *= 128
    wide &= ~0x4000
    values = wide.view(torch.float16).float()
    if scale is None:
        return values.mul_(_EXPONENTS)
    # a power of two: the same numbers, unless a scale is beyond 2^120
    return scale_groups(values, scale * _EXPONENTS, columns)


def code_values(codes: Tensor) -> Tensor:
    """Codes of any dtype, one an element, as float32."""
    return fp8_values(codes) if codes.dtype == torch.float8_e4m3fn else codes.float()


def spread(values: Tensor, columns: int, k: int) -> Tensor:
    """[..., ceil(k / columns)] -> [..., k]: what each group of columns has, for each column."""
    return values.repeat_interleave(columns, -1)[..., :k]


def scale_groups(values: Tensor, scale: Tensor, columns: int) -> Tensor:
    """values float32 [r, k] times scale [r, ceil(k / columns)], in place: groups begin at column 0."""
    k = values.shape[1]
    if k % columns:
        values *= spread(scale, columns, k)
    else:
        values.view(len(values), -1, columns).mul_(scale.unsqueeze(-1))
    return values


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """int32 [r, w], little endian, first code in the lowest bits -> uint8 [r, w * 32 / bits].

    bits: 4 or 8.
    """
    octets = packed.reshape(-1).view(torch.uint8).view(len(packed), 4 * packed.shape[1])
    if bits == 8:
        return octets
    return torch.stack([octets & 15, octets >> 4], -1).flatten(-2)
