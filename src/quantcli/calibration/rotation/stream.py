"""The way of the residual stream through a model: what enters it, reads it and adds to it.

While the model runs, a tensor that is in the stream's basis has a mark: one of its axes holds the h
channels of the stream. A function keeps the mark if it works on each token as a whole (moves tokens,
sums them, scales them by a number), and a norm keeps it apart from its weights. The output of a matrix
with h rows is a candidate: it is one of the stream once it is added to it, and is nothing if it goes
elsewhere. Any other use of the stream depends on its basis, and a rotation must be refused.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantcli.calibration.channels import norm_offset
from quantcli.calibration.flow import is_norm, tensors_in
from quantcli.calibration.replay.taps import (
    batched_arguments,
    grouped_arguments,
    is_batched,
    is_grouped,
    linear_arguments,
)

# By the name of the torch function. Same elements in the same places:
_SAME = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous",
                   "clone", "detach", "alias", "dropout", "cpu", "cuda"})  # fmt: skip
# Same elements in other places:
_MOVED = frozenset({"view", "reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze",
                    "squeeze", "expand", "chunk", "split", "__getitem__", "index_select", "narrow",
                    "repeat_interleave", "repeat", "movedim", "swapaxes", "swapdims", "expand_as",
                    "view_as", "masked_select", "unbind", "select"})  # fmt: skip
# Ask a tensor for its shape and dtype alone:
_LIKE = frozenset({"new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like",
                   "ones_like", "full_like", "new_tensor"})  # fmt: skip
_ADDED = frozenset({"add", "__add__", "__radd__", "__iadd__", "add_"})
_SUBTRACTED = frozenset({"sub", "__sub__", "sub_", "__isub__"})
_SCALED = frozenset({"mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "divide",
                     "mul_", "__imul__", "div_", "__itruediv__"})  # fmt: skip
_SUMMED = frozenset({"sum", "mean"})
_MATMUL = frozenset({"matmul", "__matmul__", "bmm", "mm"})
_JOINED = frozenset({"cat", "concat", "concatenate", "stack"})
_PUT = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_", "index_copy_"})


@dataclass(frozen=True)
class Mark:
    """A tensor in the stream's basis.

    axis:    of the h channels, from the end: -1 is the last one.
    sure:    it is of the stream; else it is so only if it is added to it.
    norm:    the module of the norm whose weights have multiplied it.
    writers: parameters that made it, if it is not sure yet.
    biases:  parameters that were added to it, likewise.
    """

    axis: int
    sure: bool = False
    norm: str | None = None
    writers: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()


@dataclass
class Uses:
    """What was found, by the names of parameters and modules of the model.

    readers: the norm before each matrix that reads the stream.
    offsets: of norms: 0, or 1 if it multiplies by 1 + weight.
    fault:   the first reason why the stream cannot be rotated: the module, and what it does.
    """

    embeddings: dict[str, None] = field(default_factory=dict)
    readers: dict[str, str | None] = field(default_factory=dict)
    writers: dict[str, None] = field(default_factory=dict)
    biases: dict[str, None] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    fault: tuple[str, str] | None = None

    def refuse(self, module: str, what: str) -> None:
        """Note a reason, if it is the first."""
        self.fault = self.fault or (module, what)


class Trace(TorchFunctionMode):
    """Follows the stream while modules of a model run. One forward at a time."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.uses = Uses()
        self._hidden = hidden
        self._names: dict[int, str] = {}
        self._marks: dict[int, tuple[weakref.ref[Tensor], Mark]] = {}
        self._tables: set[str] = set()  # parameters that tokens, or their positions, look up
        self._where: list[str] = []
        self._suspended = 0

    def know(self, parameters: Mapping[str, Tensor]) -> None:
        """Recognise parameters, by their memory."""
        self._names |= {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}

    def begin(self, hidden: Tensor) -> None:
        """A tensor [.., h] is the stream."""
        self._set(hidden, Mark(-1, sure=True))

    def ends(self, hidden: Tensor, where: str) -> None:
        """A tensor [.., h] must be the stream: what a layer puts out, or is given."""
        mark = self._get(hidden)
        if mark is None or mark.axis != -1 or mark.norm is not None:
            what = "puts out hidden states that are not a sum of matrices' outputs"
            if mark is not None and mark.norm is not None:
                what = f"puts out what the norm `{mark.norm}` has multiplied"
            self.uses.refuse(where, what)
        else:
            self._confirm(mark)

    # -- torch functions -------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._suspended:
            return result
        name = getattr(func, "__name__", "")
        if func is F.embedding:
            self._embedded(args, kwargs, result)
            return result
        marked = [tensor for tensor in tensors_in((args, kwargs)) if self._get(tensor) is not None]
        if self._multiplied(func, name, args, kwargs, result) or not marked:
            return result
        if name in _LIKE or not any(True for _ in tensors_in(result)):
            return result  # no values are read: a question for shape, dtype, device
        mark = self._kept(name, marked, args, kwargs, result)
        if mark is None:
            self._escape(marked, f"applies `{name}` to the hidden states")
        return result

    def _kept(
        self, name: str, marked: list[Tensor], args: Any, kwargs: Any, result: Any
    ) -> bool | None:
        """Mark the result; None if the function does not work on whole tokens."""
        x = marked[0]
        mark = self._get(x)
        assert mark is not None
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name in _MOVED and first is x:
            return self._move(name, x, mark, args, kwargs, result)
        if name in _JOINED:
            return self._join(name, marked, args, kwargs, result)
        if not isinstance(result, Tensor):
            return None
        if name in _SAME and (first is x or first is None):
            if name == "dropout" and kwargs.get("training", False):
                return None
            return self._set(result, mark)
        if name == "type_as" or (name in {"view_as", "expand_as"} and first is not x):
            return True  # asked for a shape alone
        if name in _ADDED | _SUBTRACTED:
            return self._add(name, marked, args, kwargs, result)
        if name in _SCALED:
            return self._scale(name, x, mark, args, result)
        if name in _PUT:
            return self._put(marked, args, kwargs, result)
        if name in _SUMMED and first is x:
            return self._sum(mark, x, args, kwargs, result)
        if name in _MATMUL and len(args) > 1 and args[1] is x and mark.axis == -1:
            return self._set(result, mark)  # sums over tokens, or over experts
        if name in {"masked_fill", "masked_fill_"} and first is x and self._even(args[1], mark):
            return self._set(result, mark) if float(args[2]) == 0 else None
        if name == "rms_norm" and (args[2] if len(args) > 2 else kwargs.get("weight")) is None:
            return self._set(result, mark) if mark.norm is None else None
        return None

    def _move(
        self, name: str, x: Tensor, mark: Mark, args: Any, kwargs: Any, result: Any
    ) -> bool | None:
        if any(isinstance(value, torch.dtype) for value in args):
            return None  # the same bytes as other numbers
        channels = torch.arange(self._hidden).view(-1, *[1] * (-mark.axis - 1)).expand(x.shape)
        with torch._C.DisableTorchFunction():
            move = channels.reshape if name == "view" else getattr(channels, name)
            moved = move(*args[1:], **kwargs)
        for part, part_channels in zip(tensors_in(result), tensors_in(moved), strict=True):
            axis = self._axis(part_channels)
            if axis is None:
                return None
            self._set(part, replace(mark, axis=axis))
        return True

    def _axis(self, channels: Tensor) -> int | None:
        """The axis along which channels count from 0 to h - 1; None if there is none."""
        for axis in range(-1, -channels.dim() - 1, -1):
            if channels.shape[axis] == self._hidden:
                count = torch.arange(self._hidden).view(-1, *[1] * (-axis - 1))
                if bool((channels == count).all()):
                    return axis
        return None

    def _join(
        self, name: str, marked: list[Tensor], args: Any, kwargs: Any, result: Tensor
    ) -> bool | None:
        parts = [*tensors_in(args[0])]
        marks = [self._get(part) for part in parts]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        dim = dim if dim < 0 else dim - result.dim()
        first = marks[0]
        if first is None or any(mark is None for mark in marks) or len(parts) != len(marked):
            return None
        if len({(mark.axis, mark.sure, mark.norm) for mark in marks if mark is not None}) > 1:
            return None
        axis = first.axis if name != "stack" or dim < first.axis else first.axis - 1
        if dim == axis:
            return None
        whole = replace(
            first,
            axis=axis,
            writers=frozenset().union(*(mark.writers for mark in marks if mark is not None)),
            biases=frozenset().union(*(mark.biases for mark in marks if mark is not None)),
        )
        return self._set(result, whole)

    def _add(
        self, name: str, marked: list[Tensor], args: Any, kwargs: Any, result: Tensor
    ) -> bool | None:
        a, b = args[:2] if len(args) > 1 else (args[0], kwargs.get("other"))
        marks = [self._get(value) if isinstance(value, Tensor) else None for value in (a, b)]
        if marks[0] is not None and marks[1] is not None:
            return self._meet(marks[0], marks[1], result)
        (mark,) = [mark for mark in marks if mark is not None]
        other = b if marks[0] is not None else a
        if not isinstance(other, Tensor):
            return self._set(result, mark) if other == 0 else None
        bias = self._parameter(other)
        if bias is not None and other.shape[-1:] == (self._hidden,) and mark.axis == -1:
            biased = replace(mark, biases=mark.biases | {bias})
            if mark.sure:
                self._confirm(biased)
                biased = replace(mark)
            return self._set(result, biased)
        return self._set(result, mark) if not bool(other.any()) else None

    def _meet(self, a: Mark, b: Mark, result: Tensor) -> bool | None:
        """The sum of two marked tensors: if one is of the stream, the other one is, too."""
        if a.axis != b.axis:
            return None
        norm = a.norm or b.norm
        if not (a.sure or b.sure):
            if a.norm != b.norm:
                return None
            return self._set(
                result, replace(a, writers=a.writers | b.writers, biases=a.biases | b.biases)
            )
        if norm is not None:
            self.uses.refuse(norm, "is a norm whose output is added to the hidden states")
            return self._set(result, Mark(a.axis, sure=True))
        self._confirm(a)
        self._confirm(b)
        return self._set(result, Mark(a.axis, sure=True))

    def _scale(self, name: str, x: Tensor, mark: Mark, args: Any, result: Tensor) -> bool | None:
        if len(args) < 2:
            return None
        divides = "div" in name
        if divides and args[0] is not x:
            return None
        other = args[1] if args[0] is x else args[0]
        if isinstance(other, Tensor) and (self._get(other) is not None or not self._even(other, mark)):
            return None
        return self._set(result, mark)

    def _even(self, other: Any, mark: Mark) -> bool:
        """Whether a factor is the same for all channels."""
        return (
            not isinstance(other, Tensor)
            or other.numel() == 1
            or other.dim() < -mark.axis
            or other.shape[mark.axis] == 1
        )

    def _put(self, marked: list[Tensor], args: Any, kwargs: Any, result: Tensor) -> bool | None:
        """Tokens are added to those of another tensor, which begins as zeros."""
        target = args[0]
        source = kwargs.get("source", kwargs.get("src", args[3] if len(args) > 3 else None))
        if not isinstance(source, Tensor) or (mark := self._get(source)) is None:
            return None
        base = self._get(target)
        if base is not None:
            return self._meet(base, mark, result)
        return self._set(result, mark)  # the proof shows whether it began as zeros

    def _sum(self, mark: Mark, x: Tensor, args: Any, kwargs: Any, result: Tensor) -> bool | None:
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is None:
            return None
        dims = {dims} if isinstance(dims, int) else set(dims)
        dims = {dim if dim < 0 else dim - x.dim() for dim in dims}
        if mark.axis in dims:
            return None
        keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        axis = mark.axis if keep else mark.axis + sum(dim > mark.axis for dim in dims)
        return self._set(result, replace(mark, axis=axis))

    # -- parameters ------------------------------------------------------------------------------

    def _embedded(self, args: Any, kwargs: Any, result: Tensor) -> None:
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        name = self._parameter(weight)
        if name is not None and result.shape[-1] == self._hidden:
            self._tables.add(name)
            self._set(result, Mark(-1, writers=frozenset({name})))

    def _multiplied(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> bool:
        """Whether a function multiplies with a matrix among the parameters. It reads the stream if its
        input is of it, and its output is a candidate if it has h rows."""
        bias = None
        if func is F.linear:
            x, weight, bias = linear_arguments(args, kwargs)
        elif is_grouped(func):
            x, weight, _ = grouped_arguments(args, kwargs)
        elif is_batched(func):
            x, weight = batched_arguments(args, kwargs)
        elif name in {"matmul", "__matmul__", "mm"} and len(args) > 1:
            x, weight = args[:2]
        else:
            return False
        parameter = self._parameter(weight) if isinstance(weight, Tensor) else None
        if parameter is None or not isinstance(x, Tensor):
            return False
        if weight.dim() > 2 and func is not F.linear and not (is_batched(func) or is_grouped(func)):
            return False
        mark = self._get(x)
        if mark is not None:
            if mark.axis != -1:
                self._escape([x], "multiplies along another axis than that of the channels")
            elif mark.sure:
                self._read(parameter, mark)
        if isinstance(result, Tensor) and result.shape[-1] == self._hidden:
            biases = {b for b in [self._parameter(bias) if bias is not None else None] if b}
            self._set(result, Mark(-1, writers=frozenset({parameter}), biases=frozenset(biases)))
        return True

    def _read(self, parameter: str, mark: Mark) -> None:
        before = self.uses.readers.setdefault(parameter, mark.norm)
        if before != mark.norm:
            what = f"reads the hidden states behind `{before}` and behind `{mark.norm}`"
            self.uses.refuse(parameter, what)

    def _confirm(self, mark: Mark) -> None:
        self.uses.biases |= dict.fromkeys(sorted(mark.biases))
        for name in sorted(mark.writers):
            table = self.uses.embeddings if name in self._tables else self.uses.writers
            table[name] = None

    def _parameter(self, tensor: Tensor) -> str | None:
        return self._names.get(tensor.untyped_storage().data_ptr())

    # -- marks -----------------------------------------------------------------------------------

    def _get(self, tensor: Tensor) -> Mark | None:
        entry = self._marks.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _set(self, tensor: Tensor, mark: Mark) -> bool:
        self._marks[id(tensor)] = (weakref.ref(tensor), mark)
        return True

    def _escape(self, marked: list[Tensor], what: str) -> None:
        if any(mark.sure for tensor in marked if (mark := self._get(tensor)) is not None):
            self.uses.refuse(self._where[-1] if self._where else "the model", what)

    # -- modules ---------------------------------------------------------------------------------

    @contextmanager
    def watching(self, name: str, root: nn.Module) -> Iterator[None]:
        """While it is open, norms within a module keep the stream; name: of the module."""
        with ExitStack() as stack:
            for local, module in root.named_modules():
                path = f"{name}.{local}".strip(".")
                for handle in self._hooks(path, module):
                    stack.callback(handle.remove)
            yield

    def _hooks(self, path: str, module: nn.Module) -> Iterator[Any]:
        whole = is_norm(module) or not any(True for _ in (*module.children(), *module.parameters()))

        def before(_: nn.Module, args: Any) -> None:
            self._where.append(path)
            self._suspended += whole

        def after(_: nn.Module, args: Any, out: Any) -> None:
            self._where.pop()
            self._suspended -= whole
            x = args[0] if args else None
            if whole and isinstance(x, Tensor) and (mark := self._get(x)) is not None:
                self._normed(path, module, x, mark, out)

        yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after)

    def _normed(self, path: str, module: nn.Module, x: Tensor, mark: Mark, out: Any) -> None:
        """A norm, or a module without weights, has made `out` of a marked tensor."""
        fault = None
        if not isinstance(out, Tensor) or out.shape != x.shape or mark.axis != -1:
            fault = "takes the hidden states and puts out another shape"
        elif out is x:
            return
        elif is_norm(module):
            fault = self._fault_of_norm(path, module)
            if fault is None and mark.norm is not None:
                fault = f"is a norm of what the norm `{mark.norm}` puts out"
            new = replace(mark, norm=path)
        else:
            fault = None if _keeps_bases(module, self._hidden) else "is not linear in each token"
            new = mark
        if fault is None:
            self._set(out, new)
        elif mark.sure:
            self.uses.refuse(path, fault)

    def _fault_of_norm(self, path: str, module: nn.Module) -> str | None:
        """Why a norm cannot be taken apart into one without weights and a factor of its readers."""
        bias = module._parameters.get("bias")
        if len(module._parameters["weight"]) != self._hidden:  # type: ignore[arg-type]
            return "is a norm of a part of the hidden states"
        if bias is not None:
            return "is a norm that adds a bias"
        offset = norm_offset(module)
        if offset is None:
            return "is a norm that does more than to multiply by its weights"
        unit: Any = copy.deepcopy(module).float().cpu()
        unit.weight = nn.Parameter(torch.full((self._hidden,), 1.0 - offset), requires_grad=False)
        if not _keeps_bases(unit, self._hidden):
            return "is a norm that subtracts the mean of the hidden states"
        self.uses.offsets[path] = offset
        return None


def reflections(hidden: int, seed: int) -> Tensor:
    """Unit vectors [8, h] of eight reflections, whose product is an orthogonal matrix with no symmetry.

    float32, drawn by a generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(8, hidden, generator=generator, dtype=torch.float64)).float()


def turned(x: Tensor, vectors: Tensor) -> Tensor:
    """x R, of rows x [.., h] and the product R of reflections."""
    for v in vectors:
        x = x - 2 * (x @ v).unsqueeze(-1) * v
    return x


def _keeps_bases(module: nn.Module, hidden: int) -> bool:
    """Whether a module gives a rotated output for a rotated input. Tried with random numbers."""
    vectors = reflections(hidden, seed=1)
    x = torch.randn(4, hidden, generator=torch.Generator().manual_seed(2)) + 0.5
    with torch.no_grad():
        expected, out = turned(module(x), vectors), module(turned(x, vectors))
    return bool((out - expected).norm() < 1e-4 * expected.norm())
