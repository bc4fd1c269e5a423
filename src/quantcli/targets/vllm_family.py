"""What engines of the vLLM family share: fused siblings, names, experts, blocks that fusion cuts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.findings import Finding, failed
from quantcli.core.numerics import Module
from quantcli.targets.base import Refusal

# Last parts of the names of siblings, as the engines' packed_modules_mapping tables list them.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("w1", "w3"),
    ("attn_q_proj", "attn_k_proj", "attn_v_proj"),
    ("index_q_proj", "index_k_proj"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("c_fc_0", "c_fc_1"),
)
# Names under which some checkpoints store siblings already merged.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERT = re.compile(r"(?P<experts>.*\bexperts)\.(?P<index>\d+)\.(?P<rest>.+)")


def fused_groups(labels: Mapping[str, str]) -> Iterator[Refusal]:
    """Siblings that the engine merges must agree; it raises on some and takes the last of others."""
    for group in FUSED:
        first = group[0]
        for name in labels:
            parent, _, last = name.rpartition(".")
            if last not in group:
                continue
            if last != first and f"{parent}.{first}" in labels:
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
    """The engine asks expert 0 and gives all experts of the layer its scheme."""
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
    parent, _, last = module.rpartition(".")
    group = next((group for group in FUSED if last in group), None)
    return f"{parent}.{'+'.join(group)}" if group else None


def fused_name(module: str) -> str | None:
    """The parameter into which a module is merged; None for experts, which have no shared tensors."""
    return None if EXPERT.fullmatch(module) else fused_siblings(module)


def fused_widths(modules: Sequence[Module]) -> dict[str, int]:
    """Rows of every merged parameter, by its name."""
    widths: dict[str, int] = defaultdict(int)
    for module in modules:
        if module.numerics and (name := fused_name(module.name)):
            widths[name] += module.shape[0]
    return widths


EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings"})

# Linears that engines build as float whatever a checkpoint says, by the last part of their names.
ROUTERS = {
    "gate": "the engine builds routers as float",
    "router": "the engine builds routers as float",
    "shared_expert_gate": "the engine builds this gate as float",
}


def absent_head(tensors: Mapping[str, TensorSpec]) -> str | None:
    """Name of a tied lm_head's weight: the engine looks it up although no tensor is stored."""
    if any(name.endswith(("lm_head.weight", "lm_head.weight_packed")) for name in tensors):
        return None
    for name in tensors:
        parts = name.split(".")
        if parts[-1] == "weight" and len(parts) > 1 and parts[-2] in EMBEDDINGS:
            root = next((i for i, part in enumerate(parts) if part in {"model", "transformer"}), 0)
            return ".".join([*parts[:root], "lm_head", "weight"])
    return None


def stacked_experts(tensors: Mapping[str, TensorSpec]) -> Iterator[Refusal]:
    """Experts that are stored as one tensor, which no target of this version writes."""
    for name, spec in tensors.items():
        if len(spec.shape) >= 3 and "experts" in name.split("."):
            yield Refusal(
                name,
                f"experts are stored as one {len(spec.shape)}-D tensor {list(spec.shape)}",
                "this version takes one 2-D tensor per expert, as save_pretrained of transformers 5 "
                "writes most families",
            )
            return


def is_linear(module: Module) -> bool:
    """Whether engines build it as a linear, as far as its name and shape tell."""
    last = module.name.rpartition(".")[2]
    return len(module.shape) == 2 and last not in EMBEDDINGS and not last.endswith(("embedding", "wpe"))


def is_head(name: str) -> bool:
    """An lm_head, which engines do not take for a Linear: it must be named."""
    return name.rpartition(".")[2] == "lm_head"


_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")

_AGAIN = "convert the model again"


def uneven_experts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Experts that are missing, are too many, or have other tensors than the rest of their layer."""
    sets: dict[str, dict[int, dict[str, StoredTensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, stored in checkpoint.tensors.items():
        if match := EXPERT.fullmatch(name):
            sets[match["experts"]][int(match["index"])][match["rest"]] = stored
    count = next((v for key in _COUNTS if isinstance(v := checkpoint.text_config.get(key), int)), None)
    for experts, members in sets.items():
        full = max(members.values(), key=len)
        for index in range(max(len(members), count or 0)):
            if index not in members:
                yield failed("experts", f"expert {index} is missing", f"`{experts}`", _AGAIN)
                break
            if absent := sorted(full.keys() - members[index].keys()):
                what = f"lacks {absent[0]}, which other experts have"
                yield failed("experts", what, f"`{experts}.{index}`", _AGAIN)
            for rest, stored in members[index].items():
                like = full.get(rest)
                if like is None or (like.spec.dtype, like.spec.shape) != (
                    stored.spec.dtype, stored.spec.shape
                ):  # fmt: skip
                    what = f"is {stored.spec}, unlike other experts' {like and like.spec}"
                    yield failed("experts", what, f"`{stored.spec.name}`", _AGAIN)
        if count is not None and len(members) > count:
            what = f"there are {len(members)} experts; config.json says {count}"
            yield failed("experts", what, f"`{experts}`", _AGAIN)


_DOWN = frozenset({"down_proj", "w2"})


def check_blocks(module: Module, labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What an engine refuses, and what to do: parts of a merged parameter must begin with a block.

    labels: of all modules, by name. Nothing for a module whose scales are not of blocks.
    """
    if module.numerics is None or module.numerics.weight.per != "block":
        return
    assert module.numerics.weight.block is not None
    rows, columns = module.numerics.weight.block
    n, k = module.shape
    parent, _, last = module.name.rpartition(".")
    group = next((group for group in FUSED if last in group), ())
    later = group[group.index(last) + 1 :] if last in group else ()
    fix = "use a scheme without blocks for these modules"
    if n % rows and any(f"{parent}.{sibling}" in labels for sibling in later):
        yield f"the engine fuses it with others, and its {n} rows are not a multiple of {rows}", fix
    elif last in {"gate_up_proj", "gate_up"} and n % (2 * rows):
        yield f"it holds two projections of {n // 2} rows, which are not a multiple of {rows}", fix
    elif EXPERT.fullmatch(module.name) and (k % columns if last in _DOWN else n % rows):
        width = k if last in _DOWN else n
        yield f"inner widths of experts must be multiples of {rows}; this one is {width}", fix
