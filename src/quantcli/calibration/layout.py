"""A layer as the checkpoint knows it: which modules share an input, and what can be smoothed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.calibration.flow import Flow, Source
from quantcli.calibration.skeleton import Segment
from quantcli.calibration.taps import Matrix


@dataclass(frozen=True)
class Reader:
    """A matrix whose columns read some channels. channels: int64 [k], the channel of each column."""

    matrix: Matrix
    channels: Tensor


@dataclass(frozen=True)
class Producer:
    """What makes channels that can be scaled: a norm (`norm`), or rows of a matrix (`matrix`)."""

    readers: tuple[Reader, ...]
    used: Tensor  # bool [channels]: those that a reader reads
    norm: str | None = None  # a module
    matrix: Matrix | None = None

    @property
    def name(self) -> str:
        """For people."""
        if self.norm is not None:
            return self.norm
        assert self.matrix is not None
        expert = f"[{self.matrix.expert}]" if self.matrix.expert else ""
        return self.matrix.parameter.removesuffix(".weight") + expert


class LayerLayout:
    """What one forward of a layer has shown."""

    def __init__(self, segments: Mapping[str, list[list[Segment]]], flow: Flow) -> None:
        self.segments = segments
        self._flow = flow

    def matrices(self) -> Iterator[tuple[Matrix, list[Segment]]]:
        """Every matrix of the layer, each expert on its own, and the stored weights in it."""
        for parameter, experts in self.segments.items():
            for expert, segments in enumerate(experts):
                yield Matrix(parameter, expert), segments

    def modules(self, matrices: Iterable[Matrix]) -> list[str]:
        """The stored weights in some matrices."""
        return [s.module for m in matrices for s in self.segments[m.parameter][m.expert]]

    def leaders(self) -> dict[Matrix, Matrix]:
        """For every matrix that was used: the first that was given the very same input."""
        first: dict[tuple[object, int], Matrix] = {}
        found: dict[Matrix, Matrix] = {}
        for parameter, key in self._flow.inputs.items():
            for expert in range(len(self.segments.get(parameter, []))):
                matrix = Matrix(parameter, expert)
                found[matrix] = first.setdefault((key, expert), matrix)
        return found

    def producers(self) -> Iterator[Producer]:
        """What can be scaled without changing the layer's function, norms first."""
        for name, source in self._flow.norms.items():
            if not bool(source.escaped.any()) and source.readers:
                readers = self._readers(source, None)
                yield Producer(readers, torch.ones_like(source.escaped), norm=name)
        for name, source in self._flow.rows.items():
            for expert in range(len(self.segments.get(name, []))):
                readers = self._readers(source, expert if source.experts else None)
                used = torch.zeros_like(source.escaped)
                for reader in readers:
                    used[reader.channels] = True
                if bool(used.any()) and not bool((used & source.escaped).any()):
                    yield Producer(readers, used, matrix=Matrix(name, expert))

    def _readers(self, source: Source, expert: int | None) -> tuple[Reader, ...]:
        """Every matrix that reads a source, and those like it that had no token (other experts)."""
        shapes = {shape_of(name): channels for name, channels in source.readers.items()}
        found = []
        for parameter, experts in self.segments.items():
            channels = shapes.get(shape_of(parameter))
            if channels is None:
                continue
            for number in range(len(experts)):
                if expert is None or len(experts) == 1 or number == expert:
                    found.append(Reader(Matrix(parameter, number), channels))
        return tuple(found)


def shape_of(parameter: str) -> str:
    """A parameter's name without its numbers: the same for all experts of a layer."""
    return re.sub(r"\d+", "*", parameter)
