"""Whether the experts of each layer are whole, and like each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.core.findings import Finding, failed
from quantcli.targets.siblings import EXPERT

_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_AGAIN = "convert the model again"


def uneven_experts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Experts that are missing, are too many, or have other tensors than the rest of their layer."""
    sets: dict[str, dict[int, dict[str, StoredTensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, stored in checkpoint.tensors.items():
        if match := EXPERT.fullmatch(name):
            sets[match["experts"]][int(match["index"])][match["rest"]] = stored
    wanted = next((v for key in _COUNTS if isinstance(v := checkpoint.text_config.get(key), int)), None)
    for experts, members in sets.items():
        full = max(members.values(), key=len)
        for index in range(max(len(members), wanted or 0)):
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
        if wanted is not None and len(members) > wanted:
            what = f"there are {len(members)} experts; config.json says {wanted}"
            yield failed("experts", what, f"`{experts}`", _AGAIN)
