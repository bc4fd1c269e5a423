"""Rows of a stored module, read without holding a whole tensor."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from quantcli.checkpoint.columns import Columns
from quantcli.checkpoint.header import Rows
from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import read_tensor
from quantcli.targets.layouts import StoredModule


class ModuleReader:
    """Rows of a quantized module, as stored and as the float weight that they stand for."""

    def __init__(self, module: StoredModule) -> None:
        self.module = module
        self._constants = {p.suffix: read_tensor(module.tensors[p.suffix]) for p in module.constants}
        for param in module.constants:
            if param.serving:
                serving = self._constants[param.suffix].to(torch_dtype(module.serving_dtype))
                self._constants[param.suffix] = serving
        self._params = {p.suffix: p for p in module.row_params}
        self._multiple = math.lcm(*(p.rows for p in module.row_params if not p.spread))

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._readers: dict[str, Rows | Columns] = {}
            for suffix, param in self._params.items():
                stored = self.module.tensors[suffix]
                if param.axis:
                    self._readers[suffix] = stack.enter_context(Columns(stored))
                else:
                    self._readers[suffix] = stack.enter_context(stored.open())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rows(self, start: int, count: int) -> dict[str, Tensor]:
        """Stored tensors by suffix, for rows [start, start + count) of the weight.

        start: a multiple of the layout's `row_multiple`, or only what `spread` allows; see `stored`.
        """
        stop = min(start + count, self.module.shape[0])
        blocks = {}
        for suffix, reader in self._readers.items():
            each = self._params[suffix].rows
            first, last = start // each, -(-stop // each)
            if isinstance(reader, Columns):
                blocks[suffix] = reader.columns(first, last).t()
            else:
                blocks[suffix] = reader.weight(first, last - first)
        return self._constants | blocks

    def stored(self, start: int, count: int) -> dict[str, Tensor]:
        """Tensors by suffix: rows [start, start + count) of those that have rows.

        start: a multiple of 8, as one int32 holds zero points of eight rows; `weight` takes any.
        """
        count = min(count, self.module.shape[0] - start)
        blocks = self.rows(start, count)
        for suffix, param in self._params.items():
            if param.spread:
                each = torch.arange(start, start + count) // param.rows - start // param.rows
                blocks[suffix] = blocks[suffix].index_select(param.axis, each)
        return blocks

    def weight(self, start: int, count: int) -> Tensor:
        """Rows of the weight that the kernel multiplies with, float32 [rows, k]; fewer at the end."""
        stop = min(start + count, self.module.shape[0])
        first = start - start % self._multiple
        rows = self.module.layout.dequantize(self.stored(first, stop + -stop % self._multiple - first))
        return rows[start - first : stop - first]
