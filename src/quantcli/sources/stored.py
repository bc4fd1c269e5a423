"""Checkpoints in a format that this tool writes: the target that knows it decodes it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from quantcli.checkpoint.encoded import Encoded
from quantcli.sources.base import check_scales, encoded
from quantcli.targets.ascend.types import deq_from_stored
from quantcli.targets.base import Stored
from quantcli.targets.module_rows import ModuleReader


def read(stored: Stored, target: str) -> Iterator[Encoded]:
    """Every module that is sound enough to be read. target: its name."""
    for module in stored.modules.values():
        mine = [p.suffix for p in module.layout.params if p.suffix in module.tensors]
        parts = [module.tensors[suffix] for suffix in mine]
        kind, opened = f"{target} {module.layout.label}", partial(SoundRows, module)
        yield encoded(module.name, module.shape, parts, opened, kind)


class SoundRows(ModuleReader):
    """Rows of a module whose scales are looked at: InputError for one that is not positive."""

    def stored(self, start: int, count: int) -> dict[str, Tensor]:
        """As they are stored; see ModuleReader."""
        found = super().stored(start, count)
        layout = self.module.layout
        for param in layout.params:
            suffix = param.suffix
            if suffix == "deq_scale":
                scale = deq_from_stored(found[suffix])[0]
            elif param.values == "positive" and suffix.startswith("weight_scale") and suffix in found:
                scale = found[suffix].float()
            else:
                continue

            def decode(other: Tensor, suffix: str = suffix) -> Tensor:
                return layout.dequantize({**found, suffix: other})

            check_scales(scale, self.module.tensors[suffix], start, param.rows, decode)
        return found
