"""The engine's arithmetic in place of a layer's float multiplications."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from quantcli.calibration.replay.skeleton import Segment, Segments
from quantcli.calibration.replay.taps import Matrices, Matrix
from quantcli.core.numerics import Parts


class Arithmetic(Protocol):
    """A scheme, or anything else that computes a linear of its parts."""

    def forward(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
        """x [..., k] -> [..., n]."""


# (stored module, its rows of a float matrix, their bias) -> its scheme and parts; None if it is float
Quantizer = Callable[[str, Tensor, Tensor | None], tuple[Arithmetic, Parts] | None]


@dataclass(frozen=True)
class _Piece:
    rows: slice
    scheme: Arithmetic | None
    parts: Parts
    weight: Tensor


class EngineLinears:
    """A listener that computes what the engine would, for every quantized module of a loaded layer."""

    def __init__(
        self,
        matrices: Matrices,
        segments: Segments,
        quantizer: Quantizer,
    ) -> None:
        self._pieces: dict[Matrix, list[_Piece]] = {}
        for parameter, experts in segments.items():
            for expert, parts in enumerate(experts):
                matrix = Matrix(parameter, expert)
                weight, bias = matrices.weight(matrix), matrices.bias(matrix)
                pieces = [self._piece(s, weight, bias, quantizer) for s in parts]
                if any(piece.scheme for piece in pieces):
                    self._pieces[matrix] = pieces

    def _piece(
        self, segment: Segment, weight: Tensor, bias: Tensor | None, quantizer: Quantizer
    ) -> _Piece:
        rows = slice(segment.start, segment.stop)
        piece = quantizer(segment.module, weight[rows], None if bias is None else bias[rows])
        if piece is None:
            return _Piece(rows, None, {}, weight[rows])
        return _Piece(rows, piece[0], piece[1], weight[rows])

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x [..., k] -> [..., n] as the engine computes it; None if all of it is float."""
        pieces = self._pieces.get(matrix)
        if pieces is None:
            return None
        outputs = []
        for piece in pieces:
            added = None if bias is None else bias[piece.rows]
            if piece.scheme is None:
                outputs.append(F.linear(x, piece.weight, added))
            else:
                outputs.append(piece.scheme.forward(x, piece.parts, added))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
