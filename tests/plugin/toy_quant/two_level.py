"""A format of two levels of scales: what quantcli's scheme `nvfp4a16` makes, under names of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.codes import code_values, scale_groups, scale_values
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding
from quantcli.core.numerics import Module, Numerics, Operand, Parts
from quantcli.targets.base import Fault, ScalePart, StoredCheckpoint, cannot_store
from quantcli.targets.layouts import Blocks, Layout, code_sides, codes_param, module_scale, row_scale
from quantcli.targets.sidecars import quantization_block
from quantcli.targets.stored_format import StoredFormat
from quantcli.targets.vllm_family import VllmTarget

SIDE = 16
WEIGHT = Operand("fp4_e2m1", "group", block=(1, SIDE), scale="e4m3", global_scale=True)
NUMERICS = Numerics(WEIGHT, None)
NAME = "two-level"


def _weight(blocks: Blocks) -> Tensor:
    scale = scale_values(blocks["weight_scale"]) * blocks["weight_global_scale"]
    return scale_groups(code_values(blocks["weight"], WEIGHT.element), scale, SIDE)


LAYOUT = Layout(
    NAME,
    WEIGHT,
    (
        codes_param(WEIGHT),
        row_scale(WEIGHT),
        module_scale("weight_global_scale", ("F32",), shared=True),
    ),
    _weight,
    code_sides(WEIGHT),
)


class TwoLevelTensors(VllmTarget):
    """Two codes in a byte; a scale of all siblings."""

    name: ClassVar[str] = NAME

    def layout(self, numerics: Numerics) -> Layout:
        """One alone."""
        if numerics != NUMERICS:
            raise cannot_store(self.name, numerics)
        return LAYOUT

    def loads_on(self, label: str) -> str:
        """Nothing."""
        return "no engine"

    def engine_dtype(self, numerics: Numerics, part: ScalePart, serving_dtype: str) -> str:
        """That of the type of scales."""
        self.label(numerics)
        assert WEIGHT.scale_type is not None
        return WEIGHT.scale_type.dtype if part == "weight_scale" else serving_dtype

    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """weight uint8 [n, k / 2], weight_scale e4m3 [n, k / 16], weight_global_scale float32 [1]."""
        return dict(parts)

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """The same codes; scales in float32."""
        return {**stored, "weight_scale": scale_values(stored["weight_scale"])}

    def faults(self, module: Module, names: Collection[str]) -> Iterator[Fault]:
        """Groups that do not divide a row."""
        if module.shape[1] % SIDE:
            yield Fault("groups do not divide its rows", "keep it", "width")

    def config_block(self, output: object, used: Collection[Numerics]) -> dict[str, Any]:
        """The name."""
        return {"quant_method": NAME}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By the name."""
        return quantization_block(checkpoint.config).text("quant_method") == NAME

    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """Modules with a scale."""
        if not checkpoint.config:
            raise InputError("no config.json", where=str(checkpoint.path))
        return TwoLevelCheckpoint(checkpoint)


class TwoLevelCheckpoint(StoredFormat):
    """Modules with a `weight_scale`."""

    def read(self) -> list[Finding]:
        """Nothing can be wrong."""
        return []

    def check_parameters(self) -> Iterator[Finding]:
        """By the layout."""
        for module, tensors in sorted(self.by_module.items()):
            if "weight_scale" in tensors and "weight" in tensors:
                self.labels[module] = NAME
                self.checked["parameters"] += 1
                yield from self.check_layout(module, LAYOUT, NUMERICS)
