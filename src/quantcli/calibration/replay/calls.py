"""How a model calls its decoder layers: noted once a batch while the layers do nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantcli.checkpoint.tensors import tensor_bytes

Answer = Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]
# What a layer may return: hidden states alone (transformers 5), or first in a tuple (older code).
_FORMS: tuple[Callable[[Tensor], Any], ...] = (lambda h: h, lambda h: (h,), lambda h: (h, None))


@dataclass(frozen=True)
class Call:
    """The arguments of one layer; `place` is that of its hidden states, positional or by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Call `layer` as the model would; its hidden states [batch, length, ...]."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = hidden
        else:
            kwargs[self.place] = hidden
        out = layer(*args, **kwargs)
        result: Tensor = out if isinstance(out, Tensor) else out[0]
        return result

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed."""
        return Call(_map(self.args, change), _map(self.kwargs, change), self.place)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)) and type(value) in {tuple, list}:
        return type(value)(_map(item, change) for item in value)
    if type(value) is dict:
        return {key: _map(item, change) for key, item in value.items()}
    return value


class _Enough(BaseException):  # no `except Exception` of a model's code may catch it
    """Every layer was called: the rest of the model is not wanted."""


class _OtherForm(BaseException):
    """The input of a layer is not the output of the one before."""


class Outline:
    """The calls of a stack of layers, found by running the model without them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._form: Callable[[Tensor], Any] | None = None

    def note(self, forward: Callable[[], Any]) -> tuple[Tensor, list[Call]] | None:
        """The input of the first layer, and the call of every layer in order, while `forward` runs.

        None if the model does not pass hidden states from layer to layer in their order.
        """
        for form in _FORMS if self._form is None else (self._form,):
            calls: list[Call] = []
            inputs: list[Tensor] = []
            last: list[Tensor] = []

            def answer(
                index: int, args: Any, kwargs: Any, noted: Any = (calls, inputs, last)
            ) -> Tensor:
                calls, inputs, last = noted
                if index != len(calls):
                    raise _OtherForm
                place = _find(args, kwargs, last)
                hidden: Tensor = args[place] if isinstance(place, int) else kwargs[place]
                inputs.append(hidden)
                calls.append(_without(args, kwargs, place))
                if index == len(self._layers) - 1:
                    raise _Enough
                last[:] = [hidden.view_as(hidden)]  # a new object, to be known again
                handed: Tensor = last[0]
                return handed

            try:
                with self._replaced(answer, form):
                    forward()
            except _OtherForm:
                continue
            except _Enough:
                self._form = form
                return inputs[0], calls
        return None

    @contextmanager
    def ending(self, final: Tensor) -> Iterator[None]:
        """Within it the stack returns `final`, whatever it is given."""

        def answer(index: int, args: Any, kwargs: Any) -> Tensor:
            return final

        assert self._form is not None, "note a call first"
        with self._replaced(answer, self._form):
            yield

    @contextmanager
    def _replaced(self, answer: Answer, form: Callable[[Tensor], Any]) -> Iterator[None]:
        for index, layer in enumerate(self._layers):

            def forward(*args: Any, index: int = index, **kwargs: Any) -> Any:
                return form(answer(index, args, kwargs))

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
        if isinstance(value, Tensor) and (value is last[0] if last else value.is_floating_point()):
            return place
    raise _OtherForm


def _without(args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str) -> Call:
    kept_args = tuple(None if index == place else value for index, value in enumerate(args))
    return Call(kept_args, {k: v for k, v in kwargs.items() if k != place}, place)


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
