"""What vLLM would refuse or misread in compressed-tensors, told before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from quantcli.numerics import Module
from quantcli.targets.base import Refusal
from quantcli.targets.compressed_tensors_kinds import Kind, group_size
from quantcli.targets.names import EMBEDDINGS, ROUTERS, stacked_experts
from quantcli.targets.siblings import EXPERT, FUSED, expert_sets, fused_groups
from quantcli.tensorspec import TensorSpec

FLOAT = "float"
_KEEP = "put a rule with `scheme: keep` for it before the others"


def check(
    modules: Sequence[Module], tensors: Mapping[str, TensorSpec], kinds: Mapping[str, Kind]
) -> Iterator[Refusal]:
    """kinds: of every quantized module, by name."""
    yield from stacked_experts(tensors)
    labels = {m.name: kinds[m.name].label if m.name in kinds else FLOAT for m in modules}
    for module in modules:
        if module.name in kinds:
            for what, fix in _check_module(module, kinds[module.name], labels):
                yield Refusal(module.name, what, fix)
    yield from fused_groups(
        {m.name: labels[m.name] + (f" ({m.measured})" if m.measured else "") for m in modules}
    )
    yield from expert_sets(labels)


def _check_module(module: Module, kind: Kind, labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    assert module.numerics is not None
    last = module.name.rpartition(".")[2]
    _, k = module.shape
    if last in EMBEDDINGS:
        yield "the engine has no quantized embedding of this kind", _KEEP
    if last in ROUTERS:
        yield ROUTERS[last], _KEEP
    expert = EXPERT.fullmatch(module.name) is not None
    if expert and not kind.experts:
        yield f"the engine has no {kind.label} for experts", "use a dynamic scheme for them"
    if kind.packed and k % (32 // kind.bits):
        yield (
            f"{kind.label} packs {32 // kind.bits} columns together; there are {k}",
            "use an 8-bit scheme for it",
        )
    group = group_size(module.numerics.weight)
    if group and k % group:
        yield f"groups of {group} columns do not divide {k}", "use another group_size, or channel"
    if module.numerics.weight.per == "block":
        yield from _check_blocks(module, expert, labels)


def _check_blocks(module: Module, expert: bool, labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Where blocks of the weight are cut, parts of a merged parameter must begin."""
    assert module.numerics is not None
    assert module.numerics.weight.block is not None
    rows, columns = module.numerics.weight.block
    n, k = module.shape
    parent, _, last = module.name.rpartition(".")
    group = next((group for group in FUSED if last in group), ())
    later = group[group.index(last) + 1 :] if last in group else ()
    fix = "use a scheme without blocks for these modules"
    if n % rows and any(f"{parent}.{sibling}" in labels for sibling in later):
        yield f"the engine fuses it with others, and its {n} rows are no multiple of {rows}", fix
    elif last in {"gate_up_proj", "gate_up"} and n % (2 * rows):
        yield f"it holds two projections of {n // 2} rows, which are no multiple of {rows}", fix
    elif expert and (k % columns if last in _DOWN else n % rows):
        width = k if last in _DOWN else n
        yield f"inner widths of experts must be multiples of {rows}; this one is {width}", fix


_DOWN = frozenset({"down_proj", "w2"})
