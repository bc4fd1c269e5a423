"""Hidden states between two decoder layers: a tensor a batch, in memory as far as allowed, and on disk.

An interrupted run continues from the file, and it is read if memory does not suffice. Several processes
may write the states of one place, each those of some batches into a file of its own: a part.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from quantcli.calibration.replay.calls import NOTHING_CARRIED, Carry
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.header import StoredTensor, layout, read_header
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype
from quantcli.checkpoint.tensors import read_tensor, tensor_bytes
from quantcli.checkpoint.writer import ShardWriter
from quantcli.core.disk import disk_errors
from quantcli.core.errors import QuantError
from quantcli.core.untrusted.names import file_name_fault
from quantcli.core.untrusted.tables import Table, read_table


def states_file(layer: int) -> str:
    """Name of the file with the inputs of a layer, by its index; the last one holds the outputs."""
    return f"states-{layer:05d}.safetensors"


def final_file(stack: int) -> str:
    """Name of the file with the outputs of a whole stack that another one follows."""
    return f"final-states-{stack:05d}.safetensors"


def outputs_file(stacks: Sequence[range], layer: int) -> str:
    """Name of the file with the outputs of a layer, in a model of these stacks of layers."""
    ends = next((n for n, stack in enumerate(stacks[:-1]) if stack.stop == layer + 1), None)
    return states_file(layer + 1) if ends is None else final_file(ends)


def state_specs(hidden: Tensor, number: int, batches: Sequence[Batch]) -> list[TensorSpec]:
    """dtype and shape of the hidden states of all batches, from those of one, by its number."""
    dtype, shape = safetensors_dtype(hidden.dtype), tuple(hidden.shape)
    sides = tuple(batches[number].input_ids.shape)
    place = next(
        (n for n in range(len(shape)) if shape[n : n + 2] == sides), 0
    )  # [streams, batch, ...]
    return [
        TensorSpec("", dtype, (*shape[:place], *batch.input_ids.shape, *shape[place + 2 :]))
        for batch in batches
    ]


def _carried_file(file: str) -> str:
    """Name of the file that lists what is carried next to the states of a file; its tensors have files
    of their own, named after their content: batches and layers often share them."""
    return file.removesuffix(".safetensors") + ".carried.json"


class States:
    """The hidden states of every batch at one place of the model. Threads may share it.

    budget: bytes of them to hold in memory; the others are read from the file when they are needed.
    """

    def __init__(self, budget: int) -> None:
        self.stored: dict[int, StoredTensor] = {}
        self.listed: Listed = Listed(Path(), {})
        self._cache: dict[int, Tensor] = {}
        self._left = budget
        self._lock = threading.Lock()

    def get(self, batch: int) -> Tensor:
        """The hidden states of a batch, on the CPU."""
        cached = self._cache.get(batch)
        return read_tensor(self.stored[batch]) if cached is None else cached

    def carried(self, batch: int) -> Carry:
        """What is carried next to the hidden states of a batch, read from disk."""
        return self.listed.read(batch)

    @property
    def files(self) -> set[Path]:
        """The files that hold them."""
        files = {stored.file for stored in self.stored.values()}
        return files | self.listed.files | {file.with_name(_carried_file(file.name)) for file in files}

    def hold(self, batch: int, hidden: Tensor) -> None:
        """Keep a batch in memory, if it fits."""
        with self._lock:
            if hidden.nbytes <= self._left:
                self._left -= hidden.nbytes
                self._cache[batch] = hidden

    def hold_all(self) -> None:
        """Read all batches that fit in memory."""
        for batch, stored in self.stored.items():
            if batch not in self._cache and stored.spec.nbytes <= self._left:
                self.hold(batch, read_tensor(stored))


class Listed:
    """What is carried to a layer, by batch: items whose tensors are named after their content."""

    def __init__(self, folder: Path, batches: dict[str, dict[str, Any]]) -> None:
        """batches: by number; an item is None, a file's name, or a list of items."""
        self.batches = batches
        self._folder = folder

    def read(self, batch: int) -> Carry:
        """The items of a batch, on the CPU."""
        listed = self.batches.get(str(batch))
        return {name: self._read(item) for name, item in listed.items()} if listed else NOTHING_CARRIED

    def _read(self, item: Any) -> Any:
        if isinstance(item, str):
            (stored,) = read_header(self._folder / item)[0]
            return read_tensor(stored)
        return None if item is None else tuple(map(self._read, item))

    @property
    def files(self) -> set[Path]:
        """The files of all tensors."""
        return {
            self._folder / name for items in self.batches.values() for name in _names(items.values())
        }


def _names(items: Iterable[Any]) -> Iterator[Any]:
    """All names in items and in lists of them."""
    for item in items:
        if isinstance(item, list | tuple):
            yield from _names(item)
        elif item is not None:
            yield item


class StatesWriter:
    """Writes the states of one place; `finish` makes them durable and readable.

    A context; an error within it leaves the file behind under its temporary name.
    """

    def __init__(
        self,
        folder: Path,
        file: str,
        shapes: Sequence[TensorSpec],
        budget: int,
        part: Sequence[int] | None = None,
    ) -> None:
        """file: its name. shapes: of each batch; the dtype is that of what is put. part: the batches
        that are put here, if other processes put the others."""
        self._shapes = dict(enumerate(spec.shape for spec in shapes))
        self._tag = self._attempt = ""
        if part is not None:
            self._shapes = {number: self._shapes[number] for number in part}
            self._tag = f".{min(part):06d}-{len(part):06d}"
            self._attempt = f".{secrets.token_hex(8)}"  # a process that is thought dead may write, too
        self._whole = partial(load_states, folder, file, shapes, budget)
        self._folder, self._path = folder, folder / _tagged(file, self._tag)
        self._opened: ShardWriter | None = None
        self._states = States(budget)
        self._listed: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def put(self, batch: int, hidden: Tensor, carry: Carry = NOTHING_CARRIED) -> None:
        """Write the hidden states of a batch, and what is carried next to them."""
        hidden = hidden.cpu().contiguous()
        self._writer(hidden).write(_key(batch), 0, tensor_bytes(hidden))
        self._states.hold(batch, hidden)
        if carry:
            self._listed[batch] = {name: self._keep(item) for name, item in carry.items()}

    def _writer(self, hidden: Tensor) -> ShardWriter:
        """The writer of the file. Layers may hand on another dtype than embeddings, as Mamba 2 does."""
        with self._lock:
            if self._opened is None:
                dtype = safetensors_dtype(hidden.dtype)
                specs = [TensorSpec(_key(b), dtype, shape) for b, shape in self._shapes.items()]
                file = self._path.name + self._attempt
                self._opened = ShardWriter(self._folder, file, layout(specs), read_soon=True)
            return self._opened

    def _keep(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return None if item is None else [self._keep(part) for part in item]
        tensor = item.detach().cpu().contiguous()
        spec = TensorSpec("carried", safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        content = hashlib.sha256(f"{spec.dtype} {spec.shape} ".encode() + bytes(tensor_bytes(tensor)))
        name = _tagged(f"states-{content.hexdigest()}.safetensors", self._tag)
        with self._lock:  # other threads may carry the same
            if not (self._folder / name).exists():
                writer = ShardWriter(self._folder, name + self._attempt, [spec], read_soon=True)
                writer.write("carried", 0, tensor_bytes(tensor))
                self._finish(writer, name)
        return name

    def finish(self) -> States:
        """All batches are there: give the file its name. If none was put here, other processes have put
        all of them."""
        if self._opened is None:
            states = self._whole()
            assert states is not None, "nothing was put"
            return states
        if self._listed:
            batches = {str(batch): self._listed[batch] for batch in sorted(self._listed)}
            self._states.listed = Listed(self._folder, batches)
            path = self._folder / (_carried_file(self._path.name) + self._attempt)
            with disk_errors(path):
                path.write_text(json.dumps(batches))
                path.rename(self._folder / _carried_file(self._path.name))
        self._finish(self._opened, self._path.name)
        self._states.stored = _stored(self._path)
        return self._states

    def _finish(self, writer: ShardWriter, name: str) -> None:
        writer.finish()
        if self._attempt:
            with disk_errors(writer.path):
                writer.path.rename(self._folder / name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened is not None:
            self._opened.abandon()  # closes the file if it was not finished


def note_stack(
    replay: Replay,
    final: States | None,
    writer: Callable[[Sequence[TensorSpec]], StatesWriter | None],
    only: Sequence[int] | None = None,
) -> States:
    """Note how the layers of a stack are called. Returns the inputs of its first layer; nothing if they
    are not written.

    final: outputs of the stack before it; None: it is the first. writer: makes what they are written
    with, of dtype and shape of each batch; None: nothing is written. only: some batches, of the first
    stack; those that follow take the same ones.
    """
    specs: list[TensorSpec] = []
    writers: list[StatesWriter] = []
    with ExitStack() as contexts:

        def note(number: int, hidden: Tensor, carry: Carry) -> None:
            if not specs:
                specs.extend(state_specs(hidden, number, replay.batches))
                new_writer = writer(specs)
                if new_writer is not None:
                    writers.append(contexts.enter_context(new_writer))
            for each in writers:
                each.put(number, hidden, carry)

        if final is None:
            replay.begin(note, only)
        else:
            replay.onward(note, final)
        return writers[0].finish() if writers else States(0)


def _tagged(file: str, tag: str) -> str:
    return f"{file.removesuffix('.safetensors')}{tag}.safetensors"


def _stored(path: Path) -> dict[int, StoredTensor]:
    return {int(s.spec.name.rpartition(".")[2]): s for s in read_header(path)[0]}


def _load_listed(folder: Path, file: str) -> Listed | None:
    """What is carried next to states, as an earlier run has listed it; None if a tensor is missing."""
    path = folder / _carried_file(file)
    try:
        listed = Listed(folder, _batches(read_table(path)) if path.exists() else {})
    except QuantError:
        return None
    return listed if all(file.exists() for file in listed.files) else None


def _batches(table: Table) -> dict[str, dict[str, Any]]:
    """The items of each batch. InputError for what is not one, and for a file of another folder."""
    for number, items in table.inner.items():
        for name in _names(items.value.values()):
            if not isinstance(name, str):
                table.refuse(number, "should hold names of files")
            if (fault := file_name_fault(name, folders=False)) is not None:
                table.refuse(number, fault)
    return {number: dict(items.value) for number, items in table.inner.items()}


def load_states(
    folder: Path,
    file: str,
    shapes: Sequence[TensorSpec],
    budget: int,
    only: Collection[int] | None = None,
) -> States | None:
    """The states that were left in a file, or in parts of it; None if some are missing, or not of these
    shapes. only: the batches that are needed."""
    states, carried = States(budget), dict[str, dict[str, Any]]()
    for path in [folder / file, *sorted(folder.glob(_tagged(file, ".*")))]:
        try:
            stored, listed = _stored(path), _load_listed(folder, path.name)
        except (QuantError, ValueError):
            continue
        if listed is not None and all(
            batch < len(shapes) and tensor.spec.shape == shapes[batch].shape
            for batch, tensor in stored.items()
        ):
            for batch in stored.keys() & states.stored.keys():
                carried.pop(str(batch), None)
            states.stored |= stored
            carried |= listed.batches
    if not states.stored.keys() >= set(range(len(shapes)) if only is None else only):
        return None
    states.listed = Listed(folder, carried)
    return states


def _key(batch: int) -> str:
    return f"batch.{batch:06d}"
