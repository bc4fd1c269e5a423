"""FP8 weights with a scale per tensor, row or block: DeepSeek and its like, `fbgemm_fp8`.

A scale of uint8 is an exponent (E8M0): 2^(scale - 127).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.core.codes import fp8_values, scale_values
from quantcli.sources.base import SCALES, Source, SourceFormat, check_scales, encoded, matrix, wrong
from quantcli.targets.fp8.config import E4M3

_OTHER_FP8 = {"F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz"}
# all multiply: the first by misnomer; the last is ComfyUI's
_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "scale_weight")
_OF_INPUTS = ("input_scale", "input_scale_inv", "activation_scale", "input_scale_ub", "scale_input")


class Float8(SourceFormat):
    """FP8 of DeepSeek and its like."""

    name: ClassVar[str] = "fp8"
    methods: ClassVar[frozenset[str]] = frozenset({"fp8", "fbgemm_fp8", "mxfp8"})

    def shows(self, checkpoint: Checkpoint) -> bool:
        """Whether every e4m3 weight has one scale, or one for each row."""
        return _unnamed(checkpoint)

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every FP8 module."""
        return read(source)


def read(source: Source) -> Iterator[Encoded]:
    """Every FP8 module, if config.json says `fp8`. InputError for tensors that do not fit."""
    block = _block(source)
    if source.word("fmt", "e4m3") not in E4M3:
        raise source.refused(f"`fmt` is {source.word('fmt', '')!r:.40}: only e4m3 is decoded", FLOAT)
    for module, tensors in source.modules.items():
        weight = tensors.get("weight")
        if weight is None or not weight.spec.dtype.startswith("F8_"):
            continue
        if weight.spec.dtype != "F8_E4M3":
            kind = _OTHER_FP8.get(weight.spec.dtype, weight.spec.dtype)
            raise wrong(weight, f"codes are fp8 {kind}: only e4m3 is decoded", FLOAT)
        n, k = matrix(weight)
        scales = [tensors[suffix] for suffix in _WEIGHT_SCALES if suffix in tensors]
        if len(scales) != 1:
            suffixes = [scale.spec.name.rpartition(".")[2] for scale in scales] or _WEIGHT_SCALES
            first, second = (f"`{module}.{suffix}`" for suffix in suffixes[:2])
            both = f"there are both {first} and {second}"
            raise wrong(weight, both if scales else f"there is neither {first} nor {second}")
        scale, tile, kind = _tiles(source, scales[0], (n, k), block)
        parts = [weight, scale, *(tensors[suffix] for suffix in _OF_INPUTS if suffix in tensors)]
        yield encoded(module, (n, k), parts, partial(open_rows, weight, scale, tile), kind)


def _unnamed(checkpoint: Checkpoint) -> bool:
    """Whether every e4m3 weight has one scale, or one for each row: their headers tell all of it."""
    plain = []
    for name, stored in checkpoint.tensors.items():
        if stored.spec.dtype == "F8_E4M3" and name.endswith(".weight"):
            names = (f"{name.removesuffix('weight')}{suffix}" for suffix in _WEIGHT_SCALES)
            scales = [checkpoint.tensors[scale] for scale in names if scale in checkpoint.tensors]
            rows = stored.spec.shape[:1]
            plain.append(any(s.spec.shape in {(), (1,), (1, 1), rows, (*rows, 1)} for s in scales))
    return bool(plain) and all(plain)


def _block(source: Source) -> tuple[int, int] | None:
    value = source.settings.get("weight_block_size")
    if value is None:
        return None
    sides = value if isinstance(value, list) else []
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= 2**31 for side in sides):
        raise source.refused(f"`weight_block_size` is {reprlib.repr(value)}, not two whole numbers")
    return sides[0], sides[1]


def _tiles(
    source: Source, scale: StoredTensor, sides: tuple[int, int], block: tuple[int, int] | None
) -> tuple[StoredTensor, tuple[int, int], str]:
    """The scale as a matrix, one value a tile; rows and columns of a tile; the format as text."""
    n, k = sides
    shape = scale.spec.shape
    if scale.spec.dtype not in {*SCALES, "U8"}:
        raise wrong(scale, f"scale is {scale.spec}; it must be float")
    if len(shape) == 4 and shape[1] == shape[3] == 1:  # ModelOpt's blocks
        shape = (shape[0], shape[2])
        scale = replace(scale, spec=replace(scale.spec, shape=shape))
    if block is not None:
        expected = -(-n // block[0]), -(-k // block[1])
        if shape != expected:
            reason = f"blocks of {block[0]} x {block[1]} give a weight of {n} x {k} "
            raise source.contradicted(scale, f"{reason}{list(expected)} scales")
        return scale, block, f"fp8 blocks of {block[0]} x {block[1]}"
    if shape in {(), (1,), (1, 1)}:
        tile, kind, rows = (n, k), "fp8 per tensor", 1
    elif shape in {(n,), (n, 1)}:
        tile, kind, rows = (1, k), "fp8 per channel", n
    else:
        reason = f"no weight_block_size, so that a weight of {n} x {k} has 1 or {n} scales"
        raise source.contradicted(scale, reason)
    return replace(scale, spec=replace(scale.spec, shape=(rows, 1))), tile, kind


@contextmanager
def open_rows(codes: StoredTensor, scale: StoredTensor, tile: tuple[int, int]) -> Iterator[Float8Rows]:
    """Rows of a weight, as long as its files are open.

    scale: [ceil(n / rows), ceil(k / columns)] of a tile's.
    """
    with codes.open() as code_rows, scale.open() as scale_rows:
        yield Float8Rows(code_rows, scale_rows, scale, tile)


@dataclass(frozen=True)
class Float8Rows:
    """Rows of FP8 codes [n, k] times the scale of their tile."""

    codes: Rows
    scales: Rows
    stored_scale: StoredTensor
    tile: tuple[int, int]

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count) in float32."""
        rows, columns = self.tile
        codes = self.codes.weight(start, count)
        first, last = start // rows, -(-(start + len(codes)) // rows)
        scale = scale_values(self.scales.weight(first, last - first))
        if rows > 1:
            scale = scale[torch.arange(start, start + len(codes)) // rows - first]
        check_scales(scale, self.stored_scale, start, rows, lambda s: fp8_values(codes, s, columns))
        return fp8_values(codes, scale, columns)


FLOAT = "start from the float checkpoint"
