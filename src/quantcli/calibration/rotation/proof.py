"""A proof with random weights: parts of a model whose parameters are rotated give rotated outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.calibration.replay.calls import NOTHING_CARRIED, Call, Carry
from quantcli.calibration.rotation.probe import Probe, unchanged
from quantcli.calibration.rotation.stream import reflections, turned

_TOLERANCE = 1e-4  # of what a layer adds; float32 leaves about 1e-6, one wrong matrix some percent


@dataclass(frozen=True)
class HeadPair:
    """The values of an attention and what reads its output, as parameters; see `Heads` of places."""

    values: str
    rows: tuple[int, ...]
    output: str
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Turn:
    """Rotated parameters: of the stream, and of heads. A `Change` of a probe.

    readers, norms: of parameters by name: the norm's parameter that is folded in, or None; and its
    offset. turned_over: parameters that are stored [.., k, n].
    """

    probe: Probe
    vectors: Tensor | None  # reflections of the stream; None: it stays
    readers: Mapping[str, str | None]
    norms: Mapping[str, int]
    writers: frozenset[str]  # with embeddings' opposite: rows are outputs
    tables: frozenset[str]  # rows [.., h] that enter the stream: embeddings and biases
    pairs: Sequence[HeadPair]
    turned_over: frozenset[str]

    def __call__(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter [..] in the new basis."""
        if parameter.dim() == 3 and parameter.stride(0) == 0:
            return self._matrix(name, parameter[0]).expand(parameter.shape)
        return self._matrix(name, parameter)

    def _matrix(self, name: str, value: Tensor) -> Tensor:
        over = name in self.turned_over
        value = value.mT if over else value
        for pair in self.pairs:
            for number, start in enumerate(pair.rows):
                matrix = _head_matrix(pair, number)
                width = pair.head_dim
                if name in {pair.values, pair.values.removesuffix("weight") + "bias"}:
                    value = value.clone()
                    value[start : start + width] = matrix.mT @ value[start : start + width]
                elif name == pair.output:
                    value = value.clone()
                    share = pair.heads // len(pair.rows)
                    for head in range(number * share, (number + 1) * share):
                        columns = slice(head * width, (head + 1) * width)
                        value[:, columns] = value[:, columns] @ matrix
        if self.vectors is not None:
            if name in self.readers:
                norm = self.readers[name]
                if norm is not None:
                    value = value * (self.probe.value(norm) + self.norms[norm])
                value = turned(value, self.vectors)
            if name in self.writers:
                value = turned(value.mT, self.vectors).mT
            if name in self.tables:
                value = turned(value, self.vectors)
            if name in self.norms:
                value = torch.full_like(value, 1.0 - self.norms[name])
        return value.mT if over else value


def _head_matrix(pair: HeadPair, number: int) -> Tensor:
    """An orthogonal matrix [head_dim, head_dim] of a kv head."""
    return turned(torch.eye(pair.head_dim), reflections(pair.head_dim, seed=number + 10))


def keeps_layer(
    turn: Turn,
    index: int,
    call: Call,
    carry: Carry = NOTHING_CARRIED,
    other_carry: Carry = NOTHING_CARRIED,
) -> tuple[bool, Carry, Carry]:
    """Whether a layer gives rotated outputs for rotated inputs, and what both runs carry on."""
    probe, vectors = turn.probe, turn.vectors
    hidden = probe.states(index, probe.hidden)
    with probe.layer(index) as layer:
        out, carry = probe.run(index, call, layer, hidden, carry)
    rotated = hidden if vectors is None else turned(hidden, vectors)
    with probe.layer(index, turn) as layer:
        other, other_carry = probe.run(index, call, layer, rotated, other_carry)
    expected = out if vectors is None else turned(out, vectors)
    return _near(other, expected, out - hidden), carry, other_carry


def keeps_outside(turn: Turn) -> str | None:
    """What lies outside of the layers and does not keep the function: None if all does."""
    probe, vectors = turn.probe, turn.vectors
    assert vectors is not None
    before, after = probe.begin(unchanged)[0], probe.begin(turn)[0]
    if not _near(after, turned(before, vectors), before):
        return "the embedding"
    hidden = probe.states(-1, probe.hidden)
    out, other = probe.end(hidden), probe.end(turned(hidden, vectors), turn)
    return None if _near(other, out, out) else "the head"


def _near(x: Tensor, expected: Tensor, scale: Tensor) -> bool:
    return bool((x - expected).norm() <= _TOLERANCE * scale.norm())
