"""Kernels on torch tensors.

Each function gives None if torch must serve: for tensors that are not contiguous, not on the CPU, of
another dtype or part of a gradient, empty ones, and if no code can be compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.core.kernels import BLOCK, LANES, WIDE
from quantcli.core.kernels.machine import Function, kernel

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
CODES = {"int4": torch.int8, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
_ENGINES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _of(name: str, rows: Tensor, *words: str) -> Function | None:
    dtype = _NAMES.get(rows.dtype)
    if dtype is None or not rows.numel() or not _simple(rows):
        return None
    return kernel(name, dtype, *words)


def _tiles(rows: Tensor, tall: int, columns: int) -> tuple[int, int, int, int]:
    """Matrices [..., n, k] as one, with the number of its rows and groups; a tile is in one of them."""
    n, k = rows.shape[-2:] if rows.dim() > 1 else (1, rows.shape[-1])
    assert tall == 1 or rows.dim() == 2 or n % tall == 0
    count = rows.numel() // k if k else 0
    return count, k, -(-count // tall), -(-k // columns)


def absmax_tiles(rows: Tensor, tall: int, columns: int) -> Tensor | None:
    """max |x| of tiles: float [..., n, k] -> float32 [..., ceil(n / tall), ceil(k / columns)]."""
    n = rows.shape[-2] if rows.dim() > 1 else 1
    if tall > 1 and rows.dim() > 2 and n % tall:
        return None
    run = _of("absmax_tiles", rows)
    if run is None:
        return None
    count, k, _, groups = _tiles(rows, tall, columns)
    shape = (*rows.shape[:-2], -(-n // tall), groups) if rows.dim() > 1 else (groups,)
    out = torch.empty(shape)
    run(rows.data_ptr(), count, k, tall, columns, out.data_ptr())
    return out


def absmax_columns(rows: Tensor) -> Tensor | None:
    """max |x| of each column: float [n, k] -> float32 [1, k]."""
    run = _of("absmax_columns", rows) if rows.dim() == 2 else None
    if run is None:
        return None
    out = torch.zeros(1, rows.shape[1])
    run(rows.data_ptr(), *rows.shape, out.data_ptr())
    return out


def extremes(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """The largest x and the largest -x of each row, at least 0: float [..., k] -> float32 [..., 1]."""
    run = _of("extremes", rows)
    if run is None:
        return None
    above, below = torch.empty(2, *rows.shape[:-1], 1)
    k = rows.shape[-1]
    run(rows.data_ptr(), above.numel(), k, above.data_ptr(), below.data_ptr())
    return above, below


def encode(
    rows: Tensor, scale: Tensor, element: str, tall: int = 1, columns: int | None = None
) -> Tensor | None:
    """The nearest codes for rows / scale, half to even, clipped: float [..., n, k] -> [..., n, k].

    scale: float32, of tiles of a matrix [n, k]; without `columns` of rows [..., n, 1], or one number.
    """
    if scale.device.type != "cpu" or scale.dtype != torch.float32:
        return None
    k = rows.shape[-1]
    count = rows.numel() // k if k else 0
    if columns is not None:
        fits = rows.dim() == 2 and scale.shape == (-(-count // tall), -(-k // columns))
    elif scale.numel() == 1:
        fits, count, k, columns = True, 1, rows.numel(), rows.numel()
    else:
        fits, columns = scale.shape == (*rows.shape[:-1], 1), k
    if not fits:
        return None
    run = _of("encode", rows, element)
    if run is None:
        return None
    codes = torch.empty(rows.shape, dtype=CODES[element])
    scale = scale.contiguous()
    run(rows.data_ptr(), count, k, tall, columns, scale.data_ptr(), codes.data_ptr())
    return codes


@dataclass(frozen=True)
class Groups:
    """Groups of columns, and the scales that they may have.

    columns: of a group.
    scale:   the name of the type of scales.
    table:   the scales by their codes, float32, up to the largest that a group may have.
    least:   the code of the smallest one.
    reach:   what the largest value over its scale is near to, for the first scale that is tried.
    up:      whether it may not be over that.
    count:   how many scales are tried, up to WIDE.
    errors:  int16 [codes, ROWS, WIDE], with the errors of numbers for the scales tried, by the code of
             the first one; None: errors are computed.
    per:     rows for a step of the first one.
    """

    columns: int
    scale: str
    table: Tensor
    least: int
    reach: float
    up: bool
    count: int
    errors: Tensor | None
    per: float


def encode_groups(
    rows: Tensor, element: str, by: Groups, whole: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Packed codes and scales of groups: float [..., n, k] -> uint8 [..., n, ceil(k / 2)] and float32
    [..., n, ceil(k / columns)]. See `quantize` in schemes/arithmetic/fp4.py.

    whole: float32 [1], on top of the scales; None: 1.
    """
    if whole is not None and (whole.device.type != "cpu" or whole.numel() != 1):
        return None
    run = _of("encode_groups", rows, element, by.scale, str(by.columns))
    if run is None:
        return None
    k = rows.shape[-1]
    n, groups = rows.numel() // k, -(-k // by.columns)
    scale = torch.empty((*rows.shape[:-1], groups))
    packed = torch.empty((*rows.shape[:-1], -(-k // 2)), dtype=torch.uint8)
    last = len(by.table) - 1
    table = torch.cat([by.table, by.table[-1:].expand(WIDE - 1), torch.full((1,), torch.nan)])
    inverses = by.per * (1 / (table if whole is None else table * whole))
    errors = torch.empty(0) if by.errors is None else by.errors
    sizes, steps = torch.zeros(2, groups * by.columns)
    space = torch.full((2 * WIDE,), torch.inf)
    codes = torch.zeros(groups * by.columns, dtype=torch.uint8)
    firsts = torch.empty(groups, dtype=torch.int32)
    run(
        rows.data_ptr(), n, k, 1.0 if whole is None else float(whole), by.reach, by.up, by.count,
        by.least, last, table.data_ptr(), inverses.data_ptr(), sizes.data_ptr(), steps.data_ptr(),
        space.data_ptr(), firsts.data_ptr(), errors.data_ptr(), codes.data_ptr(),
        scale.data_ptr(), packed.data_ptr(),
    )  # fmt: skip
    return packed, scale


def decode(codes: Tensor, element: str, scale: Tensor | None, columns: int) -> Tensor | None:
    """The numbers of stored codes [..., k / per_byte] times scales: float32 [..., k].

    scale: float32, of groups of `columns` columns of rows [n, k]; None: 1.
    """
    if not _simple(codes) or not codes.numel():
        return None
    each = 2 if element == "fp4_e2m1" else 1
    n, k = (1, codes.numel() * each) if scale is None else (len(codes), codes.shape[-1] * each)
    if scale is None:
        scale, columns = torch.ones(1), k
    if scale.shape != (n, -(-k // columns)) and scale.numel() != 1:
        return None
    if columns % each or scale.dtype != torch.float32 or (n > 1 and scale.numel() == 1):
        return None
    run = kernel("decode", element)
    if run is None:
        return None
    scale = scale.contiguous()
    out = torch.empty((*codes.shape[:-1], codes.shape[-1] * each))
    run(codes.data_ptr(), n, k, columns, scale.data_ptr(), out.data_ptr())
    return out


def pack_nibbles(codes: Tensor, more: int) -> Tensor | None:
    """Two codes in a byte, the first in its low bits: int8 [n, k], k even -> uint8 [n, k / 2].

    more: added to each.
    """
    run = kernel("pack_nibbles") if _simple(codes) and codes.numel() else None
    if run is None or codes.shape[1] % 2:
        return None
    out = torch.empty((len(codes), codes.shape[1] // 2), dtype=torch.uint8)
    run(codes.data_ptr(), out.numel(), more, out.data_ptr())
    return out


def unpack_nibbles(octets: Tensor, less: int) -> Tensor | None:
    """The inverse: uint8 [..., w] -> uint8 [..., 2 w]. less: subtracted from each code."""
    run = kernel("unpack_nibbles") if _simple(octets) and octets.numel() else None
    if run is None:
        return None
    out = torch.empty((*octets.shape[:-1], 2 * octets.shape[-1]), dtype=torch.uint8)
    run(octets.data_ptr(), octets.numel(), less, out.data_ptr())
    return out


def _simple(tensor: Tensor) -> bool:
    """Whether compiled code can read it: one piece of this machine's memory."""
    return tensor.is_contiguous() and tensor.device.type == "cpu" and not tensor.requires_grad


def least_error(
    rows: Tensor,
    sign: Tensor | None,
    widest: Tensor,
    engine_dtype: torch.dtype,
    least: float,
    searched: tuple[str, tuple[tuple[float, ...], tuple[float, ...]], torch.dtype],
    importance: Tensor | None,
) -> Tensor | None:
    """The scale of each row with the least squared error: float [..., k] -> float32 [..., 1].

    See `least_error` in schemes/arithmetic/clipping.py.

    sign:       float32 [..., 1], which the values are multiplied with.
    least:      the smallest scale.
    searched:   the type of codes; shares of the widest scale, and steps around the best of them; the
                dtype of sums.
    importance: float32, of each column [k], or of some rows [p, k], the same for each p rows.
    """
    element, steps, sums = searched
    if engine_dtype not in _ENGINES or not rows.numel():
        return None
    k = rows.shape[-1]
    count = rows.numel() // k
    if importance is None:
        importance = torch.ones(k)
    elif importance.numel() == 1:
        importance = importance.expand(k)
    if importance.shape[-1] != k or count % (importance.numel() // k):
        return None
    run = _of("least_error", rows, element, str(sums)[6:])
    if run is None:
        return None
    importance = importance.contiguous()
    signs = torch.ones(count) if sign is None else sign.contiguous()
    coarse, fine = (torch.tensor(each) for each in steps)
    widest = widest.contiguous()
    values, weights = torch.zeros(2, -(-k // BLOCK) * BLOCK)
    out = torch.empty_like(widest)
    lanes, more = torch.empty(2, LANES, dtype=sums)
    run(
        rows.data_ptr(), count, k, signs.data_ptr(), widest.data_ptr(), importance.data_ptr(),
        importance.numel() // k, coarse.data_ptr(), len(coarse), fine.data_ptr(), len(fine),
        _ENGINES[engine_dtype], least, values.data_ptr(), weights.data_ptr(), lanes.data_ptr(),
        more.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def encode_shifted(rows: Tensor, scale: Tensor, zero: Tensor) -> Tensor | None:
    """Int4 codes with zero points, the nearest to rows / scale + zero: float [..., k] -> int8 [..., k].

    scale: float32 [..., 1]; zero: int8 [..., 1].
    """
    run = _of("encode_shifted", rows)
    if run is None:
        return None
    scale, zero = scale.contiguous(), zero.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int8)
    k = rows.shape[-1]
    count = rows.numel() // k
    run(rows.data_ptr(), count, k, scale.data_ptr(), zero.data_ptr(), codes.data_ptr())
    return codes


def least_error_shifted(
    rows: Tensor,
    ends: tuple[Tensor, Tensor],
    engine_dtype: torch.dtype,
    least: float,
    steps: tuple[tuple[float, ...], tuple[tuple[float, float], ...]],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Scale, float32 [..., 1], and zero point, int8 [..., 1], of each row: float [..., k].

    See `search` in schemes/arithmetic/zero_points.py.

    ends:       the largest x and the largest -x of each row, float32 [..., 1].
    least:      the smallest scale.
    steps:      shares of the range, and pairs of steps around the best of them.
    importance: as in `least_error`; None: no search, but the whole range.
    """
    if engine_dtype not in _ENGINES or not rows.numel():
        return None
    k = rows.shape[-1]
    count = rows.numel() // k
    weighed = torch.ones(k) if importance is None else importance
    weighed = weighed.expand(k) if weighed.numel() == 1 else weighed
    if weighed.shape[-1] != k or count % (weighed.numel() // k):
        return None
    run = _of("least_error_shifted", rows)
    if run is None:
        return None
    above, below = (end.contiguous() for end in ends)
    weighed = weighed.contiguous()
    coarse, fine = torch.tensor(steps[0]), torch.tensor(steps[1])
    values, weights = torch.zeros(2, -(-k // BLOCK) * BLOCK)
    lanes, more = torch.empty(2, LANES)
    scale, zero = torch.empty_like(above), torch.empty(above.shape, dtype=torch.int8)
    run(
        rows.data_ptr(), count, k, above.data_ptr(), below.data_ptr(), weighed.data_ptr(),
        weighed.numel() // k, coarse.data_ptr(), len(coarse), fine.data_ptr(), len(fine),
        _ENGINES[engine_dtype], least, int(importance is not None), values.data_ptr(),
        weights.data_ptr(), lanes.data_ptr(), more.data_ptr(), scale.data_ptr(), zero.data_ptr(),
    )  # fmt: skip
    return scale, zero
