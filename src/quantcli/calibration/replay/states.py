"""Hidden states between two decoder layers: a tensor a batch, in memory as far as allowed, and on disk.

An interrupted run continues from the file, and it is read if memory does not suffice.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from torch import Tensor

from quantcli.checkpoint.header import StoredTensor, layout, read_header
from quantcli.checkpoint.spec import TensorSpec
from quantcli.checkpoint.tensors import read_tensor, tensor_bytes
from quantcli.checkpoint.writer import ShardWriter
from quantcli.core.errors import QuantError


def states_file(layer: int) -> str:
    """Name of the file with the inputs of a layer, by its index; the last one holds the outputs."""
    return f"states-{layer:05d}.safetensors"


class States:
    """The hidden states of every batch at one place of the model. Threads may share it.

    budget: bytes of them to hold in memory; the others are read from the file when they are needed.
    """

    def __init__(self, budget: int) -> None:
        self.stored: dict[int, StoredTensor] = {}
        self._cache: dict[int, Tensor] = {}
        self._left = budget
        self._lock = threading.Lock()

    def get(self, batch: int) -> Tensor:
        """The hidden states of a batch, on the CPU."""
        cached = self._cache.get(batch)
        return read_tensor(self.stored[batch]) if cached is None else cached

    @property
    def files(self) -> set[Path]:
        """The files that hold them."""
        return {stored.file for stored in self.stored.values()}

    def hold(self, batch: int, hidden: Tensor) -> None:
        """Keep a batch in memory, if it fits."""
        with self._lock:
            if hidden.nbytes <= self._left:
                self._left -= hidden.nbytes
                self._cache[batch] = hidden


class StatesWriter:
    """Writes the states of one place; `finish` makes them durable and readable.

    A context; an error within it leaves the file behind under its temporary name.
    """

    def __init__(self, folder: Path, layer: int, shapes: Sequence[TensorSpec], budget: int) -> None:
        """shapes: dtype and shape of each batch."""
        specs = [TensorSpec(_key(batch), s.dtype, s.shape) for batch, s in enumerate(shapes)]
        self._path = folder / states_file(layer)
        self._writer = ShardWriter(folder, self._path.name, layout(specs), read_soon=True)
        self._states = States(budget)

    def put(self, batch: int, hidden: Tensor) -> None:
        """Write the hidden states of a batch."""
        hidden = hidden.cpu().contiguous()
        self._writer.write(_key(batch), 0, tensor_bytes(hidden))
        self._states.hold(batch, hidden)

    def finish(self) -> States:
        """All batches are there: give the file its name."""
        self._writer.finish()
        self._states.stored = _stored(self._path)
        return self._states

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.abandon()  # closes the file if it was not finished


def _stored(path: Path) -> dict[int, StoredTensor]:
    return {int(s.spec.name.rpartition(".")[2]): s for s in read_header(path)[0]}


def load_states(folder: Path, layer: int, shapes: Sequence[TensorSpec], budget: int) -> States | None:
    """The states that an earlier run left; None if there are none of these shapes."""
    path = folder / states_file(layer)
    try:
        stored = _stored(path)
    except (QuantError, ValueError):
        return None
    stored_shapes = [(stored[b].spec.dtype, stored[b].spec.shape) for b in sorted(stored)]
    if stored_shapes != [(spec.dtype, spec.shape) for spec in shapes]:
        return None
    states = States(budget)
    states.stored = stored
    return states


def _key(batch: int) -> str:
    return f"batch.{batch:06d}"
