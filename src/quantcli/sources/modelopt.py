"""What Model-Optimizer writes, decoded by the tensors that each module has.

Sources: Model-Optimizer a2fbac7b, modelopt/torch/export/quant_utils.py:263-346 and 836-938,
quantization/qtensor/nvfp4_tensor.py, mxfp8_tensor.py and mxfp4_tensor.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import StoredTensor
from quantcli.sources.base import Source, SourceFormat, Tensors, matrix, needed, wrong
from quantcli.sources.blocks import Blocks, grouped, one_number, tiles_of
from quantcli.sources.float8 import FLOAT

# Algorithms whose weights are codes times scales; others multiply inputs with scales of columns, too.
_ALGORITHMS = (
    "fp8", "fp8_per_channel_per_token", "fp8_pb_wo", "nvfp4", "w4a16_nvfp4", "w4a8_nvfp4_fp8",
    "w4a8_mxfp4_fp8", "mxfp8", "mixed_precision",
)  # fmt: skip
_BLOCK = (128, 128)
_EXPONENTS = ("U8", "F8_E8M0")


class ModelOpt(SourceFormat):
    """FP8, NVFP4, MXFP8 and MXFP4; settings in config.json or in a file of their own."""

    name: ClassVar[str] = "modelopt"
    methods: ClassVar[frozenset[str]] = frozenset(
        {"modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"}
    )
    own_file: ClassVar[str] = "hf_quant_config.json"

    def settings_of(self, table: Settings) -> Settings:
        """They are under `quantization`."""
        inner = table.table("quantization")
        if inner is None:
            raise table.wrong("quantization", "an object")
        return inner

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every quantized module. InputError for other algorithms."""
        if (table := source.settings.table("quantization")) is not None:
            source = replace(source, settings=table)
        algorithm = source.word("quant_algo", "")
        if algorithm not in _ALGORITHMS:
            formats = ", ".join(name.upper() for name in _ALGORITHMS)
            what = f"`quant_algo` is {algorithm.upper()!r:.40}: this version decodes {formats}"
            raise source.refused(what, FLOAT)
        for module, tensors in source.modules.items():
            weight = tensors.get("weight")
            if weight is None or weight.spec.dtype not in {"F8_E4M3", "U8"}:
                continue
            if "pre_quant_scale" in tensors:
                what = "its inputs are scaled by columns, which is not decoded"
                raise wrong(tensors["pre_quant_scale"], what, FLOAT)
            scale = needed(module, tensors, "weight_scale", weight)
            unused = [tensors["input_scale"]] if "input_scale" in tensors else []
            blocks, kind = _blocks(source, module, tensors, weight, scale)
            yield blocks.encoded(module, kind, unused)


def _blocks(
    source: Source, module: str, tensors: Tensors, weight: StoredTensor, scale: StoredTensor
) -> tuple[Blocks, str]:
    """The weight of a module, and its format as text."""
    if weight.spec.dtype == "U8":
        if scale.spec.dtype in _EXPONENTS:
            grouped(weight, scale, "fp4_e2m1", 32, _EXPONENTS)
            return Blocks(weight, "fp4_e2m1", scale, (1, 32)), "mxfp4 in groups of 32"
        size = source.whole("group_size", default=16) or 16
        if size < 1:
            raise source.refused(f"NVFP4 in groups of {size}")
        grouped(weight, scale, "fp4_e2m1", size, ("F8_E4M3",))
        whole = one_number(needed(module, tensors, "weight_scale_2", weight))
        return Blocks(weight, "fp4_e2m1", scale, (1, size), whole), f"nvfp4 in groups of {size}"
    if scale.spec.dtype in _EXPONENTS:
        grouped(weight, scale, "fp8_e4m3", 32, _EXPONENTS)
        return Blocks(weight, "fp8_e4m3", scale, (1, 32)), "mxfp8 in groups of 32"
    sides = matrix(weight)
    in_blocks = source.word("quant_algo", "") == "fp8_pb_wo" or len(scale.spec.shape) == 4
    scale, tile, shared = tiles_of(source, scale, sides, _BLOCK if in_blocks else None)
    return Blocks(weight, "fp8_e4m3", scale, tile), f"fp8 {shared}"
