"""Codes of 4 and 8 bits in int32, as the pack-quantized format has them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.core import codes


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """int8 [n, k] -> int32 [n, k * bits / 32]; k is a multiple of 32 / bits.

    Codes are stored with 2^(bits - 1) added, value i of a row in bits [bits * i, bits * i + bits) of
    the row's little-endian string of bits.
    """
    unsigned = values.view(torch.uint8) ^ 0x80 if bits == 8 else (values + 8).view(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32)


def unpack_rows(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse: int32 [n, ceil(k * bits / 32)] -> int8 [n, k]."""
    unsigned = codes.unpack_rows(packed, bits)[:, :k]
    if bits == 8:
        return (unsigned ^ 0x80).view(torch.int8)
    return unsigned.view(torch.int8) - 8


def unpack_columns(packed: Tensor, bits: int, n: int) -> Tensor:
    """Zero points, which are packed along rows: int32 [ceil(n * bits / 32), g] -> int8 [n, g]."""
    return unpack_rows(packed.mT.contiguous(), bits, n).mT
