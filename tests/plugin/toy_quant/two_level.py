"""Four-bit floats in groups of 16 with e4m3 scales, and a float32 scale of the whole weight on top."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.codes import code_values, scale_groups, scale_values
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding
from quantcli.core.numerics import NO_STATS, Module, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import rounding, tiles
from quantcli.schemes.base import Bias, Scheme
from quantcli.targets.base import Fault, ScalePart, StoredCheckpoint, cannot_store
from quantcli.targets.layouts import Blocks, Layout, code_sides, codes_param, module_scale, row_scale
from quantcli.targets.sidecars import quantization_block
from quantcli.targets.stored_format import StoredFormat
from quantcli.targets.vllm_family import VllmTarget

SIDE = 16
WEIGHT = Operand("fp4_e2m1", "group", block=(1, SIDE), scale="e4m3", global_scale=True)
NUMERICS = Numerics(WEIGHT, None)
NAME = "two-level"


class TwoLevel(Scheme):
    """Codes fp4 e2m1, one to a byte until they are stored; all that the engine fuses has one scale."""

    name: ClassVar[str] = "two_level"
    needs_weight_amax: ClassVar[bool] = True

    @property
    def numerics(self) -> Numerics:
        """Float inputs."""
        return NUMERICS

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes uint8 [n, k], weight_scale [n, k / 16], weight_global_scale float32 [1]."""
        largest = WEIGHT.element.largest
        whole = constants["weight_amax"] / (largest * torch.finfo(engine_dtype).max)
        whole = whole.clamp_min(torch.finfo(torch.float32).tiny)
        groups = tiles.cut(rows.float(), SIDE)
        scale = rounding.scale_of(rounding.absmax(groups) / whole, largest, engine_dtype)
        values = (groups / (scale * whole)).flatten(-2)
        numbers = torch.tensor(WEIGHT.element.values)
        codes = torch.empty(values.shape, dtype=torch.uint8)
        for start in range(0, len(values), 64):
            part = values[start : start + 64].unsqueeze(-1)
            codes[start : start + 64] = (part - numbers).abs().argmin(-1).to(torch.uint8)
        return {"weight": codes, "weight_scale": scale.squeeze(-1), "weight_global_scale": whole}

    def dequantize(self, parts: Parts) -> Tensor:
        """Float32 [n, k]."""
        numbers = torch.tensor(WEIGHT.element.values)[parts["weight"].long()]
        scale = parts["weight_scale"] * parts["weight_global_scale"]
        return numbers * tiles.spread(scale, (1, SIDE), *numbers.shape)

    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """With float inputs."""
        return rounding.linear_float_inputs(x, self.dequantize(parts), bias)


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
        codes = parts["weight"]
        return parts | {"weight": codes[:, 0::2] | codes[:, 1::2] << 4}

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """The same codes; scales in float32."""
        packed = stored["weight"]
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        return {**stored, "weight": codes, "weight_scale": scale_values(stored["weight_scale"])}

    def faults(self, module: Module, names: Collection[str]) -> Iterator[Fault]:
        """Groups that do not divide a row."""
        if module.shape[1] % SIDE:
            yield Fault("groups do not divide its rows", "keep it", "width")

    def config_block(self, output: object, used: Collection[Numerics]) -> dict[str, Any]:
        """The name."""
        return {"quant_method": NAME}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By the name."""
        return quantization_block(checkpoint.config).get("quant_method") == NAME

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
