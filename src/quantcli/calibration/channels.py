"""A layer in the names of the checkpoint: modules that share an input, channels that can be scaled."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.calibration.flow import ChannelSource, Flow
from quantcli.calibration.replay.skeleton import Segment, Segments
from quantcli.calibration.replay.taps import Matrix
from quantcli.planning.measured import EditFactors

_EXPERT = re.compile(r"(?<=experts\.)(?:expert_)?\d+(?=\.)")


@dataclass(frozen=True)
class ChannelReader:
    """A matrix whose columns read some channels. channels: int64 [k], the channel of each column."""

    matrix: Matrix
    channels: Tensor


@dataclass(frozen=True)
class Producer:
    """The source of channels that can be scaled: a norm (`norm`), or rows of a matrix (`matrix`)."""

    readers: tuple[ChannelReader, ...]
    used: Tensor  # bool [channels]: those that a reader reads
    norm: str | None = None  # a module
    matrix: Matrix | None = None
    head_width: int = 0  # of values of attention, that reach the readers as they are; else 0

    @property
    def name(self) -> str:
        """Its name in reports."""
        if self.norm is not None:
            return self.norm
        assert self.matrix is not None
        expert = f"[{self.matrix.expert}]" if self.matrix.expert else ""
        return self.matrix.parameter.removesuffix(".weight") + expert


class LayerLayout:
    """Data flow in a layer, as one forward has shown it."""

    def __init__(
        self, segments: Segments, flow: Flow, together: Iterable[Collection[str]] = ()
    ) -> None:
        """together: sets of parameters of experts that are all shown the very same tokens."""
        self.segments = segments
        self._flow = flow
        self._together = together

    def matrices(self) -> Iterator[tuple[Matrix, list[Segment]]]:
        """Every matrix of the layer, each expert on its own, and the stored weights in it."""
        for parameter, experts in self.segments.items():
            for expert, segments in enumerate(experts):
                yield Matrix(parameter, expert), segments

    def modules(self, matrices: Iterable[Matrix]) -> list[str]:
        """The stored weights in some matrices."""
        return [s.module for m in matrices for s in self.segments[m.parameter][m.expert]]

    def leaders(self) -> dict[Matrix, Matrix]:
        """For every matrix that was used: the first one with the same input."""
        first: dict[tuple[object, int], Matrix] = {}
        leaders: dict[Matrix, Matrix] = {}
        for parameter, key in self._flow.inputs.items():
            for expert in range(len(self.segments.get(parameter, []))):
                matrix = Matrix(parameter, expert)
                leaders[matrix] = first.setdefault((key, expert), matrix)
        for parameters in self._together:
            for source in self._flow.norms.values():  # what reads a norm reads the tokens
                read = self._parameters(source, alike=True)
                matrices = [
                    matrix
                    for matrix, _ in self.matrices()
                    if matrix.parameter in parameters and matrix.parameter in read
                ]
                leaders |= dict.fromkeys(matrices, matrices[0]) if matrices else {}
        return leaders

    def producers(self) -> Iterator[Producer]:
        """Sources of channels that can be scaled without changing the layer's function, norms first."""
        for name, source in self._flow.norms.items():
            if not bool(source.escaped.any()) and source.readers:
                readers = self._readers(source, None, alike=True)
                yield Producer(readers, torch.ones_like(source.escaped), norm=name)
        for name, source in self._flow.rows.items():
            for expert in range(len(self.segments.get(name, []))):
                readers = self._readers(source, expert if source.experts else None)
                used = torch.zeros_like(source.escaped)
                for reader in readers:
                    used[reader.channels] = True
                if bool(used.any()) and not bool((used & source.escaped).any()):
                    gated = any(bool(used[channel]) for channel in source.gated)
                    width = 0 if gated else source.width
                    yield Producer(readers, used, matrix=Matrix(name, expert), head_width=width)

    def rounded_again(self, producer: Producer, quantized: Collection[str]) -> bool:
        """Whether matrices that stay float are changed if a producer's channels are scaled."""
        modules = self.modules(reader.matrix for reader in producer.readers)
        if producer.matrix is not None:
            modules += self.modules([producer.matrix])
        return any(module not in quantized for module in modules)

    def _readers(
        self, source: ChannelSource, expert: int | None, *, alike: bool = False
    ) -> tuple[ChannelReader, ...]:
        """Every matrix that reads a source. expert, alike: see `_parameters`; None for all experts."""
        return tuple(
            ChannelReader(Matrix(parameter, number), channels)
            for parameter, channels in self._parameters(source, alike=alike).items()
            for number in range(len(self.segments[parameter]))
            if expert is None or len(self.segments[parameter]) == 1 or number == expert
        )

    def _parameters(self, source: ChannelSource, *, alike: bool) -> dict[str, Tensor]:
        """The parameters that read a source, with the channel of each column.

        alike: also those of experts that had no token, if their like of another expert reads it. What
        had tokens and did not read the source is not like it, such as `ffn.2` next to `ffn.0`.
        """
        shapes = {shape_of(name): channels for name, channels in source.readers.items()}
        found: dict[str, Tensor] = {}
        for parameter in self.segments:
            channels = source.readers.get(parameter)
            if channels is None and alike and parameter not in self._flow.inputs:
                channels = shapes.get(shape_of(parameter))
            if channels is not None:
                found[parameter] = channels
        return found


def shape_of(parameter: str) -> str:
    """A parameter's name without the number of an expert: the same for all experts of a layer."""
    return _EXPERT.sub("*", parameter)


def norm_offset(norm: nn.Module) -> int | None:
    """The c of a norm that multiplies by (c + weight): 0, or 1 as in Gemma. None if it does not, or if
    it takes more than its input, such as a gate.

    Tried on a copy of the norm with other weights and random inputs.
    """
    required = [p for p in signature(norm.forward).parameters.values() if p.default is p.empty]
    if len(required) > 1:
        return None
    probe: Any = copy.deepcopy(norm).float().cpu()
    k = len(probe.weight)
    generator = torch.Generator().manual_seed(0)
    x, drawn = torch.randn(4, k, generator=generator), torch.rand(k, generator=generator)
    if getattr(probe, "bias", None) is not None:
        probe.bias = nn.Parameter(torch.zeros(k), requires_grad=False)

    def divided_norm(weight: Tensor) -> Tensor:
        probe.weight = nn.Parameter(weight, requires_grad=False)
        with torch.no_grad():
            out: Tensor = probe(x)
        return out

    at_zero, at_one = divided_norm(torch.zeros(k)), divided_norm(torch.ones(k))
    slope = at_one - at_zero
    for offset in (0, 1):
        if torch.allclose(at_zero, offset * slope, atol=1e-6) and torch.allclose(
            divided_norm(drawn), (offset + drawn) * slope, atol=1e-5
        ):
            return offset
    return None


def scale_norm(norm: nn.Module, offset: int, scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """New `weight` and `bias` of a norm whose channels are divided by `scale`, in its own dtype.

    Also returns the actual scales, float32: if c + weight had to be rounded, readers are multiplied by
    the quotient of the weights before and after.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    before = weight.detach().cpu().double() + offset
    new = (before / scale.double() - offset).to(weight.dtype)
    after = new.double() + offset
    real = before / after
    sound = (before != 0) & (after != 0) & torch.isfinite(new)
    new = torch.where(sound, new, weight.detach().cpu())
    real = torch.where(sound, real, 1.0).float()
    divided_norm = {"weight": new}
    bias = getattr(norm, "bias", None)
    if bias is not None:
        divided_norm["bias"] = (bias.detach().cpu().double() / real.double()).to(bias.dtype)
    return divided_norm, real


def fold(
    producer: Producer,
    segments: Segments,
    scale: Tensor,
    edits: dict[str, EditFactors],
) -> None:
    """Add to `edits`, by stored tensor: rows of the producer divided, columns of readers multiplied.

    A norm's own edit is the caller's. Scales [channels] are of all its channels.
    """
    if producer.matrix is not None:
        for segment in segments[producer.matrix.parameter][producer.matrix.expert]:
            rows = 1 / scale[segment.start : segment.stop]
            if bool((rows != 1).any()):
                for suffix in ("weight", "bias"):
                    _add(edits, f"{segment.module}.{suffix}", EditFactors(rows=rows))
    for reader in producer.readers:
        columns = scale[reader.channels]
        for segment in segments[reader.matrix.parameter][reader.matrix.expert]:
            _add(edits, f"{segment.module}.weight", EditFactors(columns=columns))


def _add(edits: dict[str, EditFactors], name: str, new: EditFactors) -> None:
    old = edits.get(name, EditFactors())
    edits[name] = EditFactors(
        rows=_times(old.rows, new.rows), columns=_times(old.columns, new.columns), value=old.value
    )


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b
