"""Stored tensors read by rows, without ever holding one whole."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import read_tensor
from quantcli.targets.layouts import StoredModule


class ModuleReader:
    """Rows of a quantized module as codes and as the float weight they stand for."""

    def __init__(self, module: StoredModule) -> None:
        self.module = module
        self._constants = {p.suffix: read_tensor(module.tensors[p.suffix]) for p in module.constants}
        for suffix in ("left_trans", "right_trans"):
            if suffix in self._constants:  # as the engine holds them
                dtype = torch_dtype(module.serving_dtype)
                self._constants[suffix] = self._constants[suffix].to(dtype)
        self._params = {p.suffix: p for p in module.row_params}
        self._multiple = math.lcm(*(p.rows for p in module.row_params if not p.spread))

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            tensors = self.module.tensors
            self._readers = {s: stack.enter_context(tensors[s].open()) for s in self._params}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rows(self, start: int, count: int) -> dict[str, Tensor]:
        """Tensors by suffix, as they are stored: what stands for rows [start, start + count)."""
        stop = min(start + count, self.module.shape[0])
        found = {}
        for suffix, reader in self._readers.items():
            each = self._params[suffix].rows
            found[suffix] = reader.weight(start // each, -(-stop // each) - start // each)
        return self._constants | found

    def stored(self, start: int, count: int) -> dict[str, Tensor]:
        """Tensors by suffix: rows [start, start + count) of those that have them.

        start is a multiple of 8, as zero points stand in eights of rows, and codes of some in pairs;
        `weight` takes any.
        """
        count = min(count, self.module.shape[0] - start)
        found = self.rows(start, count)
        for suffix, param in self._params.items():
            if param.spread:
                each = torch.arange(start, start + count) // param.rows - start // param.rows
                found[suffix] = found[suffix][each]
        return found

    def weight(self, start: int, count: int) -> Tensor:
        """The weight that the kernel's product amounts to: float32 [rows, k], as many as there are."""
        stop = min(start + count, self.module.shape[0])
        first = start - start % self._multiple
        rows = self.module.layout.dequantize(self.stored(first, stop + -stop % self._multiple - first))
        return rows[start - first : stop - first]
