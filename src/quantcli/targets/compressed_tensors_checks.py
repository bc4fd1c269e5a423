"""What vLLM would refuse or misread in compressed-tensors, told before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.numerics import Module
from quantcli.targets.base import Refusal
from quantcli.targets.blocks import check_blocks
from quantcli.targets.compressed_tensors_kinds import Kind, group_size
from quantcli.targets.names import EMBEDDINGS, ROUTERS, stacked_experts
from quantcli.targets.siblings import EXPERT, expert_sets, fused_groups

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
    yield from check_blocks(module, labels)
