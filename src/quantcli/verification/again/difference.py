"""Computed rows next to the stored ones: where both differ first, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantcli.checkpoint.columns import Columns
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_span
from quantcli.core.findings import Finding, failed
from quantcli.targets.layouts import Output
from quantcli.verification.outcome import CONVERT

CHECK = "recomputed"


@dataclass(frozen=True)
class StoredParts:
    """Parts of stored tensors. One that is read by columns stays open: it is read in wide strips."""

    tensors: Mapping[str, StoredTensor]
    stack: ExitStack  # closes it
    columns: dict[str, Columns] = field(default_factory=dict)

    def block(self, output: Output, first: int, expected: Tensor) -> Block:
        """What is stored next to what is expected of an output, from `first` along its axis on.

        Rows of a stack are counted as those of its matrices.
        """
        stored = self.tensors[output.spec.name]
        shape, count = stored.spec.shape, expected.shape[output.axis] if expected.dim() else 1
        if output.axis:
            name = output.spec.name
            if name not in self.columns:
                self.columns[name] = self.stack.enter_context(Columns(stored))
            actual = self.columns[name].columns(first, first + count).t().clone()
            return Block(output, first, expected, actual, shape)
        if len(shape) > 2:
            stored = replace(stored, spec=replace(stored.spec, shape=output.spec.shape))
        return Block(output, first, expected, read_span(stored, first, count), shape)


@dataclass(frozen=True)
class Block:
    """A part of a tensor, from `first` along its axis on: as computed, and as stored. shape: of the
    whole, stored."""

    output: Output
    first: int
    expected: Tensor
    actual: Tensor
    shape: tuple[int, ...]

    def difference(self) -> Difference | None:
        """None if both have the same bits."""
        name = self.output.spec.name
        actual, expected = self.actual, self.expected.reshape(self.actual.shape)
        if actual.dtype != expected.dtype:  # after packing by another tool
            return Difference(name, self._index(0), str(actual.dtype), str(expected.dtype), 1)
        if torch.equal(_bytes(actual), _bytes(expected)):
            return None
        unlike = (_bytes(actual) != _bytes(expected)).view(-1, actual.element_size()).any(1)
        place = int(unlike.int().argmax())
        texts = _text(actual, place), _text(expected, place)
        return Difference(name, self._index(place), *texts, int(unlike.sum()))

    def _index(self, place: int) -> tuple[int, ...]:
        """The index in the whole tensor of an element of this part."""
        each = self.actual[0].numel() if self.actual.dim() and len(self.actual) else 1
        if self.output.axis:
            row, column = divmod(place, each)
            return row, self.first + column
        place += self.first * each
        index = []
        for side in reversed(self.shape or (1,)):
            place, last = divmod(place, side)
            index.append(last)
        return tuple(reversed(index))


@dataclass(frozen=True)
class Difference:
    """Numbers of a stored tensor that differ from the computed ones.

    actual, expected: the first of them, at `index`. count: of all.
    """

    name: str
    index: tuple[int, ...]
    actual: str
    expected: str
    count: int

    def finding(self) -> Finding:
        """An error that names the first element."""
        place = f"[{', '.join(map(str, self.index))}]"
        more = f", and {self.count - 1:,} more differ" if self.count > 1 else ""
        what = f"is {self.actual}; the recipe makes {self.expected} of the source{more}"
        return failed(CHECK, what, f"`{self.name}`{place}", CONVERT)


def merge(differences: dict[str, Difference], others: dict[str, Difference]) -> None:
    """Add differences of more rows."""
    for name, other in others.items():
        first = differences.setdefault(name, other)
        if first is not other:
            count = first.count + other.count
            differences[name] = replace(min(first, other, key=lambda d: d.index), count=count)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _text(tensor: Tensor, place: int) -> str:
    value = tensor.reshape(-1)[place]
    return f"{float(value):.9g}" if value.is_floating_point() else str(int(value))
