"""Values of stored codes and scales as float32: exact, and fast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.core.kernels import tensors as kernels
from quantcli.core.number_types import ElementType

_EXPONENTS = 2.0**8  # float16 has an exponent bias of 15, e4m3 one of 7


def fp8_values(codes: Tensor, scale: Tensor | None = None, columns: int = 0) -> Tensor:
    """The values of e4m3 codes, float32, in the shape of `codes`.

    codes: float8_e4m3fn, or uint8 with the same bits, in any shape.
    scale: for codes [r, k], a scale for each group of `columns` columns; the values are multiplied
           with it, see `scale_groups`.

    In torch the bits of an e4m3 number, shifted to where float16 has them, are a float16 number 2^-8
    times as large, also if it is subnormal. This takes a fifth of the time of torch's own conversion.
    NaN stays NaN.
    """
    compiled = kernels.decode(codes, "fp8_e4m3", scale, columns)
    if compiled is not None:
        return compiled
    bits = codes.view(torch.uint8)
    # NaN is the largest code of either sign; e4m3 has no infinity
    if bits.numel() and (int(bits.amax()) == 0xFF or int(bits.view(torch.int8).amax()) == 0x7F):
        values = bits.view(torch.float8_e4m3fn).float()
    else:
        wide = bits.view(torch.int8).to(torch.int16)  # extends the sign into the upper byte
        wide *= 128
        wide &= ~0x4000
        values = wide.view(torch.float16).float().mul_(_EXPONENTS)
    return values if scale is None else scale_groups(values, scale, columns)


def code_values(stored: Tensor, element: ElementType) -> Tensor:
    """The values of codes as float32: [..., k / per_byte] in the stored dtype -> [..., k]."""
    if element.values:
        compiled = kernels.decode(stored, element.name, None, 0)
        if compiled is not None:
            return compiled
        return torch.tensor(element.values, device=stored.device)[unpack_nibbles(stored).long()]
    return fp8_values(stored) if stored.dtype == torch.float8_e4m3fn else stored.float()


def scaled_values(stored: Tensor, element: ElementType, scale: Tensor, columns: int) -> Tensor:
    """The values of codes times the scales of their groups: [r, k / per_byte] -> float32 [r, k].

    scale: float32 [r, ceil(k / columns)]; `columns` is even for codes that are two in a byte.
    """
    if element.name == "fp8_e4m3":
        return fp8_values(stored, scale, columns)
    compiled = kernels.decode(stored, element.name, scale, columns) if element.values else None
    return scale_groups(code_values(stored, element), scale, columns) if compiled is None else compiled


def scale_values(stored: Tensor) -> Tensor:
    """Stored scales as float32, in any shape. Of uint8 each is an exponent (E8M0): 2^(byte - 127), NaN
    for 255."""
    return (stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored).float()


def scales_to_store(scale: Tensor) -> Tensor:
    """Scales in the dtype in which files have them: exponents (E8M0) as uint8, others as they are."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def spread(values: Tensor, columns: int, k: int) -> Tensor:
    """Values of column groups [..., ceil(k / columns)], repeated for each column: [..., k]."""
    return values.repeat_interleave(columns, -1)[..., :k]


def scale_groups(values: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Multiply values, float32 [r, k], in place with scale [r, ceil(k / columns)].

    Groups of `columns` columns begin at column 0.
    """
    k = values.shape[1]
    if k % columns:
        values *= spread(scale, columns, k)
    else:
        values.view(len(values), -1, columns).mul_(scale.unsqueeze(-1))
    return values


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Codes that are packed along rows: int32 [r, w] -> uint8 [r, w * 32 / bits].

    The first code is in the lowest bits. bits: 4 or 8. Needs a little-endian CPU.
    """
    octets = _octets(packed)
    if bits == 8:
        return octets
    return unpack_nibbles(octets)


def _octets(packed: Tensor) -> Tensor:
    """int32 [r, w] -> uint8 [r, 4 w]."""
    return packed.reshape(-1).view(torch.uint8).view(len(packed), 4 * packed.shape[1])


def unpack_nibbles(octets: Tensor) -> Tensor:
    """uint8 [..., w] -> uint8 [..., 2 w]: the low four bits of each first."""
    compiled = kernels.unpack_nibbles(octets, 0)
    if compiled is not None:
        return compiled
    return torch.stack([octets & 15, octets >> 4], -1).flatten(-2)


def pack_signed(values: Tensor, bits: int) -> Tensor:
    """int8 [n, k] -> int32 [n, k * bits / 32]; k is a multiple of 32 / bits.

    Codes are stored with 2^(bits - 1) added, value i of a row in bits [bits * i, bits * i + bits) of
    the row's little-endian string of bits.
    """
    compiled = kernels.pack_nibbles(values, 8) if bits == 4 else None
    if compiled is not None:
        return compiled.view(torch.int32)
    unsigned = values.view(torch.uint8) ^ 0x80 if bits == 8 else (values + 8).view(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    # a transposed tensor of no rows counts as contiguous, with strides that no view takes
    return unsigned.clone(memory_format=torch.contiguous_format).view(torch.int32)


def pack_columns(values: Tensor, bits: int) -> Tensor:
    """Packed along rows: int8 [n, g] -> int32 [ceil(n * bits / 32), g]; what is left of a word is 0."""
    each = 32 // bits
    if not len(values):  # no view takes its strides
        return values.new_empty(values.shape, dtype=torch.int32)
    columns = values.mT
    if rest := -columns.shape[-1] % each:
        empty = columns.new_full((len(columns), rest), -(2 ** (bits - 1)))
        columns = torch.cat([columns, empty], 1)
    return pack_signed(columns.contiguous(), bits).mT.contiguous()


def unpack_columns(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse: int32 [ceil(n * bits / 32), g] -> int8 [n, g]."""
    return unpack_signed(packed.mT.contiguous(), bits, n).mT


def unpack_signed(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse: int32 [n, ceil(k * bits / 32)] -> int8 [n, k]."""
    if bits == 4:
        compiled = kernels.unpack_nibbles(_octets(packed), 8)
        if compiled is not None:
            return compiled.view(torch.int8)[:, :k]
    unsigned = unpack_rows(packed, bits)[:, :k]
    if bits == 8:
        return (unsigned ^ 0x80).view(torch.int8)
    return unsigned.view(torch.int8) - 8
