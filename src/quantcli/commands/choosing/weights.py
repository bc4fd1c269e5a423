"""Bytes of weights on each device, after tensor parallelism, from a plan.

Devices share linears, experts, embeddings and heads; each has norms, routers, towers and what a module
has once. What lies on a device is computed from the shapes that the target declares.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.roles import LINEAR, Role, roles_of
from quantcli.checkpoint.spec import FLOATS, TensorSpec
from quantcli.planning.plan import Item, Plan, Quantize, quantized_items
from quantcli.targets.layouts import SLICES, Sides, StoredModule
from quantcli.targets.tensor_parallel import check_tp, devices_of, splits_inputs
from quantcli.targets.vllm_family import EXPERT

_NUMBER = re.compile(r"\d+")
# Matrices that every device has whole, next to those of tensor_parallel.py. Source: vllm 0.32.0,
# model_executor/models/deepseek_v2.py, the class Indexer.
_WHOLE = re.compile(r"\.indexer\.")


@dataclass(frozen=True)
class Model:
    """A model whose experts are planned once for all that are alike, as there may be tens of thousands.

    checkpoint: decoded, with one expert of each set if all in it have the same shapes.
    whole:      the same with all experts.
    times:      by the name of a set of experts, the number that its one expert stands for.
    roles:      of modules of `whole`.
    """

    checkpoint: Checkpoint
    whole: Checkpoint
    times: Mapping[str, int]
    roles: Mapping[str, Role]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Model:
        """From a decoded checkpoint."""
        roles = roles_of(checkpoint)
        sets: dict[str, dict[str, set[tuple[str, str, tuple[int, ...]]]]] = defaultdict(dict)
        places: dict[str, tuple[str, str]] = {}  # tensor -> set, expert
        for name, stored in checkpoint.tensors.items():
            if match := EXPERT.fullmatch(name):
                places[name] = match["experts"], match["index"]
                spec = (match["rest"], stored.spec.dtype, stored.spec.shape)
                sets[match["experts"]].setdefault(match["index"], set()).add(spec)
        alike = {
            name: experts
            for name, experts in sets.items()
            if all(content == next(iter(experts.values())) for content in experts.values())
        }
        first = {name: next(iter(experts)) for name, experts in alike.items()}
        tensors = {
            name: stored
            for name, stored in checkpoint.tensors.items()
            if name not in places or first.get(places[name][0], places[name][1]) == places[name][1]
        }
        on_disk = checkpoint.on_disk
        reduced = replace(checkpoint, tensors=tensors, undecoded=on_disk)
        return cls(reduced, checkpoint, {name: len(e) for name, e in alike.items()}, roles)

    def count(self, tensor: str) -> int:
        """The number of tensors that one of them stands for."""
        match = EXPERT.fullmatch(tensor)
        return self.times.get(match["experts"], 1) if match else 1

    @property
    def config(self) -> Settings:
        """The config of the language model."""
        return self.whole.text_config


def weight_nbytes(model: Model, plan: Plan, devices: int) -> int:
    """Bytes of a planned checkpoint's weights on one of some devices; of 1 device: of all tensors."""
    shapes: dict[Any, int] = {}
    return sum(nbytes * model.count(name) for name, nbytes in _tensors(model, plan, devices, shapes))


def _tensors(
    model: Model, plan: Plan, devices: int, shapes: dict[Any, int]
) -> Iterator[tuple[str, int]]:
    """Each tensor, and its bytes on a device. shapes: of tensors that were computed before."""
    for item in (item for shard in plan.shards for item in shard.items):
        for output in item.outputs:
            spec = output.spec
            if devices == 1:
                yield spec.name, spec.nbytes
            elif isinstance(item, Quantize):
                suffix = spec.name.rpartition(".")[2]
                last = item.module.rpartition(".")[2]
                key = item.scheme, last, suffix, item.source.spec.shape
                if key not in shapes:
                    shapes[key] = _of_module(model, plan, item, suffix, spec, devices)
                yield spec.name, shapes[key]
            else:
                yield spec.name, float_nbytes(model, spec, spec.nbytes, devices)


def _of_module(
    model: Model, plan: Plan, item: Quantize, suffix: str, spec: TensorSpec, devices: int
) -> int:
    """Bytes of a quantized module's tensor on a device, from the shape of its part of the weight."""
    n, k = _sides(model, item.module, item.source.spec, devices)
    layout = plan.target.layout(item.scheme.numerics)
    param = next((param for param in layout.params if param.suffix == suffix), None)
    if param is None:  # such as a bias
        share = 1 if splits_inputs(item.module) or not spec.shape else item.source.spec.shape[0] / n
        return math.ceil(spec.nbytes / share)
    shape = param.shape(n, k)
    whole = param.shape(*item.source.spec.shape)
    if SLICES in shape:
        fraction = k / item.source.spec.shape[1] if splits_inputs(item.module) else 1.0
        shape, whole = tuple(abs(s) for s in shape), tuple(abs(s) for s in whole)
        return math.ceil(spec.nbytes * fraction * math.prod(shape) / math.prod(whole))
    return math.ceil(spec.nbytes * math.prod(shape) / max(1, math.prod(whole)))


def _sides(model: Model, module: str, spec: TensorSpec, devices: int) -> Sides:
    """Outputs and inputs of a linear on one device."""
    n, k = spec.shape
    if _WHOLE.search(module):
        return n, k
    if splits_inputs(module):
        return n, -(-k // devices)
    return -(-n // devices_of(module, model.config, devices)), k


def float_nbytes(model: Model, spec: TensorSpec, nbytes: int, devices: int) -> int:
    """Bytes on one device of a tensor that stays float and takes `nbytes` as a whole."""
    if devices == 1 or not spec.shape or spec.numel == 0:
        return nbytes
    module, _, suffix = spec.name.rpartition(".")
    role = model.roles.get(module) or model.roles.get(spec.name)
    if role in ("embedding", "head"):
        vocabulary = model.config.size("vocab_size")
        by_rows = vocabulary is not None and spec.shape[0] >= vocabulary
        return -(-nbytes // devices) if by_rows and suffix == "weight" else nbytes
    if role not in LINEAR or role == "tower":
        return nbytes
    if len(spec.shape) == 3:  # a stack of experts
        return -(-nbytes // devices)
    if len(spec.shape) == 1:
        shared = splits_inputs(module) or _WHOLE.search(module)
        return nbytes if shared else -(-nbytes // devices_of(module, model.config, devices))
    n, k = _sides(model, module, spec, devices)
    return math.ceil(nbytes * n * k / spec.numel)


def unquantized_nbytes(model: Model, devices: int) -> int:
    """Bytes of the float model on one of some devices, in a dtype of 16 bits, as engines serve it."""
    total = 0
    for spec in model.checkpoint.specs():
        nbytes = 2 * spec.numel if spec.dtype in FLOATS else spec.nbytes
        total += model.count(spec.name) * float_nbytes(model, spec, nbytes, devices)
    return total


def split_faults(model: Model, plan: Plan | None = None) -> Callable[[int], str | None]:
    """What gives, for a number of devices, the reason why they cannot share a planned checkpoint, or
    None if they can. Without a plan only heads of attention are looked at."""
    alike: dict[Any, Quantize] = {}
    for item in quantized_items(plan) if plan else ():
        key = (_NUMBER.sub("", item.module), item.source.spec.shape, item.scheme)
        alike.setdefault(key, item)
    stored = {item.module: _as_stored(plan, item) for item in alike.values()} if plan else {}
    limits = plan.target.split_limits(stored) if plan else lambda module, sides, size: iter(())

    def fault(devices: int) -> str | None:
        finding = next(check_tp(model.config, stored.values(), devices, limits), None)
        return None if finding is None else finding.what

    return fault


def _as_stored(plan: Plan, item: Quantize) -> StoredModule:
    """A module of a plan as if it were on disk; its tensors have no data."""
    numerics = item.scheme.numerics
    tensors = {
        output.spec.name.rpartition(".")[2]: StoredTensor(output.spec, Path(), 0)
        for output in item.outputs
    }
    n, k = item.source.spec.shape
    return StoredModule(
        item.module, plan.target.layout(numerics), tensors, (n, k), plan.serving_dtype, numerics
    )


def modules_by_expert(items: list[Item]) -> Iterator[tuple[Any, bool]]:
    """The schemes of quantized modules, each once for linears and once for experts."""
    seen = {
        (item.scheme, EXPERT.fullmatch(item.module) is not None): None
        for item in items
        if isinstance(item, Quantize)
    }
    yield from seen
