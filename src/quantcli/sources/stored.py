"""Checkpoints in a format that this tool writes: the target that knows it decodes it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from quantcli.encoded import Encoded
from quantcli.sources.base import encoded
from quantcli.targets.base import Stored
from quantcli.verify.blocks import ModuleReader


def read(stored: Stored, target: str) -> Iterator[Encoded]:
    """Every module that is sound enough to be read. target: its name."""
    for module in stored.modules.values():
        mine = [p.suffix for p in module.layout.params if p.suffix in module.tensors]
        parts = [module.tensors[suffix] for suffix in mine]
        kind, opened = f"{target} {module.layout.label}", partial(ModuleReader, module)
        yield encoded(module.name, module.shape, parts, opened, kind)
