"""Keys and values as they enter the cache: after rotary embeddings, before heads are repeated.

Every attention of the library hands both to the cache that it is given, and reads what that gives
back. The replay calls layers without one. Here an attention is given a cache that keeps nothing.

Engines may cache latents instead, which kv_b_proj makes keys and values from. They are seen, or
replaced, as that module is called: not every version of the library caches them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from quantcli.calibration.replay.skeleton import Segments

# (layer of attention, keys, values), [batch, heads, length, width] -> the same, or others instead.
# Latents are given as the keys and the values of one head, and taken from the keys.
Enter = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
# (layer of attention, queries [batch, length, all heads], the weight that reads latents)
Queries = Callable[[str, Tensor, Tensor], None]
_READS_LATENTS, _GIVES_QUERIES = "kv_b_proj", "q_b_proj"
_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")


@contextmanager
def entering(
    name: str,
    layer: nn.Module,
    segments: Segments,
    attention: Collection[str],
    enter: Enter,
    queries: Queries | None = None,
) -> Iterator[set[str]]:
    """Within it `enter` sees the keys and values of the loaded layer's forward, on any thread.

    name: of the layer in the model. segments: its stored weights. attention: names of layers of
    attention, as stored. queries: is shown those of attention with latents, before they are rotated.
    Yields the layers of attention that are in this layer.
    """
    owners: dict[str, str] = {}
    paths: dict[str, str] = {}  # in the layer, by the name of a module with weights of its own
    for parameter, experts in segments.items():
        modules = {s.module for parts in experts for s in parts}
        path = parameter.removeprefix(f"{name}.").rpartition(".")[0]
        for stored in {module.rpartition(".")[0] for module in modules}.intersection(attention):
            owners[path.rpartition(".")[0]] = stored
            paths |= dict.fromkeys(modules, path)
    with ExitStack() as stack:
        found = set()
        for path, stored in owners.items():
            if reads := paths.get(f"{stored}.{_READS_LATENTS}"):
                reader = layer.get_submodule(reads)
                stack.callback(reader.register_forward_pre_hook(_latents(stored, enter)).remove)
                if queries is not None and (gives := paths.get(f"{stored}.{_GIVES_QUERIES}")):
                    hook = layer.get_submodule(gives).register_forward_hook(
                        _queries(stored, reader, queries)
                    )
                    stack.callback(hook.remove)
                found.add(stored)
                continue
            module = layer.get_submodule(path)
            argument = _argument(module)
            if argument is not None:
                hook = module.register_forward_pre_hook(
                    _given(argument, stored, enter), with_kwargs=True
                )
                stack.callback(hook.remove)
                found.add(stored)
        yield found


def _argument(module: nn.Module) -> str | None:
    """The name under which a module takes a cache; None if it takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _ARGUMENTS if name in parameters), None)


def _latents(stored: str, enter: Enter) -> Callable[..., Any]:
    """A hook that gives what comes out of the cache in place of the latents, [batch, length, rank] or
    [batch, 1, length, rank]."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        latents = args[0].reshape(args[0].shape[0], 1, -1, args[0].shape[-1])
        return (enter(stored, latents, latents)[0].reshape(args[0].shape), *args[1:])

    return hook


def _queries(stored: str, reader: nn.Module, see: Queries) -> Callable[..., None]:
    """A hook that shows what a module gives."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        see(stored, output, reader.get_parameter("weight"))

    return hook


def _given(argument: str, stored: str, enter: Enter) -> Callable[..., Any]:
    """A hook that gives a module a cache in place of none."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        place = list(inspect.signature(module.forward).parameters).index(argument)
        if place < len(args):
            if args[place] is None:
                args = (*args[:place], _passing()(stored, enter), *args[place + 1 :])
        elif kwargs.get(argument) is None:
            kwargs = {**kwargs, argument: _passing()(stored, enter)}
        return args, kwargs

    return hook


@cache
def _passing() -> Callable[[str, Enter], Any]:
    """The class of a cache that keeps nothing: what enters it comes out."""
    from transformers import DynamicCache

    class Passing(DynamicCache):
        def __init__(self, layer: str, enter: Enter) -> None:
            super().__init__()
            self._layer = layer
            self._enter = enter

        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int = 0,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            """Keys and values [batch, heads, length, width], as `enter` gives them back."""
            return self._enter(self._layer, key_states, value_states)

    return Passing
