"""The model around its decoder stack: read from the checkpoint when it is first used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantcli.calibration.replay.skeleton import Read, Skeleton
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_rows

_LARGE = 2**24  # bytes of a table of which only rows are read


class _Rows(TorchFunctionMode):
    """Embedding look-ups read just the rows that they need: tables are larger than decoder layers."""

    def __init__(self, tables: dict[int, StoredTensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._tables = tables  # id of a parameter -> where it is stored
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            ids = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            stored = self._tables.get(id(weight))
            if stored is not None:
                unique_ids, places = ids.unique(return_inverse=True)
                rows = read_rows(stored, unique_ids.tolist()).to(ids.device, self._dtype)
                return F.embedding(places, rows)
        return func(*args, **kwargs)


def _without_memory(parameter: Tensor, device: torch.device) -> nn.Parameter:
    """One NaN that stands for all numbers of a table: models move ids to the device of their table."""
    one = torch.full((), float("nan"), dtype=parameter.dtype, device=device)
    return nn.Parameter(one.expand(parameter.shape), requires_grad=False)


@contextmanager
def outside(skeleton: Skeleton, read: Read, device: torch.device) -> Iterator[None]:
    """Within it the model runs without its decoder layers, which are the caller's."""
    tables: dict[int, StoredTensor] = {}
    first = skeleton.embedding
    with ExitStack() as stack:
        for path, module in skeleton.model.named_modules():
            if skeleton.in_stack(f"{path}."):
                continue
            names = [*module._parameters, *(n for n, b in module._buffers.items() if b is not None)]
            paths = [f"{path}.{name}".lstrip(".") for name in names]
            paths = [name for name in paths if skeleton.outside(name) is not None]
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Embedding) and weight is not None and paths:
                if weight.nbytes < _LARGE and module is not first:
                    # a model may take the weight itself, such as that of relative positions
                    stack.enter_context(skeleton.filled(paths, read, device))
                    continue
                group = skeleton.outside(paths[0])
                if group is not None and group.renamed is not None:
                    table = _without_memory(weight, device)
                    tables[id(table)] = group.renamed
                    stack.callback(module.register_parameter, "weight", weight)
                    module._parameters["weight"] = table
                    continue
            if paths:
                hook = _load_at_first_call(module, paths, skeleton, read, device, stack)
                stack.callback(hook.remove)
        with _Rows(tables, skeleton.dtype):
            yield


def _load_at_first_call(
    module: nn.Module,
    names: list[str],
    skeleton: Skeleton,
    read: Read,
    device: torch.device,
    stack: ExitStack,
) -> Any:
    done: list[bool] = []

    def load(_: nn.Module, __: Any) -> None:
        if not done:
            done.append(True)
            stack.enter_context(skeleton.filled(names, read, device))

    return module.register_forward_pre_hook(load)
