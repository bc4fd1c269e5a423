"""Modules that engines of the vLLM family merge into one parameter, which has one scheme."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

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
                said = ", ".join(f"{s.rpartition('.')[2]} {labels[s]}" for s in sorted(siblings))
                yield Refusal(
                    name,
                    f"the engine fuses these siblings, which must have one scheme: {said}",
                    "put them under one rule: match: [" + ", ".join(f'"*.{s}"' for s in group) + "]",
                )


def expert_sets(labels: Mapping[str, str]) -> Iterator[Refusal]:
    """The engine asks expert 0 and gives all experts of the layer its scheme."""
    first: dict[str, str] = {}
    for name, label in labels.items():
        if match := EXPERT.fullmatch(name):
            known = first.setdefault(match["experts"], name)
            if labels[known] != label:
                yield Refusal(
                    name,
                    f"experts of one layer must have one scheme: `{known}` has {labels[known]}, "
                    f"this one {label}",
                    f'match them together, such as "{match["experts"]}.*"',
                )


def sibling_set(module: str) -> str | None:
    """A name for a module and its siblings, as in `layers.0.mlp.gate_proj+up_proj`, also of experts."""
    parent, _, last = module.rpartition(".")
    group = next((group for group in FUSED if last in group), None)
    return f"{parent}.{'+'.join(group)}" if group else None


def merged_name(module: str) -> str | None:
    """The parameter into which a module is merged; None for experts, which have no shared tensors."""
    return None if EXPERT.fullmatch(module) else sibling_set(module)


def fused_widths(modules: Sequence[Module]) -> dict[str, int]:
    """Rows of every merged parameter, by its name."""
    widths: dict[str, int] = defaultdict(int)
    for module in modules:
        if module.numerics and (name := merged_name(module.name)):
            widths[name] += module.shape[0]
    return widths
