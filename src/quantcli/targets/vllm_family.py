"""Rules of engines of the vLLM family: fused siblings, names, experts; targets that follow them.

Each table names the source in which its facts are read: a project, its version, a file.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import Draft, draft_of
from quantcli.checkpoint.head import head_weight
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.roles import COUNTS
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.numerics import Module, Numerics, Parts
from quantcli.targets import drafts, serving, sidecars
from quantcli.targets.base import KEEP, Fault, PlannedCheckpoint, Refusal, SplitLimits, Target
from quantcli.targets.misread import MISREAD, NO_CLASS
from quantcli.targets.serving import ServeCommand, Served

# Last parts of the names of siblings, as the engines' packed_modules_mapping tables list them.
# Sources: vllm 0.32.0, model_executor/models, such as llama.py (q, k, v; gate, up),
# bailing_moe_mtp.py:203, qwen3_5.py:307, lfm2.py:398, bert.py:371, molmo2.py:707, exaone.py:381;
# vllm-ascend 182b75ea84, quantization/modelslim_config.py:105-363 and
# models/minimax_m3/minimax_m3.py:214.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("w1", "w3"),
    ("attn_q_proj", "attn_k_proj", "attn_v_proj"),
    ("index_q_proj", "index_k_proj"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("c_fc_0", "c_fc_1"),
)
_GROUPS = {last: [group for group in FUSED if last in group] for group in FUSED for last in group}
# The engine's names for fused siblings, under which it looks up how they are quantized.
# Source: as for FUSED, the keys of packed_modules_mapping.
_FUSED_NAMES: dict[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
}
# Names under which some checkpoints store siblings that are already fused.
# Source: vllm 0.32.0, model_executor/models/phi3.py:11.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Attention of a decoder to what an encoder has put out.
# Source: vllm 0.32.0, model_executor/models/whisper.py:311-339 (q_proj, and kv_proj of k and v).
_CROSS = re.compile(r"(?:encoder_attn|cross_?attn|cross_?attention|EncDecAttention)(?:\.\w+)?$")
EXPERT = re.compile(r"(?P<experts>.*\bexperts)\.(?P<index>\d+)\.(?P<rest>.+)")


def last_part(module: str) -> str:
    """The last part of a module's name, such as `q_proj`."""
    return module.rpartition(".")[2]


def sibling_names(module: str) -> tuple[str, ...]:
    """Last parts of the names that the engine fuses with this one, in order, itself among them."""
    parent, _, last = module.rpartition(".")
    group = next((group for group in FUSED if last in group), ())
    if len(group) == 3 and _CROSS.search(parent):
        return group[1:] if last != group[0] else ()  # queries have inputs of their own
    return group


def has_later_sibling(module: str, modules: Collection[str]) -> bool:
    """Whether rows of a sibling follow those of this module in the parameter that the engine fuses."""
    parent, _, last = module.rpartition(".")
    group = sibling_names(module)
    later = group[group.index(last) + 1 :] if group else ()
    return any(f"{parent}.{sibling}" in modules for sibling in later)


def fused_groups(labels: Mapping[str, str]) -> Iterator[Refusal]:
    """Siblings with different labels: the engine raises on some, and takes the last label of others."""
    for name in labels:
        parent, _, last = name.rpartition(".")
        for group in _GROUPS.get(last, ()):
            if last != group[0] and f"{parent}.{group[0]}" in labels:
                continue  # seen from the first sibling
            siblings = {f"{parent}.{sibling}" for sibling in group} & labels.keys()
            if len({labels[sibling] for sibling in siblings}) > 1:
                listing = ", ".join(f"{s.rpartition('.')[2]} {labels[s]}" for s in sorted(siblings))
                yield Refusal(
                    name,
                    f"the engine fuses these siblings, which must have one scheme: {listing}",
                    "put them under one rule: match: [" + ", ".join(f'"*.{s}"' for s in group) + "]",
                )


def expert_sets(labels: Mapping[str, str]) -> Iterator[Refusal]:
    """Experts with different labels: the engine gives all experts of a layer the scheme of expert 0."""
    first: dict[str, str] = {}
    for name, label in labels.items():
        if match := EXPERT.fullmatch(name):
            name_of_first = first.setdefault(match["experts"], name)
            if labels[name_of_first] != label:
                yield Refusal(
                    name,
                    f"experts of one layer must have one scheme: `{name_of_first}` has "
                    f"{labels[name_of_first]}, this one {label}",
                    f'match them together, such as "{match["experts"]}.*"',
                )


def fused_siblings(module: str) -> str | None:
    """A name for a module and its siblings, as in `layers.0.mlp.gate_proj+up_proj`, also of experts."""
    group = sibling_names(module)
    return f"{module.rpartition('.')[0]}.{'+'.join(group)}" if group else None


def fused_name(module: str) -> str | None:
    """The parameter into which a module is fused; None for experts, which have no shared tensors."""
    return None if EXPERT.fullmatch(module) else fused_siblings(module)


def looked_up_as(module: str) -> str | None:
    """The engine's name for a module and its siblings; None if it looks the module up alone."""
    name = _FUSED_NAMES.get(sibling_names(module))
    if name is None or EXPERT.fullmatch(module):
        return None
    return module.removesuffix(last_part(module)) + name


EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings"})

# Linears that engines build as float whatever a checkpoint says, by the last part of their names.
# Source: vllm 0.32.0, model_executor/models: mixtral.py:111, llama4.py:101, qwen2_moe.py:148 give them
# no quant_config. qwen3_moe.py:170 would quantize its router; here a router always stays float.
# deepseek_mtp.py:87 (eh_proj), deepseek_v2.py:712 (weights_proj).
FLOAT_LINEARS = {
    "gate": "the engine builds routers as float",
    "router": "the engine builds routers as float",
    "shared_expert_gate": "the engine builds this gate as float",
    "eh_proj": "the engine builds eh_proj of draft layers as float",
    "weights_proj": "the engine builds this part of the sparse attention indexer as float",
}


# Model types whose routers the engine gives a quant_config.
# Source: vllm 0.32.0, model_executor/models: qwen3_moe.py:173, lfm2_moe.py:131, k2_horizon.py:498.
QUANTIZED_ROUTERS = frozenset(
    {"qwen3_moe", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text", "lfm2_moe", "k2_horizon"}
)


def float_linear(module: str) -> str | None:
    """The reason why engines always build a linear as float; None if they do not.

    Routers of Granite are named `router.layer`, those of Gemma 4 `router.proj`. Sources: vllm 0.32.0,
    model_executor/models: granitemoe.py:96-102,305-313; gemma4.py:325-331.
    """
    parent, _, last = module.rpartition(".")
    router = last in {"layer", "proj"} and last_part(parent) == "router"
    return FLOAT_LINEARS.get("router" if router else last)


# Sources: vllm 0.32.0, model_executor/models/bert.py:111,575-578,807,867, roberta.py:103-104.
_OUTPUTS = re.compile(r"(?:^|\.)(?:pooler|classifier|cls|qa_outputs|mlm)(?:\.|$)")


def absent_head(tensors: Mapping[str, TensorSpec]) -> str | None:
    """Name of a tied lm_head's weight: the engine looks it up although no tensor is stored."""
    if head_weight(tensors.values()):
        return None
    for name in tensors:
        parts = name.split(".")
        if parts[-1] == "weight" and len(parts) > 1 and parts[-2] in EMBEDDINGS:
            root = next((i for i, part in enumerate(parts) if part in {"model", "transformer"}), 0)
            return ".".join([*parts[:root], "lm_head", "weight"])
    return None


def mamba_1(module: str, modules: Collection[str]) -> bool:
    """Whether a module is a projection of a Mamba 1 mixer, which engines build as float.

    Mamba 2 has no x_proj. Source: vllm 0.32.0, model_executor/layers/mamba/mamba_mixer.py:104-160: no
    linear takes a quant_config; models/jamba.py and mamba.py (also falcon_mamba) use it.
    """
    parent, _, last = module.rpartition(".")
    return last in _MAMBA_1 and f"{parent}.x_proj" in modules and f"{parent}.dt_proj" in modules


_MAMBA_1 = frozenset({"in_proj", "x_proj", "dt_proj", "out_proj"})

# Weights of all experts in one tensor, in names without a part `experts`; DBRX has flat tensors.
# Source: transformers 5.23.0, conversion_mapping.py:843-869 (granitemoe, jetmoe),
# models/dbrx/modeling_dbrx.py:253-268; vllm 0.32.0, model_executor/models/step3p5.py (moe.gate_proj).
_STACKED = re.compile(
    r"(?P<block>(.*\.)?(block_sparse_moe|moe|mlp)(?=\.(input|output)_linear\b)|(.*\.)?moe(?=\.(gate|up|down)_proj\b))"
    r"\.\w+(\.weight)?"
)
_FLAT = re.compile(r".*\.experts\.mlp\.(w1|v1|w2)")


def tied_head(checkpoint: Checkpoint) -> str | None:
    """Name of the lm_head, without `.weight`, of a model that generates and stores none."""
    classes = checkpoint.config.texts("architectures")
    if not any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in classes):
        return None
    if draft_of(checkpoint):
        return None
    head = absent_head({name: stored.spec for name, stored in checkpoint.tensors.items()})
    return head.removesuffix(".weight") if head else None


def misread_experts(modules: Iterable[Module], model_type: str) -> Iterator[Refusal]:
    """A refusal of quantized experts of a family whose loader in the engine takes no single ones."""
    if model_type not in MISREAD:
        return
    what, fix = MISREAD[model_type]
    for module in modules:
        if module.numerics is not None and EXPERT.fullmatch(module.name):
            yield Refusal(module.name, f"experts of `{model_type}` cannot be quantized: {what}", fix)
            return


def stacked_experts(tensors: Mapping[str, TensorSpec], config: Settings) -> Iterator[Refusal]:
    """A refusal of experts that are stored as one tensor, which no target writes quantized.

    They would stay float, while the engine builds the experts of their layer as quantized.
    config: that of the language model.
    """
    family = config.text("model_type") or "none"
    for name, spec in tensors.items():
        if _set_of(name, spec) is None and not _as_many_as_experts(name, spec, config):
            continue
        what = f"experts are stored as one {len(spec.shape)}-D tensor {list(spec.shape)}, "
        if family in NO_CLASS:
            fix = "serve the float model with transformers"
            yield Refusal(name, f"{what}and {NO_CLASS[family]}", fix)
        else:
            yield Refusal(
                name,
                f"{what}in an order that is not known for the model type `{family:.40}`",
                "add an entry for it to EXPERTS in quantcli/sources/stacked.py, or save one 2-D tensor "
                "per expert, as save_pretrained of transformers 5 does for most families",
            )
        return


def _as_many_as_experts(name: str, spec: TensorSpec, config: Settings) -> bool:
    """Whether a tensor of an unknown name has the shape of a stack: [experts, hidden size, any], or the
    last two exchanged. A convolution has not."""
    if len(spec.shape) != 3 or "conv" in name.lower():
        return False
    count, hidden = count_in(config)[1], config.size("hidden_size")
    return spec.shape[0] == count > 1 and hidden in spec.shape[1:] and min(spec.shape) > 1


def stacked_sets(tensors: Mapping[str, StoredTensor]) -> frozenset[str]:
    """Names of sets of experts that are stored as one tensor, such as `model.layers.0.mlp.experts`."""
    sets = (_set_of(name, stored.spec) for name, stored in tensors.items())
    return frozenset(name for name in sets if name is not None)


def expert_set(module: str) -> str:
    """The name of the set of experts that a module belongs to; else its own."""
    match = EXPERT.fullmatch(module)
    return match["experts"] if match else module


def _set_of(name: str, spec: TensorSpec) -> str | None:
    """The name of the set of experts in a tensor; None if it does not hold several."""
    if len(spec.shape) < 3 and not _FLAT.fullmatch(name):
        return None
    if (match := _STACKED.fullmatch(name)) is not None:
        return f"{match['block']}.experts"
    parts = name.split(".")
    return ".".join(parts[: parts.index("experts") + 1]) if "experts" in parts else None


def is_linear(module: str, shape: tuple[int, ...]) -> bool:
    """Whether engines build a linear for a module, judged by its name and the shape of its weight."""
    last = last_part(module)
    return len(shape) == 2 and last not in EMBEDDINGS and not last.endswith(("embedding", "wpe"))


def is_head(module: str) -> bool:
    """Whether a module is an lm_head. For engines it is not a Linear: a config must name it."""
    return last_part(module) == "lm_head"


# Last parts of names of stacked experts, for which engines build a module `experts` next to them.
# Sources: vllm 0.32.0, model_executor/models/granitemoe.py:305-320 and step3p5.py (moe.gate_proj);
# transformers 5.23.0, conversion_mapping.py:853-869.
_STACKS = frozenset({"input_linear", "output_linear", "gate_proj", "up_proj", "down_proj"})


def float_linears(output: PlannedCheckpoint) -> list[str]:
    """Names of the linears that stay float, of float experts that are stacked without a name of their
    own, and of a tied lm_head, which the engine looks up."""
    floats = [module for module in output.modules if module.numerics is None]
    names = [module.name for module in floats if is_linear(module.name, module.shape)]
    stacks = [m.name for m in floats if len(m.shape) == 3 and last_part(m.name) in _STACKS]
    names += dict.fromkeys(f"{name.rpartition('.')[0]}.experts" for name in stacks)
    # the engine looks gate and up of experts up apart, also if the family has them as one matrix
    joined = {
        expert_set(name) for name in names if EXPERT.fullmatch(name) and last_part(name) in MERGED
    }
    if joined:
        names = [name for name in names if expert_set(name) not in joined] + sorted(joined)
    if head := absent_head(output.tensors):
        names.append(head.removesuffix(".weight"))
        if any(name.endswith("encoder.conv1.weight") for name in output.tensors):
            names.append("proj_out")  # of Whisper
    return names


def expert_count(checkpoint: Checkpoint) -> tuple[str, int]:
    """The key of config.json for the number of experts, and the number; "" and 0 if there is none."""
    return count_in(checkpoint.text_config)


def count_in(config: Settings) -> tuple[str, int]:
    """The same, in the config of a language model."""
    levels = filter(None, (config, config.table("ffn_config")))  # the second is of DBRX
    found = ((key, n) for level in levels for key in COUNTS if (n := level.size(key)) is not None)
    return next(found, ("", 0))


_DOWN = frozenset({"down_proj", "w2"})


def check_blocks(module: Module, names: Collection[str]) -> Iterator[Fault]:
    """Faults of a module with block scales: each part of a fused parameter begins a block.

    names: of all modules with a weight.
    Source: vllm 0.32.0, model_executor/layers/quantization/utils/fp8_utils.py:1296-1373.
    """
    if module.numerics is None or module.numerics.weight.per != "block":
        return
    assert module.numerics.weight.block is not None
    rows, columns = module.numerics.weight.block
    n, k = module.shape
    last = last_part(module.name)
    fix = "use a scheme without blocks for these modules"
    what = ""
    if n % rows and has_later_sibling(module.name, names):
        what = f"the engine fuses it with others, and its {n} rows are not a multiple of {rows}"
    elif last in {"gate_up_proj", "gate_up"} and n % (2 * rows):
        what = f"it holds two projections of {n // 2} rows, which are not a multiple of {rows}"
    elif EXPERT.fullmatch(module.name) and (k % columns if last in _DOWN else n % rows):
        width = k if last in _DOWN else n
        what = f"inner widths of experts must be multiples of {rows}; this one is {width}"
    if what:
        yield Fault(what, fix, "width")


def _rounds_inputs_somewhere(numerics: Numerics) -> bool:
    """Whether numerics are those of MXFP8 with inputs alike."""
    sides = (numerics.weight, numerics.input)
    return all(x is not None and (x.dtype, x.scale) == ("fp8_e4m3", "e8m0") for x in sides)


class VllmTarget(Target):
    """A target for an engine of the vLLM family: the checks and sidecars that formats share.

    float_label: stands for modules that stay float among the labels.
    """

    float_label: ClassVar[str] = "float"

    def labels(self, modules: Sequence[Module]) -> dict[str, str]:
        """The label of every module, by name."""
        by_id = {id(None): self.float_label}  # numerics hash slowly: each object is looked up once
        for module in modules:
            if id(module.numerics) not in by_id:
                assert module.numerics is not None
                by_id[id(module.numerics)] = self.label(module.numerics)
        return {module.name: by_id[id(module.numerics)] for module in modules}

    def fused_name(self, module: str) -> str | None:
        """q, k and v; gate and up, also of experts."""
        return fused_siblings(module)

    def engine_parts(self, numerics: Numerics) -> Parts:
        """`float_inputs` float32 [1] for MXFP8: the kernels that vLLM has for every device leave inputs
        float. Source: vllm 0.32.0, model_executor/kernels/linear/mxfp8/emulation.py:58-97, marlin.py.
        """
        return {"float_inputs": torch.ones(1)} if _rounds_inputs_somewhere(numerics) else {}

    def unlike_kernels(self, numerics: Numerics) -> str | None:
        """For MXFP8, those of Blackwell, MI350 and Intel GPUs."""
        if not _rounds_inputs_somewhere(numerics):
            return None
        return (
            "inputs of mxfp8 stay float in this run, as in vLLM's emulation; its kernels for "
            "Blackwell, MI350 and Intel GPUs round them, too, and are less near to the other model"
        )

    def check_tensors(
        self, tensors: Mapping[str, TensorSpec], config: Settings | None = None
    ) -> Iterator[Refusal]:
        """Stacked experts."""
        return stacked_experts(tensors, config or Settings({}))

    def check_family(self, modules: Sequence[Module], model_type: str) -> Iterator[Refusal]:
        """Experts of families whose loaders misread single ones."""
        return misread_experts(modules, model_type)

    def check_draft(self, draft: Draft) -> Iterator[Refusal]:
        """Drafts that the engine builds by another quantization than their own, or by none."""
        yield from drafts.refused(draft)

    def check(self, modules: Sequence[Module]) -> Iterator[Refusal]:
        """Modules one by one, fused siblings, experts."""
        labels = self.labels(modules)
        sound: set[tuple[str, str, tuple[int, ...], int]] = set()
        for module in modules:
            if module.numerics is None:
                continue
            # experts of a set come in hundreds, which differ in their number alone
            expert, kind = EXPERT.fullmatch(module.name), None
            if expert:
                kind = expert["experts"], expert["rest"], module.shape, id(module.numerics)
                if kind in sound:
                    continue
            refusals = list(self.refusals(module, labels))
            if kind and not refusals:
                sound.add(kind)
            yield from refusals
        yield from fused_groups(
            {m.name: labels[m.name] + (f" ({m.measured})" if m.measured else "") for m in modules}
        )
        yield from expert_sets(labels)
        yield from drafts.uneven(labels)

    def built_float(self, module: str, names: Collection[str]) -> str | None:
        """Embeddings, routers, Mamba 1 and others that the engine gives no quantization config."""
        if last_part(module) in EMBEDDINGS:
            return "the engine has no quantized embedding of this kind"
        if _OUTPUTS.search(module):
            return "the engine builds poolers and classifiers as float"
        if mamba_1(module, names):
            return "the engine builds Mamba 1 as float"
        return float_linear(module)

    def refusals(self, module: Module, names: Collection[str]) -> Iterator[Refusal]:
        """What the engine builds as float, and faults."""
        if module.numerics is None:
            return
        if reason := self.built_float(module.name, names):
            yield Refusal(module.name, reason, KEEP, "name")
        for fault in self.faults(module, names):
            yield Refusal(module.name, *fault)

    @abstractmethod
    def faults(self, module: Module, names: Collection[str]) -> Iterator[Fault]:
        """Reasons why the engine would not load a quantized module, from its numbers and widths.

        names: of all modules with a weight.
        """

    def advise(self, modules: Sequence[Module], model_type: str = "") -> Iterator[str]:
        """A note on a quantized head."""
        if any(module.numerics and is_head(module.name) for module in modules):
            yield "a quantized lm_head is accepted by the loader but has not been seen to run"

    def serve(self, served: Served, model: str) -> tuple[ServeCommand, ...]:
        """vLLM, and SGLang if it loads all labels: it is not known which scales of a cache it reads."""
        with_npu = served.labels and self.loaded_by("vLLM-Ascend", served.labels)
        engine = "vLLM, vLLM-Ascend" if with_npu else "vLLM"
        commands = [serving.vllm(served, model, engine=engine)]
        alone = served.cache is None and served.draft is None
        if served.labels and alone and self.loaded_by("SGLang", served.labels):
            commands.append(serving.sglang(served, model))
        return tuple(commands)

    def split_limits(self, modules: Collection[str]) -> SplitLimits:
        """Of the formats of vLLM: groups, blocks and packed codes lie on one device each."""
        from quantcli.targets.tensor_parallel import limits  # which imports this module

        return lambda module, sides, devices: limits(module, sides, devices, modules)

    def sidecars(self, output: PlannedCheckpoint) -> dict[str, bytes]:
        """config.json, with a `quantization_config` if the format has one, and the index."""
        used = {module.numerics for module in output.modules if module.numerics}
        block = self.config_block(output, used) if used or output.cache else {}
        additions = {"quantization_config": block} if block else {}
        return {**sidecars.config(output, additions), **sidecars.index(output)}

    def config_block(self, output: PlannedCheckpoint, used: Collection[Numerics]) -> dict[str, Any]:
        """The object in config.json for a checkpoint with these numerics; empty for none."""
        return {}
