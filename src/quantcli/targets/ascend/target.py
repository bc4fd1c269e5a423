"""vLLM-Ascend: safetensors with `quant_model_description.json` (the ModelSlim format)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError
from quantcli.core.numerics import Module, Numerics, Parts, multiplier
from quantcli.targets import sidecars
from quantcli.targets.ascend.loader import DESCRIPTION, FLOAT, LISTED_EXPERTS, float_only, skip_rule
from quantcli.targets.ascend.stored import AscendCheckpoint
from quantcli.targets.ascend.tensor_parallel import unfit, unsplit
from quantcli.targets.ascend.types import TAGS, TRANSFORM, Tag, deq_from_stored, deq_to_store
from quantcli.targets.base import PlannedCheckpoint, Refusal, ScalePart, StoredCheckpoint, Target
from quantcli.targets.tensor_parallel import splits_inputs
from quantcli.targets.vllm_family import (
    EXPERT,
    MERGED,
    absent_head,
    expert_sets,
    fused_groups,
    fused_name,
    fused_widths,
    stacked_experts,
)

# npu_quant_matmul takes at most this many input features, and output features on one device.
MAX_SIDE = 65535


class Ascend(Target):
    """The format that vLLM-Ascend loads; every tensor is described, none is left to a default."""

    name: ClassVar[str] = "ascend"

    tp: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="tensor parallel size to serve with; 1 allows transforms of o_proj and down_proj",
    )

    def label(self, numerics: Numerics) -> str:
        """The quantization type in the description, such as W8A8_DYNAMIC."""
        return self._tag(numerics).label

    def loads_on(self, label: str) -> str:
        """First engine version and hardware."""
        return next(tag.loads_on for tag in TAGS.values() if tag.label == label)

    def engine_dtype(self, numerics: Numerics, part: ScalePart, serving_dtype: str) -> str:
        """Loaders round to the serving dtype: input_scale, and weight_scale of all int8 but W8A8.

        W8A8 knows weights by deq_scale alone, which is float32 by value, and fp8 keeps float32.
        """
        in_float32 = part == "weight_scale" and self._tag(numerics).scale_in_float32
        return "F32" if in_float32 else serving_dtype

    def bias_dtype(self, numerics: Numerics) -> str | None:
        """Float32 beside quant_bias, as the reference producer has it; the value is the same."""
        return "F32" if self._tag(numerics).static else None

    def fused_name(self, module: str) -> str | None:
        """The engine keeps one input_scale and input_offset for q, k and v: whichever came last."""
        return fused_name(module)

    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """weight [n, k], and by the engine's registered parameters:

        weight_scale, weight_offset: float32 [n, 1]. The offset is zero. W8A16 multiplies with it and
        would find uninitialised memory; the others register it as a parameter.
        input_scale, input_offset: float32 [1]; quant_bias: int32 [n]; deq_scale: [n], see deq_to_store.
        left_trans [l, l], right_trans [r, r] in the serving dtype; clip_ratio: float32 [1].
        """
        tag = self._tag(numerics)
        stored = {"weight": parts["weight"]}
        if tag.stores_scale:
            scale = parts["weight_scale"].float()
            stored |= {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
        if tag.static:
            serving = parts["input_scale"].dtype
            stored["input_scale"] = parts["input_scale"].float()
            stored["input_offset"] = parts["input_offset"]
            stored["quant_bias"] = parts["quant_bias"]
            stored["deq_scale"] = deq_to_store(parts["deq_scale"], serving)
        if numerics.transform:
            stored |= {name: parts[name] for name in TRANSFORM}
        return stored

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """Codes and scales as stored; W8A8's weight_scale is what its deq_scale amounts to."""
        tag = self._tag(numerics)
        parts = {"weight": stored["weight"]}
        if tag.stores_scale:
            parts["weight_scale"] = stored["weight_scale"]
        if tag.static:
            deq, serving = deq_from_stored(stored["deq_scale"])
            input_scale = stored["input_scale"].to(serving)
            if not tag.stores_scale:
                parts["weight_scale"] = deq.unsqueeze(-1) * multiplier(input_scale)
            parts |= {"deq_scale": deq, "quant_bias": stored["quant_bias"]}
            parts |= {"input_scale": input_scale, "input_offset": stored["input_offset"]}
        if numerics.transform:
            parts |= {name: stored[name] for name in TRANSFORM}
        return parts

    def check(self, modules: Sequence[Module], tensors: Mapping[str, TensorSpec]) -> Iterator[Refusal]:
        """Fused groups, experts, MLA, sizes and the loader's skip rule."""
        yield from stacked_experts(tensors)
        tags = self._tags(modules)
        for module in modules:
            if module.name in tags:
                yield from self.refusals(module)
        if self.tp is not None:
            for module in modules:
                yield from unsplit(module, self.tp)
        labels = {m.name: tags[m.name].label if m.numerics else FLOAT for m in modules}
        yield from fused_groups(
            {m.name: labels[m.name] + (f" ({m.measured})" if m.measured else "") for m in modules}
        )
        yield from expert_sets(labels)
        yield from skip_rule(labels)

    def advise(self, modules: Sequence[Module]) -> Iterator[str]:
        """Fused widths over the matmul's limit, and a quantized head."""
        wide = {name: n for name, n in fused_widths(modules).items() if n > MAX_SIDE}
        if wide:
            name, n = max(wide.items(), key=lambda item: item[1])
            yield (
                f"`{name}` has {n} rows once the engine has fused it; the matmul takes {MAX_SIDE}: "
                f"serve with tensor parallel size {-(-n // MAX_SIDE)} or more"
            )
        rotated = [m.name for m in modules if m.numerics and m.numerics.transform]
        if any(map(splits_inputs, rotated)):
            yield "loads on one device alone: inputs of o_proj or down_proj are transformed"
        for module in modules:
            if module.numerics and module.name.rpartition(".")[2] == "lm_head":
                yield "a quantized lm_head is accepted by the loader but has not been seen to run"

    def sidecars(self, output: PlannedCheckpoint) -> dict[str, bytes]:
        """Description, config.json without quantization, index."""
        return {
            DESCRIPTION: (sidecars.flat_json(self._description(output)) + "\n").encode(),
            **sidecars.config(output, {}),
            **sidecars.index(output),
        }

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By the description, or by tensors that only this format has, where it was lost."""
        ours = (".weight_offset", ".deq_scale", ".quant_bias")
        described = (checkpoint.path / DESCRIPTION).exists()
        return described or any(name.endswith(ours) for name in checkpoint.tensors)

    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """Its modules, and what the engine would stop at or misread."""
        return AscendCheckpoint(checkpoint)

    def _tag(self, numerics: Numerics) -> Tag:
        if numerics not in TAGS:
            raise InputError(
                f"target `{self.name}` cannot store {numerics}",
                fix="see `quantcli inspect --support` for what goes together",
            )
        return TAGS[numerics]

    def _tags(self, modules: Sequence[Module]) -> dict[str, Tag]:
        """The tag of every quantized module. Hashing numerics is slow, and few are different."""
        tag_cache: dict[int, Tag] = {}
        tags = {}
        for module in modules:
            if module.numerics is not None:
                key = id(module.numerics)
                if key not in tag_cache:
                    tag_cache[key] = self._tag(module.numerics)
                tags[module.name] = tag_cache[key]
        return tags

    def refusals(self, module: Module) -> Iterator[Refusal]:
        """Its name, its sizes, and how it is split over devices."""
        if module.numerics is None:
            return
        tag = self._tag(module.numerics)
        if reason := float_only(module.name):
            yield Refusal(module.name, reason, _KEEP)
        if EXPERT.fullmatch(module.name) and not tag.experts:
            yield Refusal(
                module.name,
                f"the engine has no {tag.label} for experts",
                "use w8a8_dynamic for them",
            )
        n, k = module.shape
        if tag.label.startswith("W4A4") and k % 8:
            yield Refusal(
                module.name,
                f"{tag.label} takes inputs in multiples of 8; there are {k}",
                "use w8a8_dynamic for it",
            )
        elif module.numerics.transform and (reason := unfit(module.name, k, self.tp)):
            yield Refusal(module.name, f"{tag.label}: {reason}", "use w8a8_dynamic for it")
        if max(n, k) > MAX_SIDE:
            yield Refusal(
                module.name, f"[{n}, {k}] is over the matmul's limit of {MAX_SIDE} a side", _KEEP
            )

    def _description(self, output: PlannedCheckpoint) -> dict[str, object]:
        """One entry per tensor, by the checkpoint's own names, and those that only the engine asks."""
        labels = {name: tag.label for name, tag in self._tags(output.modules).items()}
        used = set(labels.values())
        table: dict[str, object] = {
            "version": "1.0.0",
            "model_quant_type": next((t.label for t in TAGS.values() if t.label in used), FLOAT),
            "metadata": {},
            "group_size": 0,
            "optional": {},
        }
        for name in sorted(output.tensors):
            owner, _, suffix = name.rpartition(".")
            table[name] = FLOAT if suffix == "bias" else labels.get(owner, FLOAT)
        if head := absent_head(output.tensors):
            table[head] = FLOAT
        for module in output.modules:
            # stored merged; for some models the engine still asks for the siblings by name
            parent, _, last = module.name.rpartition(".")
            for sibling in MERGED.get(last, ()):
                table.setdefault(f"{parent}.{sibling}.weight", labels.get(module.name, FLOAT))
        if output.config.get("model_type") not in LISTED_EXPERTS:
            for module in output.modules:
                if match := EXPERT.fullmatch(module.name):
                    table[f"{match['experts']}.weight"] = labels.get(module.name, FLOAT)
        return table


_KEEP = "put a rule with `scheme: keep` for it before the others"
