"""What each tensor of a quantized checkpoint becomes in another format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype, torch_dtype
from quantcli.plan import Copy, Item, Repack
from quantcli.recoding import recode
from quantcli.targets.base import Stored, Target
from quantcli.targets.layouts import StoredModule


def repack_items(
    checkpoint: Checkpoint, stored: Stored, origin: Target, target: Target
) -> Iterator[Item]:
    """One item per module and per other tensor, in the order of the files."""
    codes = {module.codes.spec.name: module for module in stored.modules.values()}
    owner = {
        tensor.spec.name: (module, suffix)
        for module in stored.modules.values()
        for suffix, tensor in module.tensors.items()
    }
    known: dict[Any, tuple[tuple[TensorSpec, ...], frozenset[str]]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in codes:
            yield _repack(codes[name], tensor, origin, target, known)
        elif name not in owner:
            yield Copy(tensor)
        elif owner[name][1] == "bias":
            module = owner[name][0]
            assert module.numerics is not None
            dtype = target.bias_dtype(module.numerics)
            yield Copy(tensor, None, None if dtype == tensor.spec.dtype else dtype)


def _repack(
    module: StoredModule, codes: StoredTensor, origin: Target, target: Target, known: dict[Any, Any]
) -> Repack:
    """What a module becomes, found by packing blocks that hold nothing; alike modules once."""
    assert module.numerics is not None
    multiple = math.lcm(
        origin.row_multiple(module.numerics),
        target.row_multiple(module.numerics),
        *(param.rows for param in module.row_params),
    )
    bias = module.tensors.get("bias")
    item = Repack(codes, module, origin, (), row_multiple=multiple, bias=bias)
    kinds = tuple((s, t.spec.dtype, t.spec.shape) for s, t in sorted(module.tensors.items()))
    key = (module.layout.label, module.numerics, kinds)
    if key not in known:
        known[key] = _dry_run(item, target)
    specs, constants = known[key]
    return replace(
        item,
        outputs=tuple(TensorSpec(f"{module.name}.{s.name}", s.dtype, s.shape) for s in specs),
        constants=frozenset(f"{module.name}.{suffix}" for suffix in constants),
    )


def _dry_run(item: Repack, target: Target) -> tuple[tuple[TensorSpec, ...], frozenset[str]]:
    """The tensors by suffix, and which of them do not depend on rows."""

    def packed(rows: int) -> dict[str, Tensor]:
        """Of codes that are all 0, and scales that are all 1."""
        module, stored = item.module, {}
        for param in (*module.row_params, *module.constants):
            spec = module.tensors[param.suffix].spec
            shape = (-(-rows // param.rows), *spec.shape[1:]) if param.rows else spec.shape
            dtype = torch_dtype(spec.dtype)
            if param.suffix == "weight_shape":
                stored[param.suffix] = torch.tensor(module.shape, dtype=dtype)
            elif param.suffix == "deq_scale" and dtype == torch.int64:  # bits of a float32
                stored[param.suffix] = torch.ones(shape).view(torch.int32).to(dtype)
            else:
                value = float(param.values == "positive" or param.suffix == "deq_scale")
                stored[param.suffix] = torch.full(shape, value).to(dtype)
        return recode(item, target, stored, 0, None)

    n = item.module.shape[0]
    none, some = packed(0), packed(item.row_multiple)
    specs, constants = [], set()
    for suffix, tensor in none.items():
        if len(tensor):
            constants.add(suffix)
            shape = tuple(tensor.shape)
        else:
            shape = (-(-n * len(some[suffix]) // item.row_multiple), *tensor.shape[1:])
        specs.append(TensorSpec(suffix, safetensors_dtype(tensor.dtype), shape))
    return tuple(specs), frozenset(constants)
