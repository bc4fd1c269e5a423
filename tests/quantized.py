"""Quantized modules of other producers, put together code by code: tensors as they lie on disk, and the
weights that they stand for, both from the formats' definitions and without the code under test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.builders import Tensor

AWQ_CHANNELS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight output channels each nibble holds


def fp8_number(code: int) -> float:
    """What an e4m3fn code stands for: sign, 4 bits of exponent with bias 7, 3 bits; 0x7F is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = (code >> 3) & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


FP8 = np.array([fp8_number(code) for code in range(256)], "f4")


def f32(values: np.ndarray) -> Tensor:
    return "F32", values.shape, np.ascontiguousarray(values, "<f4").tobytes()


def f16(values: np.ndarray) -> Tensor:
    return "F16", values.shape, np.ascontiguousarray(values, "<f2").tobytes()


def i32(values: np.ndarray) -> Tensor:
    return "I32", values.shape, np.ascontiguousarray(values, "<u4").tobytes()


def fp8_codes(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Codes [n, k] that are no NaN."""
    codes = np.random.default_rng(seed).integers(0, 256, (n, k), dtype=np.uint8)
    return np.where(codes & 0x7F == 0x7F, np.uint8(0x3A), codes)


def fp8_blocks(
    module: str, n: int, k: int, block: tuple[int, int] = (128, 128), seed: int = 0
) -> tuple[dict[str, Tensor], np.ndarray]:
    """FP8 with a scale for each block, and the weight."""
    codes = fp8_codes(n, k, seed)
    rows, columns = -(-n // block[0]), -(-k // block[1])
    scale = np.random.default_rng(seed + 1).uniform(1e-3, 1e-2, (rows, columns)).astype("f4")
    weight = np.empty((n, k), "f4")
    for i in range(n):
        for j in range(k):
            weight[i, j] = FP8[codes[i, j]] * scale[i // block[0], j // block[1]]
    return {
        f"{module}.weight": ("F8_E4M3", (n, k), codes.tobytes()),
        f"{module}.weight_scale_inv": f32(scale),
    }, weight


def _packed(codes: Sequence[int], bits: int) -> int:
    word = 0
    for place, code in enumerate(codes):
        word |= int(code) << (bits * place)
    return word


def awq(
    module: str, n: int, k: int, group: int = 32, seed: int = 0
) -> tuple[dict[str, Tensor], np.ndarray]:
    """AutoAWQ's gemm layout, and the weight."""
    random = np.random.default_rng(seed)
    groups = -(-k // group)
    codes = random.integers(0, 16, (n, k))
    zeros = random.integers(0, 16, (n, groups))
    scales = random.uniform(1e-3, 1e-2, (n, groups)).astype("f2")
    weight = np.empty((n, k), "f4")
    for i in range(n):
        for j in range(k):
            g = j // group
            weight[i, j] = np.float32(codes[i, j] - zeros[i, g]) * np.float32(scales[i, g])
    qweight = np.zeros((k, n // 8), "u4")
    qzeros = np.zeros((groups, n // 8), "u4")
    for word in range(n // 8):
        channels = [8 * word + channel for channel in AWQ_CHANNELS]
        for j in range(k):
            qweight[j, word] = _packed([codes[c, j] for c in channels], 4)
        for g in range(groups):
            qzeros[g, word] = _packed([zeros[c, g] for c in channels], 4)
    return {
        f"{module}.qweight": i32(qweight),
        f"{module}.qzeros": i32(qzeros),
        f"{module}.scales": f16(scales.T),
    }, weight


def gptq(
    module: str,
    n: int,
    k: int,
    group: int = 32,
    *,
    bits: int = 4,
    act_order: bool = False,
    v2: bool = False,
    symmetric: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], np.ndarray]:
    """The layout of AutoGPTQ, or of its second version, and the weight."""
    random = np.random.default_rng(seed)
    each, groups = 32 // bits, -(-k // group)
    codes = random.integers(0, 2**bits, (n, k))
    zeros = random.integers(0, 2**bits, (n, groups))
    zeros[0, 0] = 0  # less 1 it wraps around
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = random.uniform(1e-3, 1e-2, (n, groups)).astype("f2")
    index = np.arange(k) // group
    if act_order:
        index = random.permutation(index)
    weight = np.empty((n, k), "f4")
    for i in range(n):
        for j in range(k):
            g = index[j]
            weight[i, j] = np.float32(codes[i, j] - zeros[i, g]) * np.float32(scales[i, g])
    qweight = np.zeros((k // each, n), "u4")
    for word in range(k // each):
        for i in range(n):
            qweight[word, i] = _packed(codes[i, each * word : each * (word + 1)], bits)
    stored = zeros if v2 else (zeros - 1) % 2**bits
    qzeros = np.zeros((groups, n // each), "u4")
    for g in range(groups):
        for word in range(n // each):
            qzeros[g, word] = _packed(stored[each * word : each * (word + 1), g], bits)
    return {
        f"{module}.qweight": i32(qweight),
        f"{module}.qzeros": i32(qzeros),
        f"{module}.scales": f16(scales.T),
        f"{module}.g_idx": i32(index),
    }, weight


def bf16(values: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Cut to bfloat16: the tensor, and its numbers."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4") & 0xFFFF0000
    return ("BF16", values.shape, (bits >> 16).astype("<u2").tobytes()), bits.view("<f4")


def packed_int4(
    module: str, n: int, k: int, group: int | None, *, symmetric: bool, wide: bool, seed: int = 0
) -> tuple[dict[str, Tensor], np.ndarray]:
    """compressed-tensors' pack-quantized int4, and the weight. wide: scales are float32."""
    random = np.random.default_rng(seed)
    width = group or k
    groups = -(-k // width)
    codes = random.integers(-8, 8, (n, k))
    zeros = np.zeros((n, groups), int) if symmetric else random.integers(-8, 8, (n, groups))
    scale = random.uniform(1e-3, 1e-2, (n, groups)).astype("f4")
    stored, held = (f32(scale), scale) if wide else bf16(scale)
    weight = np.empty((n, k), "f4")
    for i in range(n):
        for j in range(k):
            weight[i, j] = np.float32(codes[i, j] - zeros[i, j // width]) * held[i, j // width]
    packed = np.zeros((n, -(-k // 8)), "u4")
    for i in range(n):
        for word in range(packed.shape[1]):
            packed[i, word] = _packed(codes[i, 8 * word : 8 * word + 8] + 8, 4)
    tensors = {
        f"{module}.weight_packed": i32(packed),
        f"{module}.weight_scale": stored,
        f"{module}.weight_shape": ("I64", (2,), np.array([n, k], "<i8").tobytes()),
    }
    if not symmetric:
        points = np.zeros((-(-n // 8), groups), "u4")
        for word in range(len(points)):
            for g in range(groups):
                points[word, g] = _packed(zeros[8 * word : 8 * word + 8, g] + 8, 4)
        tensors[f"{module}.weight_zero_point"] = i32(points)
    return tensors, weight


def int8_rows(module: str, n: int, k: int, seed: int = 0) -> tuple[dict[str, Tensor], np.ndarray]:
    """int8 with a scale per row, as compressed-tensors and ModelSlim have it, and the weight."""
    random = np.random.default_rng(seed)
    codes = random.integers(-128, 128, (n, k)).astype("i1")
    scale = random.uniform(1e-3, 1e-2, (n, 1)).astype("f4")
    weight = np.empty((n, k), "f4")
    for i in range(n):
        for j in range(k):
            weight[i, j] = np.float32(codes[i, j]) * scale[i, 0]
    return {
        f"{module}.weight": ("I8", (n, k), codes.tobytes()),
        f"{module}.weight_scale": f32(scale),
    }, weight


def w4a8(module: str, n: int, k: int, seed: int = 0) -> tuple[dict[str, Tensor], np.ndarray]:
    """ModelSlim's W4A8_DYNAMIC: byte [o, k] holds row 2 o in its low nibble, 2 o + 1 in its high."""
    random = np.random.default_rng(seed)
    codes = random.integers(-8, 8, (n, k))
    scale = random.uniform(1e-3, 1e-2, (n, 1)).astype("f4")
    data = np.zeros((n // 2, k), "u1")
    for o in range(n // 2):
        for j in range(k):
            data[o, j] = (codes[2 * o + 1, j] & 15) << 4 | (codes[2 * o, j] & 15)
    return {
        f"{module}.weight": ("I8", (n // 2, k), data.tobytes()),
        f"{module}.weight_scale": f32(scale),
        f"{module}.weight_offset": f32(np.zeros((n, 1))),
        f"{module}.scale_bias": f32(8 * codes.sum(1, keepdims=True) * scale),
    }, codes.astype("f4") * scale


def flatquant(
    module: str, n: int, left: int, right: int, seed: int = 0
) -> tuple[dict[str, Tensor], np.ndarray]:
    """ModelSlim's W4A4_FLATQUANT_DYNAMIC, transforms in bfloat16, and the weight: engines multiply
    inputs as L^T X R, so that a row W' of codes stands for L W' R^T."""
    random = np.random.default_rng(seed)
    k = left * right
    codes = random.integers(-8, 8, (n, k)).astype("i1")
    scale = random.uniform(1e-3, 1e-2, (n, 1)).astype("f4")
    stored_left, L = bf16(random.standard_normal((left, left)))
    stored_right, R = bf16(random.standard_normal((right, right)))
    rows = (codes.astype("f8") * scale.astype("f8")).reshape(n, left, right)
    weight = np.stack([L.astype("f8") @ row @ R.astype("f8").T for row in rows]).reshape(n, k)
    return {
        f"{module}.weight": ("I8", (n, k), codes.tobytes()),
        f"{module}.weight_scale": f32(scale),
        f"{module}.weight_offset": f32(np.zeros((n, 1))),
        f"{module}.left_trans": stored_left,
        f"{module}.right_trans": stored_right,
        f"{module}.clip_ratio": f32(np.ones(1)),
    }, weight.astype("f4")
