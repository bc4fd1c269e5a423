"""Float experts that are stored together, next to quantized modules: the engine reads them in the order
of their family."""

from __future__ import annotations

from collections.abc import Iterator

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding, failed, of_error
from quantcli.sources.expert_stack import ExpertMatrix
from quantcli.sources.stacked import layout_of, split_experts
from quantcli.targets.base import AGAIN


def check_stacks(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Errors of stacks that the engine would take for others, by their sides."""
    try:
        split = split_experts(checkpoint)
    except InputError as error:
        yield of_error("experts", error)
        return
    stacks = (stored.stack for stored in split.tensors.values() if isinstance(stored, ExpertMatrix))
    stack = next((stored for stored in stacks if stored.spec.dtype in FLOATS), None)
    layout = layout_of(checkpoint)
    if stack is not None and layout is not None and layout.copies == "none":
        what = (
            f"is {stack.spec}: the engine does not take a stack in this order, and would read it "
            "with its sides exchanged or not at all"
        )
        yield failed("experts", what, f"`{stack.spec.name}`", f"store experts one by one: {AGAIN}")
