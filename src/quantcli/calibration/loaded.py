"""A decoder layer of a calibration: its weights as they are loaded, and what is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantcli.calibration.channels import LayerLayout, Producer, fold, norm_offset, scale_norm
from quantcli.calibration.policy import Policy
from quantcli.calibration.replay.replay import Replay, Sink
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.replay.states import States
from quantcli.calibration.replay.taps import Matrices, Matrix
from quantcli.calibration.text.dataset import Batch
from quantcli.calibration.watch import Watch, layer_watched, watched
from quantcli.planning.measured import EditFactors
from quantcli.schemes.arithmetic.observers import ChannelAmax, Observer


@dataclass(frozen=True)
class LoadedLayer:
    """The layer's module has its weights while `Skeleton.loaded` runs. states: its inputs."""

    run: CalibrationRun
    index: int
    states: States

    @property
    def name(self) -> str:
        """Of the module, in the model."""
        return self.run.skeleton.layers[self.index][0]

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.run.skeleton.layers[self.index][1]

    def watch(self, watch: Watch, sink: Sink | None, only: Sequence[int] | None = None) -> None:
        """Show all batches, or some, to observers; `sink` takes outputs."""
        batches = self.run.batches
        matrices = Matrices(self.name, self.module)
        with layer_watched(self.name, self.module, batches):
            self.run.replay.run(
                self.index,
                self.module,
                self.states,
                sink,
                tap=lambda number: watched(watch, matrices, number, batches[number]),
                only=range(len(batches)) if only is None else only,
            )

    def weight(self, matrix: Matrix) -> Tensor:
        """A matrix as it is loaded: [n, k]."""
        weight = self.module.get_parameter(matrix.parameter.removeprefix(f"{self.name}."))
        return weight[matrix.expert] if weight.dim() == 3 else weight

    def channel_amax(self, widths: Mapping[Matrix, int]) -> dict[Matrix, Tensor]:
        """max |x| of each column of some matrices, of that many; zeros where nothing was seen."""
        observers = {matrix: Observer(ChannelAmax()) for matrix in widths}
        self.watch(Watch({matrix: [observer] for matrix, observer in observers.items()}), None)
        return {
            m: o.stats()["channel_amax"] if o.tokens else torch.zeros(widths[m])
            for m, o in observers.items()
        }

    def divide(
        self, layout: LayerLayout, producer: Producer, scale: Tensor, edits: dict[str, EditFactors]
    ) -> Tensor:
        """Divide a producer's channels by scales [channels], and multiply what reads them; the scales
        as they came out, all 1 where it is a norm that cannot be scaled."""
        if producer.norm is not None:
            module = self.module.get_submodule(producer.norm.removeprefix(f"{self.name}."))
            parts, scale = self._divided_norm(producer.norm, module, scale)
            edits |= parts
        if bool((scale != 1).any()):
            fold(producer, layout.segments, scale, edits)
        return scale

    def _divided_norm(
        self, path: str, module: nn.Module, scale: Tensor
    ) -> tuple[dict[str, EditFactors], Tensor]:
        offset = norm_offset(module)
        if offset is not None:
            parts, real = scale_norm(module, offset, scale)
            stored = {suffix: self.run.skeleton.source(f"{path}.{suffix}") for suffix in parts}
            if None not in stored.values():
                new = {
                    str(stored[suffix]): EditFactors(value=tensor) for suffix, tensor in parts.items()
                }
                return new, real
        return {}, torch.ones_like(scale)


@dataclass(frozen=True)
class CalibrationRun:
    """The replay's last batch is the probe. workers: threads for work outside of the replay.

    held_targets: bytes of a layer's float outputs that may be held while it learns.
    """

    skeleton: Skeleton
    replay: Replay
    batches: list[Batch]
    probe: Batch
    policy: Policy
    device: torch.device
    workers: int = 1
    held_targets: int = 0
