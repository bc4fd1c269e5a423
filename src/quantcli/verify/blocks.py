"""Stored tensors read by rows, without ever holding one whole."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from quantcli.core.disk import disk_errors
from quantcli.encoded import Encoded, Rows
from quantcli.header import StoredTensor
from quantcli.targets.layouts import StoredModule
from quantcli.tensors import read_into, read_tensor
from quantcli.tensorspec import torch_dtype


class Reader:
    """Rows of one stored tensor; each call gives a view of the same memory."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored
        self._dtype = torch_dtype(stored.spec.dtype)
        self._buffer = bytearray()
        self._stack = ExitStack()
        self._decoder: Rows

    def __enter__(self) -> Self:
        stored = self.stored
        if isinstance(stored, Encoded):
            self._decoder = self._stack.enter_context(stored.open())
            return self
        with disk_errors(stored.file):
            self._fd = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
        self._stack.callback(os.close, self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rows(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), as many as there are: [rows, ...] in the stored dtype."""
        spec = self.stored.spec
        if isinstance(self.stored, Encoded):
            return self._decoder.weight(start, count)
        rows = min(count, (spec.shape[0] if spec.shape else 1) - start)
        nbytes = rows * spec.row_nbytes
        if nbytes > len(self._buffer):
            self._buffer = bytearray(nbytes)
        view = memoryview(self._buffer)[:nbytes]
        read_into(self._fd, self.stored, start * spec.row_nbytes, view)
        flat = torch.frombuffer(view, dtype=self._dtype)
        return flat.view(rows, *spec.shape[1:]) if spec.shape else flat


class ModuleReader:
    """Rows of a quantized module as codes and as the float weight they stand for."""

    def __init__(self, module: StoredModule) -> None:
        self.module = module
        self._constants = {p.suffix: read_tensor(module.tensors[p.suffix]) for p in module.constants}
        for suffix in ("left_trans", "right_trans"):
            if suffix in self._constants:  # as the engine holds them
                dtype = torch_dtype(module.serving_dtype)
                self._constants[suffix] = self._constants[suffix].to(dtype)
        self._readers = {p.suffix: Reader(module.tensors[p.suffix]) for p in module.row_params}
        self._params = {p.suffix: p for p in module.row_params}
        self._multiple = math.lcm(*(p.rows for p in module.row_params if not p.spread))

    def __enter__(self) -> Self:
        for reader in self._readers.values():
            reader.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        for reader in self._readers.values():
            reader.__exit__(*args)

    def rows(self, start: int, count: int) -> dict[str, Tensor]:
        """Tensors by suffix, as they are stored: what stands for rows [start, start + count)."""
        stop = min(start + count, self.module.shape[0])
        found = {}
        for suffix, reader in self._readers.items():
            each = self._params[suffix].rows
            found[suffix] = reader.rows(start // each, -(-stop // each) - start // each)
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
