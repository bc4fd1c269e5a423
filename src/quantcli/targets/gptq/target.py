"""`quant_method: gptq`: codes of 4 or 8 bits for kernels that compute with float inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.codes import pack_signed, unpack_signed
from quantcli.core.numerics import Module, Numerics, Parts
from quantcli.targets.base import (
    KEEP,
    Fault,
    PlannedCheckpoint,
    ScalePart,
    SplitLimits,
    StoredCheckpoint,
)
from quantcli.targets.gptq.config import FILE, METHOD, quantization_config, settings_of
from quantcli.targets.gptq.kinds import kind_of, layout_of, loads_on, word_of_zero_points
from quantcli.targets.gptq.stored import GptqCheckpoint, limits
from quantcli.targets.layouts import Layout, Sides, StoredModule
from quantcli.targets.sidecars import to_json
from quantcli.targets.vllm_family import VllmTarget, is_head

# Rows of a head, to a multiple of which vLLM pads it; its loader then finds rows along dimension 0.
# Source: vllm 0.32.0, model_executor/layers/vocab_parallel_embedding.py:36 and 515-520.
VOCABULARY = 64


class Gptq(VllmTarget):
    """Symmetric int4 and int8 in groups or whole rows; `dynamic` names the modules that are not alike.

    What is written has no act-order: columns stand in the order of their groups.
    """

    name: ClassVar[str] = METHOD
    files: ClassVar[Mapping[str, str]] = {FILE: "config"}

    def layout(self, numerics: Numerics) -> Layout:
        """qweight, scales, qzeros, g_idx: see `layout_of`."""
        return layout_of(kind_of(numerics))

    def loads_on(self, label: str) -> str:
        """Engines and hardware."""
        return loads_on(label)

    def engine_dtype(self, numerics: Numerics, part: ScalePart, serving_dtype: str) -> str:
        """The serving dtype, in which engines hold scales: vllm 0.32.0, auto_gptq.py:397-402."""
        kind_of(numerics)
        return serving_dtype

    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of `layout`, for some rows of a weight: in columns."""
        kind, k = kind_of(numerics), shape[1]
        rows, groups = len(parts["weight"]), kind.groups(k)
        group = -(-k // groups)
        words, word = -(-rows // kind.each), word_of_zero_points(kind)
        return {
            "qweight": pack_signed(parts["weight"], kind.bits).t(),
            "scales": parts["weight_scale"].t(),
            "qzeros": torch.full((groups, words), word, dtype=torch.int32),
            "g_idx": torch.arange(k, dtype=torch.int32) // group,
        }

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """The same codes; scales in float32."""
        bits, words = kind_of(numerics).bits, stored["qweight"].t().contiguous()
        return {
            "weight": unpack_signed(words, bits, words.shape[1] * 32 // bits),
            "weight_scale": stored["scales"].t().float(),
        }

    def faults(self, module: Module, names: Collection[str]) -> Iterator[Fault]:
        """By widths that groups and packed codes do not divide."""
        assert module.numerics is not None
        kind, (n, k) = kind_of(module.numerics), module.shape
        if is_head(module.name) and n % VOCABULARY:
            what = f"the engine pads a head to a multiple of {VOCABULARY} rows, and then loads none of "
            yield Fault(what + f"this layout; there are {n}", KEEP, "width")
        for side, what in ((k, "columns"), (n, "rows")):
            if side % kind.each:
                what = f"{kind.label} packs {kind.each} {what} together; there are {side}"
                yield Fault(what, KEEP, "width")
        if kind.group > 0 and k % kind.group:
            what = f"groups of {kind.group} columns do not divide {k}"
            yield Fault(what, "use `group_size: auto`, or channel", "width")

    def advise(self, modules: Sequence[Module], model_type: str = "") -> Iterator[str]:
        """None for a head of 4 bits, which vLLM serves."""
        yield from super().advise(
            [m for m in modules if not (m.numerics and m.numerics.weight.dtype == "int4")]
        )

    def config_block(self, output: PlannedCheckpoint, used: Collection[Numerics]) -> dict[str, Any]:
        """The kind of most modules, and the others under `dynamic`."""
        return quantization_config(output, {numerics: kind_of(numerics) for numerics in used})

    def split_limits(self, modules: Collection[str]) -> SplitLimits:
        """Groups and packed codes lie on one device each."""

        def reasons(module: StoredModule, sides: Sides, devices: int) -> Iterator[str]:
            assert module.numerics is not None
            return limits(kind_of(module.numerics), module.name, sides, devices)

        return reasons

    def sidecars(self, output: PlannedCheckpoint) -> dict[str, bytes]:
        """Also the block of config.json in a file of its own, which AutoGPTQ and gptqmodel prefer.

        Source: AutoGPTQ 01b8616488, auto_gptq/quantization/config.py; gptqmodel 021b65e2fd, likewise.
        """
        files = super().sidecars(output)
        used = {module.numerics for module in output.modules if module.numerics}
        return {**files, FILE: to_json(self.config_block(output, used))} if used else files

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By `quant_method` in config.json, or by a file of its own and tensors that need it."""
        return settings_of(checkpoint) is not None

    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """A checkpoint of any producer, as vLLM would load it."""
        return GptqCheckpoint(checkpoint)
