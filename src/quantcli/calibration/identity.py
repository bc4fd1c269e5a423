"""What a calibration is of: digests and names that say whether a stored one fits a plan."""

from __future__ import annotations

import hashlib
from typing import Any

from quantcli.calibration.store import digest_of
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.tensors import read_bytes
from quantcli.planning.plan import Plan, quantized_items
from quantcli.recipe.fields import Calibration

_SAMPLED = 4096  # tensors of which some bytes are looked at, and how many bytes of each


def asked(plan: Plan) -> dict[str, Any]:
    """All that decides what is measured, but for model and data; flat, to name what differs.

    Schemes that need no data count only where their arithmetic is shown to later layers. What a scheme
    is counts only there, and where codes are chosen against its scales.
    """
    file = plan.recipe.file
    block = (file.calibration or Calibration()).model_dump(exclude={"data"})
    found = {f"calibration.{key}": value for key, value in block.items()}
    found["target"] = [plan.recipe.target.name, plan.recipe.target.model_dump(mode="json")]
    found["the serving dtype"] = plan.serving_dtype
    if file.smooth is not None:
        found |= {f"smooth.{key}": value for key, value in file.smooth.model_dump().items()}
    shown = block["inputs"] != "float"
    learns = any(item.scheme.schedule for item in quantized_items(plan))
    measured, others = dict[str, Any](), list[Any]()
    for item in quantized_items(plan):
        how = [item.scheme.model_dump(mode="json"), list(item.held)]
        if item.module in plan.measured:
            named = shown or item.asked & item.scheme.row_stats
            measured[item.module] = [item.scheme.name if named else "", *how]
        elif shown:
            others.append([item.module, item.scheme.name, *how])
        elif file.smooth is not None or learns:
            others.append(item.module)  # a float module may read the channels that are scaled
    found["the modules that are measured, and how"] = digest_of(measured)
    found["the modules that are quantized"] = digest_of(others)
    return found


def content_digest(checkpoint: Checkpoint) -> str:
    """sha256 of the headers and of some bytes of many tensors: tells a model from one tuned from it."""
    digest = hashlib.sha256(checkpoint.fingerprint.encode())
    tensors = list(checkpoint.on_disk.values())
    step = -(-len(tensors) // _SAMPLED)
    for stored in tensors[:: max(1, step)]:
        size = min(_SAMPLED, stored.spec.nbytes)
        digest.update(read_bytes(stored, (stored.spec.nbytes - size) // 2, size))
    return digest.hexdigest()
