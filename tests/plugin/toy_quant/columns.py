"""Int8 weights that lie as [k, n], under names that no other format has."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.findings import Finding
from quantcli.core.numerics import Module, Numerics, Operand, Parts
from quantcli.targets.base import Fault, PlannedCheckpoint, ScalePart, StoredCheckpoint, cannot_store
from quantcli.targets.layouts import FLOAT_PARAM, Blocks, Layout, Param
from quantcli.targets.sidecars import quantization_block
from quantcli.targets.stored_format import StoredFormat
from quantcli.targets.vllm_family import VllmTarget, is_linear

NAME = "columns"
NUMERICS = Numerics(Operand("int8", "channel"), None)


def _weight(blocks: Blocks) -> Tensor:
    return blocks["codes"].t().float() * blocks["scales"].t().float()


LAYOUT = Layout(
    "int8 columns",
    NUMERICS.weight,
    (
        Param("codes", ("I8",), lambda n, k: (k, n), "codes", axis=1, part="weight"),
        Param("scales", FLOAT_PARAM, lambda n, k: (1, n), "positive", axis=1, part="weight_scale"),
    ),
    _weight,
    sides=lambda shape: (shape[1], shape[0]),
)


class Columns(VllmTarget):
    """The rows of a weight are columns."""

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
        """The serving dtype."""
        return serving_dtype

    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """codes int8 [k, n], scales [1, n]."""
        return {"codes": parts["weight"].t(), "scales": parts["weight_scale"].t()}

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """The same codes; scales in float32."""
        return {"weight": stored["codes"].t(), "weight_scale": stored["scales"].t().float()}

    def faults(self, module: Module, names: Collection[str]) -> Iterator[Fault]:
        """None."""
        yield from ()

    def config_block(self, output: PlannedCheckpoint, used: Collection[Numerics]) -> dict[str, Any]:
        """The name."""
        return {"quant_method": NAME}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By the name."""
        return quantization_block(checkpoint.config).text("quant_method") == NAME

    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """Modules with `codes`."""
        return ColumnsCheckpoint(checkpoint)


class ColumnsCheckpoint(StoredFormat):
    """Modules with `codes`; a linear with a `weight` is float."""

    def read(self) -> list[Finding]:
        """Nothing can be wrong."""
        return []

    def check_parameters(self) -> Iterator[Finding]:
        """By the layout."""
        for module, tensors in sorted(self.by_module.items()):
            if "codes" in tensors:
                self.checked["parameters"] += 1
                self.labels[module] = LAYOUT.label
                yield from self.check_layout(module, LAYOUT, NUMERICS)
            elif "weight" in tensors and is_linear(module, tensors["weight"].spec.shape):
                self.checked["parameters"] += 1
                self.labels[module] = self.float_label
