"""Experts in a stored checkpoint that the engine would skip, misread, or leave in uninitialised memory.

Source for all of it: vllm 0.32.0, model_executor/layers/fused_moe/routed_experts.py:818-829,981-1268,
unless a rule says otherwise.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.roles import COUNTS
from quantcli.checkpoint.spec import FLOATS
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import Module
from quantcli.targets.base import AGAIN
from quantcli.targets.layouts import StoredModule
from quantcli.targets.vllm_family import (
    EXPERT,
    expert_count,
    last_part,
    misread_experts,
    stacked_sets,
)

_STACK = re.compile(
    r"(?P<experts>(?:.*\.)?experts)\.(?P<name>gate_up_proj|down_proj|w13|w2)(?P<end>.*)"
)
_ENDS = ("", "_scale", "_scale_inv", "_bias")  # after the name of a stack
_SCALES = ("_scale", "_scale_inv")
# Families whose loaders are their own: only the names of `_ENDS[0]` and of biases, or other ones.
_GPT_OSS = frozenset({"gpt_oss", "openai_privacy_filter"})
_OWN_NAMES = frozenset({"inkling_text", "inkling_mm_model", "dbrx"})
_LLAMA4 = frozenset({"llama4", "llama4_text"})
# Scales of stacks as ModelOpt names them, which the loader of Llama 4 renames.
# Source: vllm 0.32.0, model_executor/models/mllama4.py:1065-1103.
_OF_MODELOPT = ("_weight_scale", "_weight_scale_2", "_input_scale")
_ALIKE = 1e-5  # the loader raises if input scales of gate and up are further apart


@dataclass(frozen=True)
class StoredExperts:
    """The experts of a checkpoint.

    modules:  its sound quantized modules.
    built:    whether the engine builds a module with quantized weights, by its name; None if that is
              not known.
    """

    checkpoint: Checkpoint
    model_type: str
    modules: Mapping[str, StoredModule]
    built: Callable[[str], bool | None]

    def findings(self) -> Iterator[Finding]:
        """Errors of names, forms and scales of experts."""
        if self.model_type not in _OWN_NAMES:
            yield from self._names()
            yield from self._stacks()
        yield from self._mixed()
        modules = [
            Module(module.name, module.shape, module.numerics) for module in self.modules.values()
        ]
        for refusal in misread_experts(modules, self.model_type):
            yield failed("experts", refusal.what, f"`{refusal.module}`", refusal.fix)
        yield from self._skipped()
        yield from _input_scales(self.modules)

    def _found(self) -> Iterator[tuple[str, StoredTensor, re.Match[str]]]:
        """Tensors that stand for all experts of a layer, with the parts of their names."""
        for name, stored in self.checkpoint.tensors.items():
            match = _STACK.fullmatch(name)
            if match and not match["end"].startswith((".base_layer", ".lora")):
                yield name, stored, match

    def _names(self) -> Iterator[Finding]:
        """Stacks and their scales have the names that the loader makes parameters of."""
        own = self.model_type in _GPT_OSS
        ends = ("", "_bias") if own else _ENDS
        renamed = []
        for name, _, match in self._found():
            if match["end"] in ends:
                continue
            if self.model_type in _LLAMA4 and match["end"] in _OF_MODELOPT:
                renamed.append(name)
                continue
            fate = "stops at it: no parameter has this name"
            if own:
                fate = "skips it without a word, and serves the memory that was there"
            read = " or ".join(f"`{match['name']}{end}`" for end in ends)
            what = f"the engine reads {read} of all experts, and {fate}"
            yield failed("experts", what, f"`{name}`", AGAIN)
            return
        if renamed:
            what = f"this version cannot check {len(renamed)} scales of stacked experts"
            yield noted("experts", what, f"`{renamed[0]}`")

    def _stacks(self) -> Iterator[Finding]:
        """A stack is quantized if the engine builds it so, and only then; codes have scales."""
        codes: dict[str, str] = {}
        scaled: set[str] = set()
        for name, stored, match in self._found():
            if match["end"] in _SCALES:
                scaled.add(name.removesuffix(match["end"]))
                if len(stored.spec.shape) != 3:
                    what = (
                        f"is {stored.spec}; scales of stacked codes have three sides, or the loader "
                        "does not take them for those of all experts"
                    )
                    yield failed("experts", what, f"`{name}`", AGAIN)
            elif match["end"] == "_weight_scale" and self.model_type in _LLAMA4:
                scaled.add(name.removesuffix(match["end"]))
            elif not match["end"] and stored.spec.dtype not in FLOATS:
                codes[name] = match["experts"]
        for name in codes.keys() - scaled:
            what = (
                f"there is no `{last_part(name)}_scale`: the engine would take what memory holds for it"
            )
            yield failed("experts", what, f"`{name}`", AGAIN)
        for experts in sorted(stacked_sets(self.checkpoint.tensors)):
            first = f"{experts}.0.gate_proj"
            built = self.built(first)
            quantized = experts in codes.values()
            if built is None or built == quantized:
                continue
            what = (
                f"the engine looks up `{first}` for all experts of the layer, "
                + ("which makes them float" if quantized else "which makes them quantized")
                + (": it would take codes for weights" if quantized else ", and they are float")
            )
            fix = "name single experts in targets and in `ignore`, as the engine does"
            yield failed("experts", what, f"`{experts}`", fix)

    def _mixed(self) -> Iterator[Finding]:
        """Llama 4 has stacks or single experts. Source: vllm 0.32.0,
        model_executor/models/llama4.py:552-586: once it has seen a stack, all that follow are."""
        if self.model_type not in _LLAMA4:
            return
        stack = next((name for name, _, match in self._found() if not match["end"]), None)
        single = next((name for name in self.checkpoint.tensors if EXPERT.fullmatch(name)), None)
        if stack and single:
            what = f"`{stack}` holds all experts of a layer: the loader then leaves single ones out"
            yield failed("experts", what, f"`{single}`", AGAIN)

    def _skipped(self) -> Iterator[Finding]:
        """Single float experts of gpt-oss, which no name of its loader matches."""
        if self.model_type not in _GPT_OSS:
            return
        for name in self.checkpoint.tensors:
            match = EXPERT.fullmatch(name)
            if match and match["rest"].startswith(("gate_proj", "up_proj", "gate_up_proj")):
                what = "the loader of gpt-oss skips this name without a word, and serves the memory "
                what += "that was there"
                yield failed("experts", what, f"`{name}`", "store float experts as stacks")
                return


def _input_scales(modules: Mapping[str, StoredModule]) -> Iterator[Finding]:
    """Gate and up of an expert have one scale of their inputs."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, module in modules.items():
        scale = module.tensors.get("input_scale")
        if scale and EXPERT.fullmatch(name) and last_part(name) in {"gate_proj", "up_proj", "w1", "w3"}:
            found[name.rpartition(".")[0]][name] = float(read_tensor(scale).reshape(-1)[0])
    for scales in found.values():
        if max(scales.values()) - min(scales.values()) > _ALIKE:
            (first, a), (second, b), *_ = scales.items()
            what = f"is {a:.6g}, and that of `{second}` {b:.6g}: the engine refuses two for one input"
            yield failed("experts", what, f"`{first}.input_scale`", AGAIN)


# Families whose list of experts holds those for text and then as many for vision, of another width.
# Source: transformers 5.23.0, conversion_mapping.py:1465-1483; vllm 0.32.0,
# model_executor/models/ernie45_vl_moe.py:207-303.
_TWO_SETS = frozenset({"ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "ernie4_5_moe_vl"})


def _sizes_of_sets(checkpoint: Checkpoint) -> list[int]:
    """Numbers of experts that are alike, in the order of a layer's list; empty if it is not known."""
    config = checkpoint.text_config
    key, count = expert_count(checkpoint)
    for listed in (config.value(name) for name in COUNTS):
        if isinstance(listed, list) and listed and all(type(n) is int and n > 0 for n in listed):
            return listed
    if not key:
        return []
    return [count, count] if config.text("model_type") in _TWO_SETS else [count]


def uneven_experts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Experts that are missing, are too many, or have other tensors than the rest of their layer."""
    sets: dict[str, dict[int, dict[str, StoredTensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, stored in checkpoint.tensors.items():
        if match := EXPERT.fullmatch(name):
            sets[match["experts"]][int(match["index"])][match["rest"]] = stored
    sizes = _sizes_of_sets(checkpoint)
    count = sum(sizes)
    for experts, members in sets.items():
        every = range(max(len(members), count))
        if (gap := next((index for index in every if index not in members), None)) is not None:
            yield failed("experts", f"expert {gap} is missing", f"`{experts}`", AGAIN)
        ends = sizes if len(members) == count and gap is None else [1 + max(members)]
        for begin, end in itertools.pairwise(itertools.accumulate(ends, initial=0)):
            alike = {index: found for index, found in members.items() if begin <= index < end}
            yield from _unlike(experts, alike)
        if sizes and len(members) > count:
            what = f"there are {len(members)} experts; config.json says {count}"
            yield failed("experts", what, f"`{experts}`", AGAIN)


def _unlike(experts: str, members: Mapping[int, Mapping[str, StoredTensor]]) -> Iterator[Finding]:
    """Experts of one set with other tensors than the others."""
    reference = max(members.values(), key=len)
    for index, tensors in members.items():
        if missing := sorted(reference.keys() - tensors.keys()):
            what = f"lacks {missing[0]}, which other experts have"
            yield failed("experts", what, f"`{experts}.{index}`", AGAIN)
        for rest, stored in tensors.items():
            spec, other = stored.spec, reference[rest].spec if rest in reference else None
            if other is None or (other.dtype, other.shape) != (spec.dtype, spec.shape):
                what = f"is {spec}, unlike other experts' {other}"
                yield failed("experts", what, f"`{spec.name}`", AGAIN)
