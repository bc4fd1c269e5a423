"""Names of modules and tensors that several engines treat alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.numerics import Module
from quantcli.targets.base import Refusal

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
