"""Codes of 8 and 4 bits as numbers: exact, and fast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE, _NAN = 0x7F, 0x7F  # of e4m3fn: it has no infinity, and NaN is the largest code
_BIAS = 2.0**8  # between the exponents of float16 and e4m3


def fp8_values(codes: Tensor) -> Tensor:
    """float8_e4m3fn, or uint8 with its bits, in any shape -> the numbers, float32.

    The bits of an e4m3 number, moved up beside those of float16, are 2^-8 times the number, also
    where it is subnormal: a fifth of the time that torch's own conversion takes. NaN stays NaN.
    """
    bits = codes.view(torch.uint8)
    if bits.numel() and int((bits & _MAGNITUDE).amax()) == _NAN:
        return bits.view(torch.float8_e4m3fn).float()
    wide = bits.view(torch.int8).to(torch.int16)  # the sign is extended into the upper byte
    wide *= 128
    wide &= ~0x4000
    values = wide.view(torch.float16).float()
    values *= _BIAS
    return values


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
    octets = packed.reshape(-1).view(torch.uint8).view(len(packed), -1)
    if bits == 8:
        return octets
    return torch.stack([octets & 15, octets >> 4], -1).flatten(-2)
