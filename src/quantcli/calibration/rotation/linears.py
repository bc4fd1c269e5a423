"""A layer's matrices in a rotated basis, with int4 weights and inputs; the layer runs in its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.calibration.replay.taps import Matrices, Matrix
from quantcli.calibration.rotation.proof import HeadPair
from quantcli.schemes.flatquant import Int4

_ROUNDING = Int4()


@dataclass(frozen=True)
class Basis:
    """Orthogonal matrices of a layer, with gradients if they are learned.

    stream: [h, h]. heads: [d, d], for all kv heads, by the parameter of an attention's values.
    """

    stream: Tensor
    heads: Mapping[str, Tensor]


@dataclass
class RotatedLinears:
    """A listener: every matrix gets its input in the rotated basis, rounded to int4 as its rotated rows
    are, and its output is turned back. Without rounding the layer's function would stay.

    gammas:  what norms multiply by, [h], by the reader that it is folded into; the norms themselves are
             set to one. rounded: parameters whose weights and inputs are rounded.
    clips:   the share of each row's range, by matrix; searched when it is first used.
    """

    matrices: Matrices
    readers: Mapping[str, Tensor | None]
    writers: Collection[str]
    pairs: Sequence[HeadPair]
    rounded: Collection[str]
    basis: Basis
    clips: dict[Matrix, Tensor]

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x [..., k] -> [..., n], in the layer's own basis."""
        name = matrix.parameter
        weight, stream = self.matrices.weight(matrix), self.basis.stream
        if name in self.readers:
            gamma = self.readers[name]
            weight = (weight if gamma is None else weight * gamma) @ stream
            x = x @ stream
        if name in self.writers:
            weight = stream.T @ weight
        for pair in self.pairs:
            if name == pair.values:
                weight = self._turned_rows(pair, weight)
            elif name == pair.output:
                x, weight = self._by_heads(pair, x), self._by_heads(pair, weight)
        if name in self.rounded:
            if matrix not in self.clips:
                self.clips[matrix] = _ROUNDING.first_clips(weight.detach())
            weight = _ROUNDING.rows(weight, self.clips[matrix])
            x = _ROUNDING.inputs(x, x.new_ones(1))
        y = x @ weight.T
        for pair in self.pairs:
            if name == pair.values:
                y = self._turned_back(pair, y)
        if name in self.writers:
            y = y @ stream.T
        return y if bias is None else y + bias

    def _rows(self, pair: HeadPair) -> Tensor:
        starts = torch.tensor(pair.rows).unsqueeze(1)
        return (starts + torch.arange(pair.head_dim)).flatten()

    def _turned_rows(self, pair: HeadPair, weight: Tensor) -> Tensor:
        """R^T of each kv head times its rows of the weight of values [n, k]."""
        rows = self._rows(pair)
        heads = weight[rows].view(len(pair.rows), pair.head_dim, -1)
        turned = self.basis.heads[pair.values].mT @ heads
        return weight.index_copy(0, rows, turned.reshape(len(rows), -1))

    def _turned_back(self, pair: HeadPair, y: Tensor) -> Tensor:
        """The values [..., n] of each kv head times its R^T."""
        rows = self._rows(pair)
        heads = y[..., rows].view(*y.shape[:-1], len(pair.rows), 1, pair.head_dim)
        turned = heads @ self.basis.heads[pair.values].mT
        return y.index_copy(-1, rows, turned.flatten(-3))

    def _by_heads(self, pair: HeadPair, x: Tensor) -> Tensor:
        """Each head's part of [..., heads x d] times R."""
        share = pair.heads // len(pair.rows)
        heads = x.reshape(*x.shape[:-1], len(pair.rows), share, pair.head_dim)
        turned: Tensor = (heads @ self.basis.heads[pair.values]).flatten(-3)
        return turned
