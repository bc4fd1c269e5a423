"""`quant_method: fp8`: the format of FP8 checkpoints on the Hub, such as those of DeepSeek and Qwen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.numerics import Module, Numerics, Parts
from quantcli.targets import sidecars
from quantcli.targets.base import PlannedCheckpoint, Refusal, ScalePart, StoredCheckpoint, Target
from quantcli.targets.fp8.config import METHOD, quantization_config
from quantcli.targets.fp8.kinds import LOADS_ON, label_of
from quantcli.targets.fp8.stored import Fp8Checkpoint
from quantcli.targets.vllm_family import (
    EMBEDDINGS,
    ROUTERS,
    check_blocks,
    expert_sets,
    fused_groups,
    fused_siblings,
    is_head,
    stacked_experts,
)

_FLOAT = "float"
_KEEP = "put a rule with `scheme: keep` for it before the others"


class Fp8(Target):
    """One fp8 scheme for the whole model; every other linear is named in config.json."""

    name: ClassVar[str] = "fp8"

    def label(self, numerics: Numerics) -> str:
        """Such as `fp8 tensor static`: the format has no names of its own."""
        return label_of(numerics)

    def loads_on(self, label: str) -> str:
        """Engines and hardware."""
        return LOADS_ON[label]

    def engine_dtype(self, numerics: Numerics, part: ScalePart, serving_dtype: str) -> str:
        """Float32, all of them."""
        label_of(numerics)
        return "F32"

    def bias_dtype(self, numerics: Numerics) -> str | None:
        """As it is."""
        return None

    def fused_name(self, module: str) -> str | None:
        """q, k and v; gate and up, also of experts: the engine takes one scale for all of them.

        It rounds their weights a second time where their scales differ.
        """
        return fused_siblings(module)

    def row_multiple(self, numerics: Numerics) -> int:
        """Rows that share a row of scales."""
        return numerics.weight.block[0] if numerics.weight.block else 1

    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """By suffix, with n and k of the weight:

        weight:           float8_e4m3fn [n, k].
        weight_scale:     float32 [1]; of blocks, weight_scale_inv [ceil(n / 128), ceil(k / 128)], which
                          weights are multiplied with, too.
        input_scale:      float32 [1] where inputs are static.
        """
        label_of(numerics)
        stored = {"weight": parts["weight"]}
        if numerics.weight.block:
            stored["weight_scale_inv"] = parts["weight_scale"]
        else:
            stored["weight_scale"] = parts["weight_scale"].reshape(1)
        if "input_scale" in parts:
            stored["input_scale"] = parts["input_scale"].float().reshape(1)
        return stored

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """The same codes; scales in float32, those of whole modules [1]."""
        if numerics.weight.block:
            scales = {"weight_scale": stored["weight_scale_inv"].float()}
        else:
            scales = {"weight_scale": stored["weight_scale"].float().reshape(1)}
        if "input_scale" in stored:
            scales["input_scale"] = stored["input_scale"].float().reshape(1)
        return {"weight": stored["weight"], **scales}

    def check(self, modules: Sequence[Module], tensors: Mapping[str, TensorSpec]) -> Iterator[Refusal]:
        """One scheme for the model, fused groups, experts, blocks that siblings would share."""
        yield from stacked_experts(tensors)
        labels = {m.name: label_of(m.numerics) if m.numerics else _FLOAT for m in modules}
        quantized = [module for module in modules if module.numerics]
        for module in quantized:
            first = quantized[0]
            if labels[module.name] != labels[first.name]:
                what = (
                    f"it would be {labels[module.name]}, and `{first.name}` is {labels[first.name]}: "
                    "this format has one scheme for the whole model"
                )
                yield Refusal(module.name, what, "use `target: compressed-tensors`, which can mix")
            last = module.name.rpartition(".")[2]
            if last in EMBEDDINGS or is_head(module.name):
                yield Refusal(module.name, "the engine has no fp8 embedding or head", _KEEP)
            if last in ROUTERS:
                yield Refusal(module.name, ROUTERS[last], _KEEP)
            for what, fix in check_blocks(module, labels):
                yield Refusal(module.name, what, fix)
        yield from fused_groups(
            {m.name: labels[m.name] + (f" ({m.measured})" if m.measured else "") for m in modules}
        )
        yield from expert_sets(labels)

    def advise(self, modules: Sequence[Module]) -> Iterator[str]:
        """No notes."""
        return iter(())

    def sidecars(self, output: PlannedCheckpoint) -> dict[str, bytes]:
        """config.json with `quantization_config`, and the index."""
        used = {m.numerics for m in output.modules if m.numerics}
        block = {}
        if used:
            (numerics,) = used  # `check` saw to that
            block = {"quantization_config": quantization_config(output, numerics)}
        return {**sidecars.config(output, block), **sidecars.index(output)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By what config.json calls it, or by scales that only this format has, where that was lost."""
        method = sidecars.quantization_block(checkpoint.config).get("quant_method")
        if method is not None:
            return bool(method == METHOD)
        return any(name.endswith(".weight_scale_inv") for name in checkpoint.tensors)

    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """Its modules, and what the engine would stop at or misread."""
        return Fp8Checkpoint(checkpoint)
