"""How a model calls its decoder layers: noted once a batch while the layers do nothing.

A layer may need more of earlier layers than hidden states: a second output of the layer before, or a
table that layers write into, such as keys and values that later layers share. A call keeps such an
argument as a `Handed` or a `Table`; its value is computed when the layers run, and carried from layer
to layer next to the hidden states.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.checkpoint.tensors import tensor_bytes

# What layers hand on next to hidden states, by name: tensors, None, and tuples of them.
Carry = Mapping[str, Any]
NOTHING_CARRIED: Carry = {}
Answer = Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]
_MOST_OUTPUTS = 4  # of a layer, next to hidden states


@dataclass(frozen=True)
class Handed:
    """An argument that is a further output of an earlier layer; `name` is `layer.output`."""

    name: str


@dataclass(frozen=True)
class Table:
    """An argument that several layers are given, and may write into.

    number: of the table in its model. kind: an empty one. content: what it holds before the layers run.
    """

    number: int
    kind: MutableMapping[Any, Any]
    content: dict[Any, Any]

    def filled(self, carry: Carry) -> MutableMapping[Any, Any]:
        """The table as earlier layers have left it."""
        table = copy.copy(self.kind)
        table.update(self.content)
        for name, item in carry.items():
            if name.startswith(f"table.{self.number}."):
                kind, key = name.split(".", 3)[2:]
                table[int(key) if kind == "int" else key] = item
        return table

    def name(self, key: Any) -> str:
        """An entry's name in what is carried."""
        return f"table.{self.number}.{type(key).__name__}.{key}"


@dataclass(frozen=True)
class Call:
    """The arguments of one layer; `place` is that of its hidden states, positional or by name.

    outputs: further outputs of the layer that later layers take, by their place in its result.
    kept:    names of what is carried beyond this layer; `table.N.` is all entries of a table.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    index: int = 0
    outputs: tuple[int, ...] = ()
    kept: tuple[str, ...] = ()

    def run(
        self, layer: nn.Module, hidden: Tensor, carry: Carry = NOTHING_CARRIED
    ) -> tuple[Tensor, Carry]:
        """Call `layer` as the model would: its hidden states [batch, length, ...], and what is carried
        on. Tables of the call are filled from `carry`, and read when the layer has run."""
        tables: dict[int, tuple[Table, MutableMapping[Any, Any]]] = {}

        def value(argument: Any) -> Any:
            if isinstance(argument, Handed):
                return carry.get(argument.name)
            if isinstance(argument, Table):
                if argument.number not in tables:
                    tables[argument.number] = argument, argument.filled(carry)
                return tables[argument.number][1]
            return argument if _immutable(argument) else copy.deepcopy(argument)

        args, kwargs = list(_map(self.args, value)), _map(self.kwargs, value)
        if isinstance(self.place, int):
            args[self.place] = hidden
        else:
            kwargs[self.place] = hidden
        before = {number: dict(filled) for number, (_, filled) in tables.items()}
        out = layer(*args, **kwargs)
        result: Tensor = out if isinstance(out, Tensor) else out[0]
        onward = {name: item for name, item in carry.items() if self._keeps(name)}
        for place in self.outputs:
            onward[f"{self.index}.{place}"] = out[place]
        for number, (table, filled) in tables.items():
            for key, item in filled.items() if f"table.{number}." in self.kept else ():
                if before[number].get(key) is not item:
                    onward[table.name(key)] = item
        return result, onward

    def _keeps(self, name: str) -> bool:
        return any(name == kept or (kept[-1] == "." and name.startswith(kept)) for kept in self.kept)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed."""

        def changed(argument: Any) -> Any:
            if isinstance(argument, Table):
                return Table(argument.number, argument.kind, map_tensors(argument.content, change))
            return change(argument) if isinstance(argument, Tensor) else argument

        return Call(
            _map(self.args, changed),
            _map(self.kwargs, changed),
            self.place,
            self.index,
            self.outputs,
            self.kept,
        )


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value with every tensor changed, within tuples, lists and dictionaries too."""
    return _map(value, lambda item: change(item) if isinstance(item, Tensor) else item)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (tuple, list)) and type(value) in {tuple, list}:
        return type(value)(_map(item, change) for item in value)
    if type(value) is dict:
        return {key: _map(item, change) for key, item in value.items()}
    return change(value)


def _immutable(value: Any) -> bool:
    """Whether a layer cannot change an argument; an object, such as a cache, is copied for each run."""
    plain = (Tensor, nn.Module, bool, int, float, str, type(None), torch.dtype, torch.device)
    return isinstance(value, plain) or callable(value)


class _Enough(BaseException):  # no `except Exception` of a model's code may catch it
    """Every layer was called: the rest of the model is not wanted."""


class _OtherForm(BaseException):
    """The input of a layer is not the output of the one before."""


@dataclass
class _Notes:
    """What is noted while a model's forward runs."""

    inputs: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)
    marks: dict[int, tuple[str, Tensor]] = field(default_factory=dict)  # id -> name, and the mark
    tables: dict[int, tuple[Table, MutableMapping[Any, Any]]] = field(default_factory=dict)
    last_use: dict[str, int] = field(default_factory=dict)  # of what is handed on, and of tables

    def argument(self, value: Any, index: int) -> Any:
        """An argument of layer `index`, or what stands for it."""
        if isinstance(value, Tensor) and id(value) in self.marks:
            name = self.marks[id(value)][0]
            self.last_use[name] = index
            return Handed(name)
        if isinstance(value, MutableMapping) and type(value) is not dict:
            if id(value) not in self.tables:
                empty = copy.copy(value)
                empty.clear()
                self.tables[id(value)] = Table(len(self.tables), empty, dict(value)), value
            table = self.tables[id(value)][0]
            self.last_use[f"table.{table.number}."] = index
            return table
        return value

    def finished(self) -> list[Call]:
        """All calls, each with what is carried beyond it."""
        finished = []
        for index, call in enumerate(self.calls):
            onward = [name for name, last in self.last_use.items() if last > index]
            its_own = [name for name in onward if name.startswith(f"{index}.")]
            outputs = tuple(int(name.rpartition(".")[2]) for name in its_own)
            finished.append(Call(call.args, call.kwargs, call.place, index, outputs, tuple(onward)))
        return finished


class Outline:
    """The calls of a stack of layers, found by running the model without them."""

    def __init__(self, layers: Sequence[nn.Module], beyond: Sequence[nn.Module] = ()) -> None:
        """beyond: modules that the model calls after all layers; its forward may end there."""
        self._layers = layers
        self._beyond = beyond
        self._outputs: int | None = None  # a layer's outputs next to hidden states; -1: no tuple

    def note(self, forward: Callable[[], Any]) -> tuple[Tensor, list[Call]] | None:
        """The input of the first layer, and the call of every layer in order, while `forward` runs.

        None if the model does not pass hidden states from layer to layer in their order, once. An
        exception of `forward` passes if there is one for every form that a layer's output can have.
        """
        failure, reached = None, -1  # the failure of the form that came furthest
        forms = range(-1, _MOST_OUTPUTS + 1) if self._outputs is None else (self._outputs,)
        for outputs in forms:
            notes = _Notes()

            def answer(index: int, args: Any, kwargs: Any, notes: _Notes = notes) -> Tensor:
                if index != len(notes.calls):
                    raise _OtherForm
                place = _find(args, kwargs, notes.last)
                hidden: Tensor = args[place] if isinstance(place, int) else kwargs[place]
                notes.inputs.append(hidden)
                args = tuple(None if number == place else arg for number, arg in enumerate(args))
                kwargs = {key: arg for key, arg in kwargs.items() if key != place}

                def noted(value: Any) -> Any:
                    return notes.argument(value, index)

                notes.calls.append(Call(_map(args, noted), _map(kwargs, noted), place))
                if index == len(self._layers) - 1 and self._outputs is not None:
                    raise _Enough
                notes.last[:] = [hidden.clone()]  # memory of its own, to be known again
                handed: Tensor = notes.last[0]
                return handed

            def marks(index: int, outputs: int = outputs, notes: _Notes = notes) -> tuple[Tensor, ...]:
                zeros = tuple(torch.zeros(()) for _ in range(outputs))
                for number, mark in enumerate(zeros, 1):
                    notes.marks[id(mark)] = f"{index}.{number}", mark
                return zeros

            try:
                with self._replaced(answer, outputs, marks), self._to_the_end():
                    forward()
            except _OtherForm:
                continue
            except _Enough:
                pass
            except Exception as error:  # a form that the model does not take, or its own failure
                if len(notes.calls) > reached:
                    failure, reached = error, len(notes.calls)
                continue
            if len(notes.calls) == len(self._layers):
                self._outputs = outputs
                return notes.inputs[0], notes.finished()
        if failure is not None:
            raise failure
        return None

    @contextmanager
    def _to_the_end(self) -> Iterator[None]:
        """Within it the forward ends at the first module beyond the layers."""

        def stop(module: nn.Module, args: Any) -> None:
            raise _Enough

        hooks = [module.register_forward_pre_hook(stop, prepend=True) for module in self._beyond]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def ending(self, final: Tensor) -> Iterator[None]:
        """Within it the stack returns `final`, whatever it is given."""

        def answer(index: int, args: Any, kwargs: Any) -> Tensor:
            return final

        assert self._outputs is not None, "note a call first"
        outputs = self._outputs
        with self._replaced(answer, outputs, lambda index: (torch.zeros(()),) * outputs):
            yield

    @contextmanager
    def _replaced(
        self, answer: Answer, outputs: int, marks: Callable[[int], tuple[Tensor, ...]]
    ) -> Iterator[None]:
        for index, layer in enumerate(self._layers):

            def forward(*args: Any, index: int = index, **kwargs: Any) -> Any:
                hidden = answer(index, args, kwargs)
                return hidden if outputs < 0 else (hidden, *marks(index))

            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward


def _find(args: tuple[Any, ...], kwargs: dict[str, Any], last: list[Tensor]) -> int | str:
    """The place of the hidden states: the output of the layer before, or the first float tensor."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and (_same(value, last[0]) if last else value.is_floating_point()):
            return place
    raise _OtherForm


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or views of all of it."""
    place, others = ((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (tensor, other))
    return tensor is other or (tensor.numel() > 0 and place == others)


class Shared:
    """One copy of tensors that are equal: masks and positions are, from batch to batch."""

    def __init__(self) -> None:
        self._by_content: dict[Any, Tensor] = {}
        self._by_id: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The first tensor seen with the same content and layout."""
        shared = self._by_id.get(id(tensor))
        if shared is None:
            key = (tensor.dtype, tensor.shape, tensor.stride(), _digest(tensor))
            shared = self._by_content.setdefault(key, tensor)
            self._by_id[id(tensor)] = shared
        return shared

    def forget(self) -> None:
        """The batch is over: other objects may get the ids of its tensors."""
        self._by_id.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._by_content.values())


def _digest(tensor: Tensor) -> bytes:
    cpu = tensor.detach().cpu()
    return hashlib.sha256(tensor_bytes(cpu)).digest() if cpu.numel() else b""
