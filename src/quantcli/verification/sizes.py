"""config.json against the shapes of tensors, also of those that are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint
from quantcli.checkpoint.config.sizes import FIX, size_faults
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.findings import Finding, failed
from quantcli.targets.layouts import StoredModule


class Model(Protocol):
    """A checkpoint, and its quantized modules by name."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint."""

    @property
    def modules(self) -> Mapping[str, StoredModule]:
        """The quantized modules by name."""

    @property
    def unchecked(self) -> Mapping[str, str]:
        """The formats of quantized modules that this version cannot read, by name."""


def check_sizes(stored: Model) -> Iterator[Finding]:
    """Findings for sizes in config.json, without those that every command reports when it opens the
    checkpoint. Engines need as many rows of embeddings as there are words."""
    checkpoint = stored.checkpoint
    shapes = {
        name.removesuffix(".weight"): tensor.spec.shape
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and tensor.spec.dtype in FLOATS
    }
    shapes |= {name: module.shape for name, module in stored.modules.items()}
    shapes = {name: shape for name, shape in shapes.items() if name not in stored.unchecked}
    problems = [problem.what for problem in checkpoint.problems]
    for what in size_faults(checkpoint.text_config, shapes, served=True):
        if not any(problem.endswith(what) for problem in problems):
            yield failed("sizes", what, CONFIG, FIX)
