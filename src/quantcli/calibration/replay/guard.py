"""Bounds on what a library builds of config.json, by what the checkpoint's headers hold.

A number in config.json can ask for a billion modules, or for a buffer of a terabyte. Modules and
tensors are counted while they are made, so that a bound is reached at the same module on every machine.
Loops in which nothing is made are not seen here: a config.json with numbers that may cause such a loop
is built in another process first, see `is_outsized`.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint
from quantcli.core.errors import InputError
from quantcli.core.text import size

# Of a tensor, transformers makes some two modules and a parameter. Towers need not have tensors.
_PARTS_PER_TENSOR, _PARTS = 16, 10_000
# A parameter may be made of many stored tensors, and one that is tied or of a tower need not be stored.
# Parameters take no memory.
_VALUES_PER_VALUE, _VALUES = 8, 2**30
_BUFFER_BYTES, _ALL_BUFFERS_BYTES = 2**29, 2**30  # on top of the checkpoint's own
_SMALL = 2**16  # numbers of loops that take less than a second
# What numbers count that are larger than that in real models, and for which no code has a loop.
_NO_COUNT = re.compile(r"vocab|token|_id$|_index$|position|floor|seq|max_|window|length|chunk|freq")
_MOST_POSITIONS = 2**27
_FIX = "check config.json, or fetch it again: it does not belong to these weights"


@dataclass(frozen=True)
class Bounds:
    """What the headers of a checkpoint account for.

    tensors: their number, where each matrix of a stack counts. values: their elements. nbytes: theirs.
    where: config.json.
    """

    tensors: int
    values: int
    nbytes: int
    where: str

    @property
    def parts(self) -> int:
        """Modules and parameters."""
        return _PARTS + _PARTS_PER_TENSOR * self.tensors

    @property
    def elements(self) -> int:
        """Elements of a parameter."""
        return _VALUES + _VALUES_PER_VALUE * self.values

    @property
    def memory(self) -> int:
        """Bytes of buffers, on top of a fixed amount; some parameters are made of zeros, as buffers."""
        return self.nbytes + 4 * self.values


def bounds_of(checkpoint: Checkpoint) -> Bounds:
    """The bounds for a checkpoint's model."""
    shapes = [spec.shape for spec in checkpoint.specs()]
    return Bounds(
        tensors=sum(shape[0] if len(shape) > 2 else 1 for shape in shapes),
        values=sum(map(math.prod, shapes)),
        nbytes=checkpoint.nbytes,
        where=str(checkpoint.path / CONFIG),
    )


def is_outsized(checkpoint: Checkpoint) -> bool:
    """Whether config.json has a number that could be the length of a long loop.

    Such a number is large, is not a side of a stored tensor, and its name does not say that it is a
    token or a limit of texts.
    """
    sides = {side for spec in checkpoint.specs() for side in spec.shape}
    return any(
        abs(number) > _SMALL
        and number not in sides
        and "theta" not in key
        and (abs(number) > _MOST_POSITIONS or not _NO_COUNT.search(key))
        for key, number in _numbers("", checkpoint.config.plain())
    )


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(key, inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


@contextmanager
def guarded(bounds: Bounds) -> Iterator[None]:
    """Modules that this thread makes in the block store no parameters; buffers are computed as usual.

    InputError if they are more than `bounds` accounts for, or larger.
    """
    watch = _Watch(bounds)
    hooks = (
        register_module_module_registration_hook(watch.module),
        register_module_parameter_registration_hook(watch.parameter),
        register_module_buffer_registration_hook(watch.buffer),
    )
    try:
        with watch:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what one thread builds, and looks at the size of each tensor before it is made."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bounds = bounds
        self._thread = threading.get_ident()
        self._parts = self._buffers = 0

    def module(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        """Counts a module that is registered."""
        self._count()

    def parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        """Counts a parameter that is registered, and drops its memory."""
        if threading.get_ident() != self._thread:
            return None
        self._count()
        if parameter is None or parameter.device.type == "meta":
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    def buffer(self, module: nn.Module, name: str, buffer: Tensor | None) -> None:
        """Adds up the memory of buffers that are registered."""
        if threading.get_ident() != self._thread or buffer is None or buffer.device.type == "meta":
            return
        self._buffers += buffer.numel() * buffer.element_size()
        if self._buffers > _ALL_BUFFERS_BYTES + self._bounds.memory:
            self._refuse(f"buffers of more than {size(self._buffers)}")

    def _count(self) -> None:
        if threading.get_ident() != self._thread:
            return
        self._parts += 1
        if self._parts > self._bounds.parts:
            self._refuse(f"more than {self._bounds.parts:,} modules and parameters")

    def _refuse(self, what: str) -> None:
        raise InputError(
            f"config.json makes a model with {what}, but the checkpoint has {self._bounds.tensors:,} "
            f"tensors of {size(self._bounds.nbytes)}",
            where=self._bounds.where,
            fix=_FIX,
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.empty.memory_format:
            if math.prod(args[0]) > self._bounds.elements:
                shape = " x ".join(map(str, args[0]))
                self._refuse(f"a parameter of {shape} elements")
        elif not func.is_view and kwargs.get("device") != _META:
            self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Compute the shape of a result, and refuse one that is too large."""
        try:
            if "device" in kwargs:
                kwargs = {**kwargs, "device": _META}
            like = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        except Exception:  # the operation needs values, or fails: then it fails without this, too
            return
        if isinstance(like, Tensor):
            nbytes = like.numel() * like.element_size()
            if nbytes > _BUFFER_BYTES + self._bounds.memory:
                self._refuse(f"a buffer of {size(nbytes)}")


_META = torch.device("meta")


def _to_meta(value: Any) -> Any:
    return value.to(_META) if isinstance(value, Tensor) else value
