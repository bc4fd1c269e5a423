"""Listening to the matrix multiplications of a layer while it runs, whoever calls them.

A torch function mode sees `linear` and its forms for all experts at once with the very tensors, so
nothing has to be known of modules: a weight is recognised by its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_GROUPED = frozenset({"_grouped_mm", "grouped_mm", "grouped_mm_fallback"})


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that multiplies: a parameter [n, k], or one expert of a parameter [e, n, k]."""

    parameter: str
    expert: int = 0


class Listener(Protocol):
    """Anything that sees, or replaces, a layer's matrix multiplications."""

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x [..., k] is about to be multiplied; a result [..., n] to take instead, or None."""


class Matrices:
    """A loaded layer's matrix parameters, found by their storage.

    shapes: [n, k], or [e, n, k] of experts, also if the parameter is [e, k, n].
    """

    def __init__(self, name: str, layer: nn.Module, transposed: Collection[str] = ()) -> None:
        """transposed: names of parameters that are [e, k, n]."""
        self.shapes: dict[str, torch.Size] = {}
        self._parameters = {f"{name}.{local}": p for local, p in layer.named_parameters()}
        self._transposed = frozenset(transposed)
        self._by_storage: dict[int, tuple[str, Tensor]] = {}
        for full, parameter in self._parameters.items():
            if parameter.dim() in (2, 3):
                self.shapes[full] = self._turned(full).shape
                self._by_storage[parameter.untyped_storage().data_ptr()] = (full, parameter)

    def _turned(self, parameter: str) -> Tensor:
        tensor = self._parameters[parameter]
        return tensor.transpose(-2, -1) if parameter in self._transposed else tensor

    def weight(self, matrix: Matrix) -> Tensor:
        """A matrix as it is loaded: [n, k], a view."""
        weight = self._turned(matrix.parameter)
        return weight[matrix.expert] if weight.dim() == 3 else weight

    def bias(self, matrix: Matrix) -> Tensor | None:
        """The bias of a matrix's module [n], if it has one."""
        return self._parameters.get(matrix.parameter.removesuffix("weight") + "bias")

    def find(self, weight: Tensor) -> Matrix | None:
        """The parameter, and the expert, that a weight is a view of."""
        entry = self._by_storage.get(weight.untyped_storage().data_ptr())
        if entry is None:
            return None
        name, parameter = entry
        offset = weight.storage_offset() - parameter.storage_offset()
        apart = parameter.dim() == 3 and weight.dim() == 2 and parameter.stride(0) > 0
        expert = offset // parameter.stride(0) if apart else 0
        return Matrix(name, expert)


def linear_arguments(args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """input, weight and bias of a call of `linear`."""
    arguments = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    return arguments["input"], arguments["weight"], arguments.get("bias")


def grouped_arguments(args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[int]]:
    """x [tokens, k] sorted by expert, weight [e, k, n], and the end of each expert's tokens."""
    offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
    assert isinstance(offsets, Tensor)
    return args[0], args[1], [int(end) for end in offsets.tolist()]


def batched_arguments(args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """x [e, tokens, k] and weight [e, k, n] of a call of `bmm`."""
    arguments = dict(zip(("input", "mat2"), args, strict=False)) | dict(kwargs)
    return arguments["input"], arguments["mat2"]


def is_batched(func: Any) -> bool:
    """Whether a torch function multiplies x [e, tokens, k] with weights [e, k, n] of all experts."""
    return getattr(func, "__name__", "") == "bmm"


def is_grouped(func: Any) -> bool:
    """Whether a torch function multiplies sorted tokens with the weights of several experts."""
    return getattr(func, "__name__", "") in _GROUPED


class Tap(TorchFunctionMode):
    """Tells a listener of every multiplication with one of the layer's matrices, on this thread."""

    def __init__(self, matrices: Matrices, listener: Listener | None) -> None:
        super().__init__()
        self._matrices = matrices
        self._listener = listener

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = linear_arguments(args, kwargs)
            matrix = self._matrices.find(weight)
            if matrix is not None and self._listener is not None:
                result = self._listener.linear(matrix, x, bias)
                if result is not None:
                    return result
        elif is_grouped(func):
            x, weight, ends = grouped_arguments(args, kwargs)
            matrix = self._matrices.find(weight)
            if matrix is not None and self._listener is not None:
                return self._grouped(
                    self._listener, matrix.parameter, x, ends, lambda: func(*args, **kwargs)
                )
        elif is_batched(func) and self._listener is not None:
            x, weight = batched_arguments(args, kwargs)
            matrix = self._matrices.find(weight)
            if matrix is not None:
                y: Tensor = func(*args, **kwargs)
                if len(self._matrices.shapes[matrix.parameter]) == 2:
                    return self._by_groups(self._listener, matrix.parameter, x, y)
                return self._batched(self._listener, matrix.parameter, x, y)
        return func(*args, **kwargs)

    def _rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[start:stop]

    def _grouped(
        self,
        listener: Listener,
        parameter: str,
        x: Tensor,
        ends: list[int],
        compute: Callable[[], Tensor],
    ) -> Tensor:
        pieces: list[Tensor | None] = []
        start = 0
        for expert, end in enumerate(ends):
            piece = None
            if start < end:
                piece = listener.linear(Matrix(parameter, expert), self._rows(x, start, end), None)
            pieces.append(piece)
            start = end
        y = compute()
        start = 0
        for piece, end in zip(pieces, ends, strict=True):
            if piece is not None:
                y[start:end] = piece
            start = end
        return y

    def _by_groups(self, listener: Listener, parameter: str, x: Tensor, y: Tensor) -> Tensor:
        """Groups of rows of one matrix that multiply inputs of their own: x [groups, tokens, k]."""
        groups, tokens = x.shape[:2]
        result = listener.linear(Matrix(parameter), x.reshape(groups * tokens, -1), None)
        if result is None:
            return y
        blocks = result.view(groups, tokens, groups, -1)
        return torch.stack([blocks[group, :, group] for group in range(groups)])

    def _tokens_of(self, x: Tensor, expert: int, used: Tensor) -> Tensor:
        return x[expert, used]

    def _batched(self, listener: Listener, parameter: str, x: Tensor, y: Tensor) -> Tensor:
        """Tokens that the router gave to other experts are rows of zeros, and no inputs of this one."""
        for expert in range(len(x)):
            used = x[expert].ne(0).any(-1)
            rows = self._tokens_of(x, expert, used)
            piece = listener.linear(Matrix(parameter, expert), rows, None)
            if piece is not None:
                y[expert, used] = piece
        return y
