"""FP8 weights with a scale per tensor, row or block: DeepSeek and its like, `fbgemm_fp8`.

A scale of uint8 is an exponent (E8M0): 2^(scale - 127). DeepSeek-V4 has experts of four bits next to
them: int8 [n, k / 2], two codes in each, the even column in the low bits, with an exponent for every 32
columns. Sources: transformers 5.23.0, integrations/finegrained_fp8.py:1025-1088; vllm 0.32.0,
models/deepseek_v4/quant_config.py:28-41, amd/model.py:1421-1429.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import ClassVar

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import StoredTensor
from quantcli.core.number_types import ELEMENTS
from quantcli.sources.base import Source, SourceFormat, Tensors, matrix, wrong
from quantcli.sources.blocks import Blocks, grouped, tiles_of
from quantcli.targets.fp8.config import E4M3

FLOAT = "start from the float checkpoint"
E5M2 = ("e5m2", "float8_e5m2")  # spellings of `fmt`
# The types of codes by the dtype in which they are stored.
CODES = {ELEMENTS[name].dtype: name for name in ("fp8_e4m3", "fp8_e5m2")}
_OTHER_FP8 = {"F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz"}
# all multiply: the first by misnomer; the third is ComfyUI's, the last that of DeepSeek-V4
_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "scale_weight", "scale")
_OF_INPUTS = ("input_scale", "input_scale_inv", "activation_scale", "input_scale_ub", "scale_input")
_GROUP = 32  # columns of four-bit codes that share an exponent


class Float8(SourceFormat):
    """FP8 of DeepSeek and its like."""

    name: ClassVar[str] = "fp8"
    methods: ClassVar[frozenset[str]] = frozenset({"fp8", "fbgemm_fp8", "mxfp8", "deepseek_v4_fp8"})

    def shows(self, checkpoint: Checkpoint) -> bool:
        """Whether every FP8 weight has one scale, or one for each row."""
        return _unnamed(checkpoint)

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every FP8 module."""
        return read(source)


def read(source: Source) -> Iterator[Encoded]:
    """Every FP8 module, if config.json says `fp8`. InputError for tensors that do not fit."""
    block = block_of(source)
    if source.word("fmt", "e4m3") not in (*E4M3, *E5M2):
        what = f"`fmt` is {source.word('fmt', '')!r:.40}: only e4m3 and e5m2 are decoded"
        raise source.refused(what, FLOAT)
    for module, tensors in source.modules.items():
        weight = tensors.get("weight")
        if weight is not None and weight.spec.dtype.startswith("F8_"):
            yield _fp8(source, module, tensors, weight, block)
        elif weight is not None and weight.spec.dtype == "I8" and "scale" in tensors:
            yield _fp4(module, weight, tensors["scale"])


def _fp8(
    source: Source,
    module: str,
    tensors: Tensors,
    weight: StoredTensor,
    block: tuple[int, int] | None,
) -> Encoded:
    if weight.spec.dtype not in CODES:
        kind = _OTHER_FP8.get(weight.spec.dtype, weight.spec.dtype)
        raise wrong(weight, f"codes are fp8 {kind}: only e4m3 and e5m2 are decoded", FLOAT)
    element = CODES[weight.spec.dtype]
    if source.word("fmt", element) not in {element, *(E4M3 if element == "fp8_e4m3" else E5M2)}:
        raise source.contradicted(weight, f"`fmt` is {source.word('fmt', '')!r:.40}")
    sides = matrix(weight)
    scales = [tensors[suffix] for suffix in _WEIGHT_SCALES if suffix in tensors]
    if len(scales) != 1:
        suffixes = [scale.spec.name.rpartition(".")[2] for scale in scales] or _WEIGHT_SCALES
        first, second = (f"`{module}.{suffix}`" for suffix in suffixes[:2])
        both = f"there are both {first} and {second}"
        raise wrong(weight, both if scales else f"there is neither {first} nor {second}")
    scale, tile, shared = tiles_of(source, scales[0], sides, block)
    unused = [tensors[suffix] for suffix in _OF_INPUTS if suffix in tensors]
    name = "fp8" if element == "fp8_e4m3" else "fp8 e5m2"
    return Blocks(weight, element, scale, tile).encoded(module, f"{name} {shared}", unused)


def _fp4(module: str, weight: StoredTensor, scale: StoredTensor) -> Encoded:
    """A four-bit expert of DeepSeek-V4."""
    grouped(weight, scale, "fp4_e2m1", _GROUP, ("F8_E8M0", "U8"))
    blocks = Blocks(weight, "fp4_e2m1", scale, (1, _GROUP))
    return blocks.encoded(module, f"mxfp4 in groups of {_GROUP}")


def _unnamed(checkpoint: Checkpoint) -> bool:
    """Whether every FP8 weight has one scale, or one for each row: their headers tell all of it."""
    plain = []
    for name, stored in checkpoint.tensors.items():
        if stored.spec.dtype in CODES and name.endswith(".weight"):
            names = (f"{name.removesuffix('weight')}{suffix}" for suffix in _WEIGHT_SCALES)
            scales = [checkpoint.tensors[scale] for scale in names if scale in checkpoint.tensors]
            rows = stored.spec.shape[:1]
            plain.append(any(s.spec.shape in {(), (1,), (1, 1), rows, (*rows, 1)} for s in scales))
    return bool(plain) and all(plain)


def block_of(source: Source, key: str = "weight_block_size") -> tuple[int, int] | None:
    """The rows and columns of a block by the settings; None if they name none."""
    value = source.settings.value(key)
    if value is None:
        return None
    sides = value if isinstance(value, list) else []
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= 2**31 for side in sides):
        raise source.refused(f"`{key}` is {reprlib.repr(value)}, not two whole numbers")
    return sides[0], sides[1]
