"""Weight files whose tensors are in memory: on disk there is only their header."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor

_PIECE = 2**20  # bytes of a tensor with other strides that are made contiguous at once


@dataclass(frozen=True)
class Span:
    """Bytes [begin, end) of a file, which are those of a tensor."""

    begin: int
    end: int
    tensor: Callable[[], Tensor]


class MemoryFile(PosixPath):
    """The path of a safetensors file that has its header and a hole for the data, which is in memory.

    spans: the tensors, in the order of the data. folder: whatever the path needs to exist; it is kept
    alive by the path.
    """

    spans: Sequence[Span]
    folder: Any

    @classmethod
    def of(cls, path: Path, spans: Sequence[Span], folder: Any) -> MemoryFile:
        """The file at `path`."""
        file = cls(path)
        file.spans, file.folder = spans, folder
        return file

    def read(self, offset: int, block: memoryview) -> int:
        """Fill the beginning of `block` with the bytes at `offset`, up to the end of the tensor there.
        Returns their number."""
        number = bisect_right(self.spans, offset, key=lambda span: span.begin) - 1
        span = self.spans[number] if number >= 0 else None
        if span is None or offset >= span.end:
            return 0
        nbytes = min(len(block), span.end - offset)
        with torch.no_grad():
            _copy(span.tensor().detach(), offset - span.begin, block[:nbytes])
        return nbytes


def _copy(tensor: Tensor, start: int, block: memoryview) -> None:
    """Copy the bytes of a tensor from `start` on, as if it were contiguous, into `block`.

    A tensor on another device or with other strides is copied a piece at a time.
    """
    if tensor.is_contiguous() and tensor.device.type == "cpu":
        block[:] = _bytes(tensor)[start : start + len(block)]
        return
    rows = tensor if tensor.dim() else tensor.view(1)
    inner = rows[0].numel() * rows.element_size()  # bytes of a row
    done = 0
    while done < len(block):
        row, skipped = divmod(start + done, inner)
        left = len(block) - done
        if rows.dim() > 1 and (skipped or left < inner):
            size = min(left, inner - skipped)
            _copy(rows[row], skipped, block[done : done + size])
        else:
            count = max(1, min(left, _PIECE) // inner)
            piece = _bytes(rows[row : row + count].cpu().contiguous())[skipped:]
            size = min(left, len(piece))
            block[done : done + size] = piece[:size]
        done += size


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    # one element may have any stride, and still counts as contiguous
    flat = tensor.as_strided((tensor.numel(),), (1,))
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data
