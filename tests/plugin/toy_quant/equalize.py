"""Cross-layer equalization: columns of weights get similar largest values, by powers of two."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from quantcli.calibration.methods.base import LayerWork, Method


class Equalize(Method):
    """Columns that read one producer are multiplied by s, and its channels are divided by s."""

    name: ClassVar[str] = "equalize"
    results: ClassVar[tuple[str, ...]] = ("equalization",)
    edited_as: ClassVar[str] = "equalized"
    strength: Annotated[float, Field(gt=0, le=1)] = 0.5  # 1: all columns get one largest value

    def edit(self, work: LayerWork) -> None:
        """s = (geometric mean of all amax / amax of the column)^strength, rounded to 2^n."""
        groups = work.report.results[self.edited_as] = []
        for producer in work.layout.producers():
            amax = torch.zeros(len(producer.used))
            for reader in producer.readers:
                columns = work.layer.weight(reader.matrix).float().abs().amax(0).cpu()
                amax.scatter_reduce_(0, reader.channels, columns, "amax")
            used = producer.used & (amax > 0)
            log = amax[used].log2()
            exponent = torch.zeros(len(amax))
            exponent[used] = (self.strength * (log.mean() - log)).round()
            scale = work.layer.divide(producer, exponent.exp2(), work.edits)
            if bool((scale != 1).any()):
                ends = {"least": float(scale.min()), "most": float(scale.max())}
                groups.append({"producer": producer.name, **ends})
