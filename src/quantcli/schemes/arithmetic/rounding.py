"""Int8 and fp8 rounding, shared by all schemes: compiled loops, or plain torch on blocks that fit the
cache.

Torch is the reference: a kernel gives the same bits, and where there is none torch serves. On a block
of about 512K elements all its temporaries stay in the cache, which makes these few lines twenty times
faster than the same lines on a whole matrix. Whoever calls them does the blocking.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.checkpoint.spec import torch_dtype
from quantcli.core.exact import exact
from quantcli.core.kernels import tensors as kernels
from quantcli.core.number_types import ELEMENTS, SCALES

INT8_MAX = ELEMENTS["int8"].largest
# The largest |w| / scale that still rounds to 127, whatever the last bit of the division: no code is
# clipped and no error passes scale / 2. Reaching it instead of 127 is what a coarse grid of scales
# (bfloat16) needs: rounded up from amax / 127, scales would be too wide by half a step on average.
INT8_REACH = 127 + 63 / 128
# If scales can be that fine, this one gives the least squared error, between an exact largest weight
# at 127 and the smallest steps for all others. A pretrained model does not tell 127, 127.25 and 127.5
# apart: with int8 inputs nine tenths of its error come from these (`w8a16` next to `w8a8_dynamic` in
# `benchmarks/pretrained.py`), and smoothing mends that, not another scale of the weights.
INT8_BEST = 127.25
# The largest finite float8_e4m3fn, at which the largest weight of a row stands: codes of three bits are
# coarse, so that it must be one of them.
FP8_E4M3_MAX = ELEMENTS["fp8_e4m3"].largest
# The smallest scale, so that a row of zeros has a positive one.
FLOOR = {torch_dtype(scale.dtype): scale.least for scale in SCALES.values()}
# the integer in which a float is stored
BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}
_MAGNITUDE = {torch.int16: 0x7FFF, torch.int32: 0x7FFFFFFF}


def absmax(rows: Tensor, dim: int = -1) -> Tensor:
    """max |x| of each row: [..., n, k] in any float dtype -> float32 [..., n, 1]; or along `dim`.

    Through the bits: without its sign, a float orders like the integer it is stored as, and NaN and
    Inf come out on top, so a row that holds one shows it here.
    """
    compiled = None
    if dim == -1:
        compiled = kernels.absmax_tiles(rows, 1, rows.shape[-1])
    elif dim == 0:
        compiled = kernels.absmax_columns(rows)
    if compiled is not None:
        return compiled
    integer = BITS[rows.dtype]
    magnitude = (rows.view(integer) & _MAGNITUDE[integer]).amax(dim, keepdim=True)
    return magnitude.view(rows.dtype).float()


def round_up(value: Tensor, engine_dtype: torch.dtype) -> Tensor:
    """The smallest number of dtype `engine_dtype` that is >= value, as float32. `value` is positive.

    NaN, Inf and what passes the largest number become NaN or Inf, in each of these dtypes: positive
    numbers order like the integers that they are stored as, and NaN or Inf follow the largest.
    """
    if engine_dtype == torch.float32:
        return value
    integer = BITS[engine_dtype]
    nearest = value.to(engine_dtype)
    below = (nearest.float() < value).to(integer)
    return (nearest.view(integer) + below).view(engine_dtype).float()


def nearest(scale: Tensor, engine_dtype: torch.dtype) -> Tensor:
    """The nearest number of dtype `engine_dtype` that may be a scale, as float32."""
    return scale.to(engine_dtype).float().clamp_min(FLOOR[engine_dtype])


def channel_scale(
    rows: Tensor, limit: float, engine_dtype: torch.dtype, least: Tensor | None = None
) -> Tensor:
    """absmax / limit per row, rounded up to `engine_dtype`: |rows| <= limit * scale.

    [..., n, k] -> float32 [..., n, 1]; never zero, also for a row of zeros. No scale is below `least`,
    which broadcasts against it; NaN and Inf in it show in the scale.
    """
    return scale_of(absmax(rows), limit, engine_dtype, least)


def scale_of(
    amax: Tensor, limit: float, engine_dtype: torch.dtype, least: Tensor | None = None
) -> Tensor:
    """The same from the largest |w| of values that share a scale: float32 in the shape of `amax`."""
    scale = amax / limit
    if least is not None:
        scale = torch.maximum(scale, least)
    return round_up(scale, engine_dtype).clamp_min(FLOOR[engine_dtype])


def int8_scale(rows: Tensor, engine_dtype: torch.dtype, least: Tensor | None = None) -> Tensor:
    """The scale of each row for `to_int8`, as `channel_scale` gives it: nothing is clipped."""
    limit = INT8_BEST if engine_dtype == torch.float32 else INT8_REACH
    return channel_scale(rows, limit, engine_dtype, least)


def to_int8(rows: Tensor, scale: Tensor) -> Tensor:
    """round(rows / scale), half to even, in float32. |rows| <= INT8_REACH * scale: nothing to clip."""
    compiled = kernels.encode(rows, scale, "int8")
    if compiled is not None:
        return compiled
    return rows.to(torch.float32, copy=True).div_(scale).round_().to(torch.int8)


def to_fp8_e4m3(rows: Tensor, scale: Tensor, *, clip: bool = False) -> Tensor:
    """rows / scale in float32, rounded half to even to float8_e4m3fn. |rows| <= 448 * scale, or `clip`.

    The division may pass 448 by one ulp; everything below 464 rounds back to 448. What is out of range
    is clipped first: it becomes NaN in one release of torch and 448 in another.
    """
    compiled = kernels.encode(rows, scale, "fp8_e4m3")
    if compiled is not None:
        return compiled
    codes = rows.to(torch.float32, copy=True).div_(scale)
    if clip:
        codes.clamp_(-FP8_E4M3_MAX, FP8_E4M3_MAX)
    return codes.to(torch.float8_e4m3fn)


def scale_tokens(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Inputs as `npu_dynamic_quant` scales them, not rounded yet: float32 [..., k], within `limit`, the
    largest code; and the scale of each token, float32 [..., 1].

    limit / amax once in float32, then a multiply; a token of zeros has values and scale 0.
    """
    values = x.float()
    amax = values.abs().amax(-1, keepdim=True)
    multiplier = torch.where(amax > 0, limit / amax, 0.0)
    return values * multiplier, amax * (1 / limit)


def linear_float_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., k] -> [..., n] with a dequantized weight [..., n, k], in the dtype of x.

    The weight is rounded to the dtype of x; sums are float32, rounded once with the bias.
    """
    return add_bias(x.float() @ weight.to(x.dtype).float().mT, bias, x.dtype)


def exact_product(codes: Tensor, weight: Tensor, largest: int) -> Tensor:
    """sum_k xq wq, exact: integers float32 [..., k] and int8 [..., n, k] -> float64 [..., n].
    It is on the CPU if the device has no float64.

    largest: bound of |xq wq|. So many columns at a time that no sum passes 2^24, up to which float32
    holds every integer: the same numbers as in float64, in half the time.
    """
    step = 2**24 // largest
    total: Tensor | None = None
    for start in range(0, codes.shape[-1], step):
        columns = slice(start, start + step)
        part = exact(codes[..., columns] @ weight[..., columns].float().mT).double()
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def linear_int8_tokens(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., k] -> [..., n] with int8 inputs per token, in the dtype of x.

    weight: int8 [..., n, k]; scale: float32 [..., n, 1]. `npu_dynamic_quant` followed by
    `npu_quant_matmul`: y = (f32(sum_k xq wq) * scale) * token_scale + bias, rounded once; the sum is
    exact.
    """
    scaled, token_scale = scale_tokens(x, INT8_MAX)
    total = exact_product(scaled.round_(), weight, 2**14).float().to(x.device)
    return add_bias(total * per_output(scale.squeeze(-1)) * token_scale, bias, x.dtype)


def add_bias(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y + bias in float32, rounded once to `dtype`. y: float32 [..., n]; bias: [n] or [..., n]."""
    return (y if bias is None else y + per_output(bias.float())).to(dtype)


def per_output(values: Tensor) -> Tensor:
    """[n] as it is, [..., n] of stacked weights as [..., 1, n]: to broadcast against outputs."""
    return values if values.dim() == 1 else values.unsqueeze(-2)
