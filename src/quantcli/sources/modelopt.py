"""FP8 as ModelOpt writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from quantcli.checkpoint.encoded import Encoded
from quantcli.sources.base import Source, SourceFormat
from quantcli.sources.float8 import FLOAT, read

# Names of formats, and the sides of a block.
# Source: Model-Optimizer a2fbac7b, modelopt/torch/export/quant_utils.py; vllm 0.32.0,
# model_executor/layers/quantization/modelopt.py:320-403.
_BLOCKS: dict[str, list[int] | None] = {
    "fp8": None,
    "fp8_per_channel_per_token": None,
    "fp8_pb_wo": [128, 128],
}


class ModelOpt(SourceFormat):
    """FP8 with a scale per tensor, row or block; settings in config.json or in a file of their own."""

    name: ClassVar[str] = "modelopt"
    methods: ClassVar[frozenset[str]] = frozenset({"modelopt"})
    own_file: ClassVar[str] = "hf_quant_config.json"

    def settings_of(self, table: Mapping[str, Any]) -> Any:
        """They are under `quantization`."""
        return table.get("quantization")

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every FP8 module. InputError for other formats."""
        algorithm = source.word("quant_algo", "")
        if algorithm not in _BLOCKS:
            formats = ", ".join(name.upper() for name in _BLOCKS)
            what = f"`quant_algo` is {algorithm.upper()!r:.40}: this version decodes {formats}"
            raise source.refused(what, FLOAT)
        return read(replace(source, settings={"weight_block_size": _BLOCKS[algorithm]}))
