"""Experts that are stored together: a matrix of each one as a source tensor of its own, and back.

A family's checkpoints may hold one matrix of all experts of a layer as one tensor, a stack. The engine
takes quantized experts one by one, so every matrix within a stack is presented as a tensor with the
name that the engine's loader takes. EXPERTS has an entry for each family; a new family is an entry.
"""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from quantcli.checkpoint.checkpoint import CONFIG, STACKED, Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.roles import COUNTS
from quantcli.core.errors import InputError
from quantcli.sources.base import AGAIN, wrong
from quantcli.sources.expert_stack import ExpertMatrix, Stack
from quantcli.targets.vllm_family import EXPERT, expert_count

Copies = Literal["each", "all", "none", "only"]
_GATED = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class ExpertLayout:
    """How a family stores experts.

    experts: the end of the name, before the expert's number, that per-expert modules have in the
             engine's loader: `....experts.{number}.{projection}`.
    stacks:  the tensors that hold them.
    copies:  which float stacks the engine takes as they are: "each" next to single experts of other
             layers; only "all" of a checkpoint together; or "none". Others are written one by one.
             "only": it takes no float experts one by one.
    hidden:  the key of config.json for the width of the hidden states that experts read.
    """

    experts: str
    stacks: tuple[Stack, ...]
    copies: Copies = "each"
    hidden: str = "hidden_size"


def _parameters(
    experts: str,
    *,
    transposed: bool = False,
    joined: bool = False,
    copies: Copies = "each",
) -> ExpertLayout:
    """The layout of stacks `{experts}.gate_up_proj`, gate first, and `{experts}.down_proj`: parameters
    of a module for all experts, whose names do not end in `.weight`."""
    gated = ("gate_up_proj",) if joined else _GATED
    return ExpertLayout(
        experts,
        (
            Stack(f"{experts}.gate_up_proj", gated, "inputs", transposed=transposed, joined=joined),
            Stack(f"{experts}.down_proj", ("down_proj",), "outputs", transposed=transposed),
        ),
        copies,
    )


_GRANITE = ExpertLayout(
    "block_sparse_moe.experts",
    (
        Stack("block_sparse_moe.input_linear.weight", _GATED, "inputs"),
        Stack("block_sparse_moe.output_linear.weight", ("down_proj",), "outputs"),
    ),
)

# vllm 0.32.0, model_executor/layers/fused_moe/routed_experts.py:981-1082, takes both stacks and single
# experts, layer by layer; the models that use it name `mlp.experts`: qwen3_next.py:223, which
# qwen3_5.py:173 uses.
_MLP = _parameters("mlp.experts")

# Published checkpoints hold [in, out], and vllm 0.32.0 turns every stack over
# (model_executor/models/qwen3_vl_moe.py:76). transformers 5.23.0 saves [out, in], which that loader
# would misread, and loads both by their sides (conversion_mapping.py:1361-1372,
# core_model_loading.py:349-396).
_QWEN3_VL = (_parameters("mlp.experts", transposed=True), _parameters("mlp.experts", copies="none"))

# vllm 0.32.0, model_executor/models/llama4.py:398-535,552-586: takes both, but once one stack was
# seen, reads all that follows as stacks.
_LLAMA4 = _parameters("feed_forward.experts", transposed=True, copies="all")

# vllm 0.32.0, model_executor/models/step3p5.py: a list of names for stacks (`.moe.gate_proj.weight`)
# and one for single experts (`.moe.experts.E.gate_proj.`). transformers 5.23.0,
# conversion_mapping.py:1137-1152.
_STEP = ExpertLayout(
    "moe.experts",
    (
        Stack("moe.gate_proj.weight", ("gate_proj",), "inputs"),
        Stack("moe.up_proj.weight", ("up_proj",), "inputs"),
        Stack("moe.down_proj.weight", ("down_proj",), "outputs"),
    ),
)

# Rows of gate and up alternate, and the engine wants them so: they are one matrix.
# transformers 5.23.0, models/gpt_oss/modeling_gpt_oss.py:67-88.
_GPT_OSS = _parameters("mlp.experts", transposed=True, joined=True, copies="only")

# transformers 5.23.0, conversion_mapping.py:218-226,322-330: gate and up alternate.
_INKLING = ExpertLayout(
    "mlp.experts",
    (
        Stack("mlp.experts.w13_weight", _GATED, "inputs", interleaved=True),
        Stack("mlp.experts.w2_weight", ("down_proj",), "outputs"),
    ),
    "only",
)

# transformers 5.23.0, models/dbrx/modeling_dbrx.py:253-301: experts follow each other in 2-D tensors;
# w2 is multiplied with untransposed.
_DBRX = ExpertLayout(
    "ffn.experts",
    (
        Stack("ffn.experts.mlp.w1", ("gate_proj",), "inputs", flat=True),
        Stack("ffn.experts.mlp.v1", ("up_proj",), "inputs", flat=True),
        Stack("ffn.experts.mlp.w2", ("down_proj",), "outputs", transposed=True, flat=True),
    ),
    "only",
    hidden="d_model",
)

# By `model_type`: the layouts in which checkpoints of a family are found, the published one first. The
# sides of hidden states tell which one a checkpoint has.
# Sources: granitemoe: transformers 5.23.0, conversion_mapping.py:106-108,853-869 (names),
# models/granitemoe/modeling_granitemoe.py:128-165 (order of rows); vllm 0.32.0, model_executor/models:
# granitemoe.py:305-320 and granitemoehybrid.py:409-434 (names that loaders take). granitemoe_swa:
# transformers 5.23.0, models/granitemoe_swa/modeling_granitemoe_swa.py:69-80, saved as it is; vllm
# 0.32.0, model_executor/models/registry.py:129. aria_text: transformers 5.23.0,
# conversion_mapping.py:843-852, models/aria/modeling_aria.py:271-313; vllm 0.32.0,
# model_executor/models/aria.py:219-229,272-282. gemma4: transformers 5.23.0,
# models/gemma4/modeling_gemma4.py:1264-1302; vllm 0.32.0, model_executor/models/gemma4.py:646-660,
# 1405-1421 and gemma4_mm.py:1044-1057. llama4: transformers 5.23.0,
# models/llama4/modeling_llama4.py:54-84. qwen3_5_moe: transformers 5.23.0,
# models/qwen3_5_moe/modeling_qwen3_5_moe.py:831-872. minimax_m3_vl_text: transformers 5.23.0,
# models/minimax_m3_vl/modeling_minimax_m3_vl.py:189-217. step3p7, whose language model is a step3p5:
# transformers 5.23.0, models/step3p7/modeling_step3p7.py:545-580. qwen4_exp: transformers 5.23.0,
# models/qwen4_exp/modeling_qwen4_exp.py:915-947; vllm 0.32.0, models/qwen4_exp/nvidia/model.py:178.
# hy_v4: transformers 5.23.0, models/hy_v4/modeling_hy_v4.py:541-572; vllm 0.32.0,
# models/hy_v4/nvidia/model.py:430-470. diffusion_gemma: transformers 5.23.0,
# models/diffusion_gemma/modeling_diffusion_gemma.py:544-576; vllm 0.32.0,
# model_executor/models/diffusion_gemma.py:157-165,236 (the layers of gemma4.py). mistral4, zaya,
# inkling2: transformers 5.23.0, models/mistral4/modeling_mistral4.py:171-205,
# models/zaya/modeling_zaya.py:570-602, models/inkling2/modeling_inkling2.py:657-694; vllm 0.32.0,
# model_executor/models/transformers/moe.py:117-137 (names) and base.py:323-326 (tensors that
# transformers converts, and does not only rename, stay under their names on disk). muse_spark:
# transformers 5.23.0, models/muse_spark/modeling_muse_spark.py:210-268.
# openai_privacy_filter: transformers 5.23.0,
# models/openai_privacy_filter/modeling_openai_privacy_filter.py (halves of columns, as one matrix).
EXPERTS: Mapping[str, tuple[ExpertLayout, ...]] = {
    "granitemoe": (_GRANITE,),
    "granitemoeshared": (_GRANITE,),
    "granitemoehybrid": (_GRANITE,),
    "granitemoe_swa": (_parameters("block_sparse_moe.experts"),),
    "aria_text": (
        ExpertLayout(
            "mlp.experts",
            (
                Stack("mlp.experts.fc1.weight", _GATED, "inputs", transposed=True),
                Stack("mlp.experts.fc2.weight", ("down_proj",), "outputs", transposed=True),
            ),
        ),
    ),
    "dbrx": (_DBRX,),
    "diffusion_gemma": (_parameters("experts"),),
    "diffusion_gemma_text": (_parameters("experts"),),
    "gemma4": (_parameters("experts"),),
    "gemma4_text": (_parameters("experts"),),
    "gpt_oss": (_GPT_OSS,),
    "hy_v4": (_MLP,),
    "inkling_mm_model": (_INKLING,),
    "inkling_text": (_INKLING,),
    "inkling2": (replace(_INKLING, copies="none"),),
    "inkling2_text": (replace(_INKLING, copies="none"),),
    "llama4": (_LLAMA4,),
    "llama4_text": (_LLAMA4,),
    "mistral4": (_MLP,),
    "muse_spark": (replace(_MLP, copies="only", hidden="moe_hidden_size"),),
    "muse_spark_text": (replace(_MLP, copies="only", hidden="moe_hidden_size"),),
    "minimax_m3_vl_text": (_MLP,),
    "openai_privacy_filter": (_GPT_OSS,),
    "qwen3_5_moe": (_MLP,),
    "qwen3_5_moe_text": (_MLP,),
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen3_vl_moe_text": _QWEN3_VL,
    "qwen4_exp": (_MLP,),
    "qwen4_exp_text": (_MLP,),
    "step3p5": (_STEP,),
    "step3p7": (_STEP,),
    "zaya": (_MLP,),
}


def layouts_of(checkpoint: Checkpoint) -> tuple[ExpertLayout, ...]:
    """The entry of EXPERTS for a checkpoint, by the model type of its language model; else none."""
    types = (config.text("model_type") for config in (checkpoint.text_config, checkpoint.config))
    return next((EXPERTS[kind] for kind in types if kind and kind in EXPERTS), ())


def layout_of(checkpoint: Checkpoint) -> ExpertLayout | None:
    """The layout of the stacks on disk; the published one if none fits them all, or there are none."""
    layouts = layouts_of(checkpoint)
    fitting = (layout for layout in layouts if len(layouts) == 1 or _fits(layout, checkpoint))
    return next(fitting, layouts[0] if layouts else None)


def _fits(layout: ExpertLayout, checkpoint: Checkpoint) -> bool:
    """Whether the sides of all stacks are those of a layout, for the hidden size in config.json."""
    _, count = expert_count(checkpoint)
    hidden = checkpoint.text_config.size(layout.hidden)
    for name, stored in checkpoint.on_disk.items():
        stack, _ = _stack_of(name, layout)
        sides = stack.sides(stored.spec.shape, count) if stack else None
        if stack is None or sides is None:
            continue
        _, n, k = sides
        if (k if stack.hidden == "inputs" else n) != hidden:
            return False
    return True


def split_experts(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with an `ExpertMatrix` for each matrix in its stacks, in their place.

    As it is if its family has no entry in EXPERTS, or no stack. A note names the tensors. InputError
    for a stack whose shape does not fit the entry or config.json.
    """
    _must_be_counts(checkpoint)
    layout = layout_of(checkpoint)
    if layout is None:
        return checkpoint
    tensors: dict[str, StoredTensor] = {}
    notes: list[str] = []
    sets: dict[str, list[list[ExpertMatrix]]] = defaultdict(list)  # stacks by the name of their set
    for name, stored in checkpoint.tensors.items():
        stack, experts = _stack_of(name, layout)
        if stack is None:
            tensors[name] = stored
            continue
        matrices = _matrices(stored, stack, experts, checkpoint, layout.hidden)
        sets[experts].append(matrices)
        tensors |= {matrix.spec.name: matrix for matrix in matrices}
        if not notes:
            first = matrices[0].spec.name.removesuffix(".weight")
            what = f"{STACKED}, such as in `{name}`: rules match names such as `{first}`"
            notes = [note for note in checkpoint.notes if not note.startswith(STACKED)]
            notes.append(what)
    if not notes:
        return checkpoint
    _must_be_whole(checkpoint, layout, sets)
    return replace(checkpoint, tensors=tensors, undecoded=checkpoint.on_disk, notes=notes)


def _must_be_counts(checkpoint: Checkpoint) -> None:
    """InputError for a number of experts in config.json that is not a number, or a list of numbers."""
    for config in (checkpoint.config, checkpoint.text_config):
        for key in COUNTS:
            value = config.value(key)
            counts = value if isinstance(value, list) else [0 if value is None else value]
            if any(type(count) is not int or count < 0 for count in counts):
                what = f"`{key}` is {reprlib.repr(value)}, not a number of experts"
                raise InputError(what, where=str(checkpoint.path / CONFIG), fix=AGAIN)


def _stack_of(name: str, layout: ExpertLayout) -> tuple[Stack | None, str]:
    """The stack that a tensor is, and the name of the set of experts in it."""
    for stack in layout.stacks:
        prefix = name.removesuffix(stack.name)
        if prefix != name and (not prefix or prefix.endswith(".")):
            return stack, prefix + layout.experts
    return None, ""


def _must_be_whole(
    checkpoint: Checkpoint, layout: ExpertLayout, sets: Mapping[str, list[list[ExpertMatrix]]]
) -> None:
    """InputError for a set of experts that lacks a stack, whose stacks do not fit together, or that has
    tensors of single experts as well."""
    for name in checkpoint.tensors:
        match = EXPERT.fullmatch(name)
        if match and match["experts"] in sets:
            what = f"holds the experts, and `{name}` is there as well: which is right?"
            raise wrong(sets[match["experts"]][0][0].stack, what)
    for experts, stacks in sets.items():
        first = stacks[0]
        if len(stacks) < len(layout.stacks):
            names = [experts.removesuffix(layout.experts) + stack.name for stack in layout.stacks]
            missing = next(name for name in names if name not in checkpoint.tensors)
            raise wrong(first[0].stack, f"experts lack a part: `{missing}` is missing")
        for other in stacks[1:]:
            if _widths(other, layout) != _widths(first, layout):
                what = f"is {other[0].stack.spec}, and does not fit `{first[0].stack.spec.name}`, "
                raise wrong(other[0].stack, what + f"{first[0].stack.spec}")


def _widths(matrices: list[ExpertMatrix], layout: ExpertLayout) -> tuple[int, int, int]:
    """The number of experts in a stack, the width of hidden states, and that within an expert."""
    stack, _ = _stack_of(matrices[0].stack.spec.name, layout)
    assert stack is not None
    n, k = matrices[0].spec.shape
    experts, rows = len(matrices) // len(stack.projections), 2 if stack.joined else 1
    return (experts, k, n // rows) if stack.hidden == "inputs" else (experts, n, k)


def _matrices(
    stored: StoredTensor, stack: Stack, experts: str, checkpoint: Checkpoint, key_of_hidden: str
) -> list[ExpertMatrix]:
    config = checkpoint.text_config
    key, count = expert_count(checkpoint)
    matrices = stack.matrices(stored, experts, count)
    expected = f"is {stored.spec}; `{config.text('model_type')!s:.40}` stores experts as {stack}"
    if matrices is None:
        raise wrong(stored, expected)
    if key and len(matrices) != count * len(stack.projections):
        what = f"{expected}, and {CONFIG} has {count} in `{key}`"
        raise wrong(stored, what, f"{AGAIN}, with the {CONFIG} that belongs to it")
    hidden, (n, k) = config.size(key_of_hidden), matrices[0].spec.shape
    width = k if stack.hidden == "inputs" else n
    if hidden is not None and width != hidden:
        side = "k" if stack.hidden == "inputs" else "n"
        what = f"{expected}, with {side} the `{key_of_hidden}` of {CONFIG}, {hidden}"
        raise wrong(stored, what, f"{AGAIN}, with the {CONFIG} that belongs to it")
    return matrices


@dataclass(frozen=True)
class MergedExperts:
    """A stack that a family's library expects, and the stored tensors that make it up in order."""

    name: str
    stack: Stack
    matrices: tuple[StoredTensor, ...]


def merged_experts(checkpoint: Checkpoint) -> Iterator[MergedExperts]:
    """The stacks that tensors with names of single experts make up; the inverse of `split_experts`.

    They have the published layout. A set that lacks a matrix of an expert makes up none.
    """
    layouts = layouts_of(checkpoint)
    if not layouts:
        return
    layout = layouts[0]
    sets: dict[str, dict[tuple[int, str], StoredTensor]] = defaultdict(dict)
    for name, stored in checkpoint.tensors.items():
        match = EXPERT.fullmatch(name.removesuffix(".weight"))
        if match and name.endswith(".weight") and match["experts"].endswith(layout.experts):
            sets[match["experts"]][int(match["index"]), match["rest"]] = stored
    for experts, members in sets.items():
        count = 1 + max(expert for expert, _ in members)
        for stack in layout.stacks:
            if count > len(members):
                continue
            keys = [(expert, name) for expert in range(count) for name in stack.projections]
            matrices = [members[key] for key in keys if key in members]
            if len(matrices) == len(keys):
                prefix = experts.removesuffix(layout.experts)
                yield MergedExperts(prefix + stack.name, stack, tuple(matrices))
