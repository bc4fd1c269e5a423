"""The way of a tensor's channels: which matrices read a norm's output, or the rows of a matrix.

While a layer runs, every tensor of interest has a shadow of its shape that holds, instead of values,
the number of the channel that each element came from, and the token. Functions that move elements
(views, transposes, look-ups) move the shadow in the same way. Any other use of a channel is an escape:
scaling the channel could change its result. So a group that is reported is right, whatever the
architecture, and one that the rules do not cover is left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantcli.calibration.replay.taps import (
    Listener,
    Matrices,
    Matrix,
    Tap,
    batched_arguments,
    grouped_arguments,
    is_batched,
    is_grouped,
    linear_arguments,
)

_TOKEN = 2**32  # a shadow's element is token * _TOKEN + channel; token 0 is unknown
# By the name of the torch function. Same elements in the same places:
_SAME = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous",
                   "clone", "detach", "alias"})  # fmt: skip
# Same elements in other places:
_MOVED = frozenset({"view", "reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze",
                    "squeeze", "expand", "chunk", "split", "__getitem__", "index_select", "narrow",
                    "repeat_interleave", "repeat", "movedim", "swapaxes", "swapdims"})  # fmt: skip
# Ask a tensor for its shape and dtype alone:
_LIKE = frozenset({"new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like",
                   "ones_like", "full_like"})  # fmt: skip
_SCALED = frozenset({"mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "divide"})
# Other values of the same tokens in the same places:
_BOUNDED = frozenset({"clamp", "clamp_min", "clamp_max", "clip"})
_ATTENTION = frozenset({"scaled_dot_product_attention"})
_MATMUL = frozenset({"matmul", "__matmul__", "bmm"})
_current: ContextVar[Flow | None] = ContextVar("flow", default=None)


@dataclass
class ChannelSource:
    """Channels that can be scaled where they are made: a norm's weight, or the rows of a matrix."""

    name: str  # a module of the layer with a norm's weight, or a matrix's parameter
    experts: bool  # a row of each expert
    escaped: Tensor  # bool [channels]
    width: int = 0  # of the heads in which attention has mixed the channels' tokens
    gated: set[int] = field(default_factory=set)  # channels that are multiplied by numbers of their own
    readers: dict[str, Tensor] = field(default_factory=dict)  # parameter -> channel of each column


@dataclass
class _Shadow:
    elements: Tensor  # int64, of the tensor's shape
    source: ChannelSource | None


class Flow(Tap):
    """A tap that also follows channels. One forward of one batch at a time."""

    def __init__(self, matrices: Matrices, listener: Listener | None, tokens: int) -> None:
        """tokens: of the batch, with padding: batch * length."""
        super().__init__(matrices, listener)
        self.norms: dict[str, ChannelSource] = {}
        self.rows: dict[str, ChannelSource] = {}
        self.inputs: dict[str, tuple[Any, ...]] = {}  # parameter -> its input, to compare
        self._tokens = tokens
        self._shadows: dict[int, tuple[weakref.ref[Tensor], _Shadow]] = {}
        self._casts: dict[int, tuple[weakref.ref[Tensor], Matrix]] = {}
        self._kept: list[Tensor] = []  # inputs, so that no later tensor gets their memory

    def __enter__(self) -> Any:
        self._token = _current.set(self)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> Any:
        _current.reset(self._token)
        return super().__exit__(*error)  # type: ignore[no-untyped-call]

    def rows_of(self, x: Tensor) -> Tensor | None:
        """The token of each row of x [..., k], from 0; None if that is not known."""
        shadow = self._get(x)
        if shadow is not None:
            token = shadow.elements.reshape(-1, x.shape[-1])[:, 0] // _TOKEN
            if bool((token > 0).all()):
                return token - 1
        if x.numel() == self._tokens * x.shape[-1]:
            return torch.arange(self._tokens, device=x.device)
        return None

    # -- torch functions -------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        used = args[:1] if name in _SAME else (args, kwargs)  # other tensors give their dtype alone
        tracked = [value for value in tensors_in(used) if self._get(value) is not None]
        if func is F.linear or is_grouped(func) or self._multiplies_experts(func, args, kwargs):
            return self._read(func, types, args, kwargs)
        if not tracked:
            result = func(*args, **kwargs)
            if name in _SAME and args and isinstance(args[0], Tensor):
                self._note_cast(args[0], result)
            return result
        result = func(*args, **kwargs)
        if name in _LIKE or not any(True for _ in tensors_in(result)):
            return result  # no values are read: a question for shape, dtype, device
        shadows = [(tensor, shadow) for tensor in tracked if (shadow := self._get(tensor))]
        sources = [entry for entry in shadows if entry[1].source is not None]
        if name in _ATTENTION:  # queries and keys are compared; the output has channels of values
            value = kwargs["value"] if "value" in kwargs else args[2]
            for tensor, _ in sources:
                if tensor is not value:
                    self._escape(tensor)
            shadows = sources = [entry for entry in sources if entry[0] is value]
            if not sources:
                return result
        first, shadow = (sources or shadows)[0]
        if len(sources) < 2 and self._follow(name, first, shadow, args, kwargs, result):
            return result
        for tensor in tracked:
            self._escape(tensor)
        if name in _BOUNDED and isinstance(result, Tensor) and result.shape == first.shape:
            self._set(result, _Shadow(shadow.elements, None))  # its rows are still those of tokens
        return result

    def _follow(
        self, name: str, x: Tensor, shadow: _Shadow, args: Any, kwargs: Any, result: Any
    ) -> bool:
        """Give the result its shadow; False if the rules here do not cover the function."""
        elements = shadow.elements
        if name in _SAME or (name == "dropout" and not kwargs.get("training", False)):
            if not isinstance(result, Tensor) or result.shape != x.shape:
                return False
            self._set(result, _Shadow(elements, shadow.source))
            return True
        if name in _MOVED and args and args[0] is x:
            if any(isinstance(value, torch.dtype) for value in args):
                return False  # the same bytes as other numbers
            move = elements.reshape if name == "view" else getattr(elements, name)
            moved = move(*args[1:], **kwargs)
            pairs = zip(tensors_in(result), tensors_in(moved), strict=True)
            for part, part_elements in pairs:
                self._set(part, _Shadow(part_elements, shadow.source))
            return True
        if name in _SCALED and isinstance(result, Tensor):
            if name.endswith(("div", "truediv__", "divide")) and args[0] is not x:
                return False
            if shadow.source is not None and any(
                value is not x and value.dim() and value.shape[-1] != 1 for value in tensors_in(args)
            ):
                shadow.source.gated |= set((elements % _TOKEN).flatten().tolist())
            self._set(result, _Shadow(elements.expand(result.shape), shadow.source))
            return True
        mixes = (name in _MATMUL and args[1] is x) or (
            name in _ATTENTION and (kwargs["value"] if "value" in kwargs else args[2]) is x
        )
        if mixes and isinstance(result, Tensor):
            return self._mix(elements, shadow, result)
        return False

    def _mix(self, elements: Tensor, shadow: _Shadow, result: Tensor) -> bool:
        """Weighted sums over tokens keep the channels: attention's output has those of its values."""
        channels = elements % _TOKEN
        if not bool((channels == channels[..., :1, :]).all()):
            return False
        one = channels[..., :1, :]
        if one.dim() == 4 and result.dim() == 4 and one.shape[1] != result.shape[1]:
            one = one.repeat_interleave(result.shape[1] // one.shape[1], 1)  # grouped-query heads
        if shadow.source is not None:
            shadow.source.width = result.shape[-1]
        self._set(result, _Shadow(one.expand(result.shape), shadow.source))
        return True

    # -- matrices --------------------------------------------------------------------------------

    def _rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        rows, shadow = x[start:stop], self._get(x)
        if shadow is not None:
            self._set(rows, _Shadow(shadow.elements[start:stop], shadow.source))
        return rows

    def _tokens_of(self, x: Tensor, expert: int, used: Tensor) -> Tensor:
        rows, shadow = x[expert, used], self._get(x)
        if shadow is not None:
            self._set(rows, _Shadow(shadow.elements[expert, used], shadow.source))
        return rows

    def _multiplies_experts(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a function is `bmm` with the weights of experts, and not one within attention."""
        return is_batched(func) and self._matrices.find(batched_arguments(args, kwargs)[1]) is not None

    def _read(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if is_batched(func):
            x, weight = batched_arguments(args, kwargs)
        elif is_grouped(func):
            x, weight, _ = grouped_arguments(args, kwargs)
        else:
            x, weight, _ = linear_arguments(args, kwargs)
        matrix = self._matrices.find(weight)
        cast = self._casts.get(id(weight))
        if matrix is None and cast is not None and cast[0]() is weight:
            matrix = cast[1]
        result = super().__torch_function__(func, types, args, kwargs)
        # groups of rows of one matrix, each with inputs of its own, are not followed
        grouped = (
            matrix is not None
            and is_batched(func)
            and len(self._matrices.shapes[matrix.parameter]) == 2
        )
        if matrix is None or grouped:
            self._escape(x)
            return result
        name = matrix.parameter
        self._kept.append(x)
        if name not in self.inputs:
            self.inputs[name] = (x.data_ptr(), x.numel(), x.shape[-1], x.dtype)
        self._note_reader(name, x)
        shape = self._matrices.shapes[name]
        source = self.rows.get(name)
        if source is None:
            fused = len(shape) == 3
            source = self.rows[name] = ChannelSource(
                name, fused, torch.zeros(shape[-2], dtype=torch.bool)
            )
        tokens = self.rows_of(x)
        self._set(result, _Shadow(_elements(None if tokens is None else tokens + 1, result), source))
        return result

    def _note_reader(self, name: str, x: Tensor) -> None:
        shadow = self._get(x)
        if shadow is None or shadow.source is None:
            return
        channels = (shadow.elements % _TOKEN).reshape(-1, x.shape[-1]).cpu()
        if not len(channels):
            return
        first_channels = shadow.source.readers.setdefault(name, channels[0])
        if not bool((channels == first_channels).all()):
            self._escape(x)

    def _note_cast(self, before: Tensor, after: Any) -> None:
        if isinstance(after, Tensor) and before.dim() == 2 and after.shape == before.shape:
            matrix = self._matrices.find(before)
            if matrix is not None:
                self._casts[id(after)] = (weakref.ref(after), matrix)

    # -- shadows ---------------------------------------------------------------------------------

    def norm(self, name: str, out: Tensor) -> None:
        """A norm made `out`: its channels can be scaled by its weight."""
        k = out.shape[-1]
        source = self.norms.get(name)
        if source is None:
            source = self.norms[name] = ChannelSource(name, False, torch.zeros(k, dtype=torch.bool))
        whole = out.numel() == self._tokens * k
        self._set(
            out, _Shadow(_elements(torch.arange(1, self._tokens + 1) if whole else None, out), source)
        )

    def _get(self, tensor: Tensor) -> _Shadow | None:
        entry = self._shadows.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _set(self, tensor: Tensor, shadow: _Shadow) -> None:
        self._shadows[id(tensor)] = (weakref.ref(tensor), shadow)

    def _escape(self, tensor: Tensor) -> None:
        shadow = self._get(tensor)
        if shadow is not None and shadow.source is not None:
            shadow.source.escaped[(shadow.elements % _TOKEN).flatten().cpu()] = True


def _elements(tokens: Tensor | None, like: Tensor) -> Tensor:
    """A new shadow's elements: channels 0 to n - 1 in the last dimension, tokens numbered from 1."""
    channels = torch.arange(like.shape[-1], device=like.device)
    if tokens is None:
        return channels.expand(like.shape)
    return (tokens.to(like.device)[:, None] * _TOKEN + channels).reshape(like.shape)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of an argument or a result, those in its lists and tables too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def is_norm(module: nn.Module) -> bool:
    """Whether a module has a vector `weight` of its own, as norms have."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


@contextmanager
def norms_followed(name: str, layer: nn.Module) -> Iterator[None]:
    """While it is open, the outputs of a layer's norms are passed to the flow of the thread."""

    def hook(path: str) -> Any:
        def after(module: nn.Module, args: Any, out: Any) -> None:
            flow = _current.get()
            weight = module._parameters["weight"]
            if flow is None or not isinstance(out, Tensor) or weight is None:
                return
            if len(weight) == out.shape[-1] and args and args[0].shape == out.shape:
                flow.norm(path, out)

        return after

    handles = [
        module.register_forward_hook(hook(f"{name}.{path}"))
        for path, module in layer.named_modules()
        if is_norm(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
