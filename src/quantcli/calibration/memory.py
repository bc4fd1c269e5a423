"""Memory of a calibration, and the share of it for hidden states."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from quantcli.calibration.methods.base import methods_of
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.remote.ahead import most_memory
from quantcli.checkpoint.remote.file import RemoteFolder
from quantcli.core.errors import InputError
from quantcli.core.memory.limits import free_memory
from quantcli.core.memory.shortage import check_memory
from quantcli.planning.plan import Plan, quantized_items
from quantcli.schemes.base import Scheme

BATCH_TOKENS = 2048  # of a batch: enough for matrices to be fast, little enough for many threads
_LEARNED = 56  # bytes for each weight whose code learns: float32 of itself, of its state and gradient
_COPIES = 11  # of a batch as wide as the widest matrix: measured, by width, threads and length


def needed(plan: Plan, workers: int) -> int:
    """Bytes of one decoder layer and the work on it, from headers; without hidden states."""
    layers = Counter[str]()  # model.layers.3.mlp.up_proj.weight -> model.layers.3
    for name, stored in plan.checkpoint.tensors.items():
        if block := re.match(r"\D+\.\d+\.", name):
            layers[block[0]] += stored.spec.nbytes
    working = _working(plan.checkpoint, workers) + of_methods(plan, workers)
    return max(layers.values(), default=0) + working


def of_methods(plan: Plan, workers: int) -> int:
    """Bytes that methods take next to a layer, with the codes that they choose; they work one after
    the other."""
    items = quantized_items(plan)
    codes = Counter[str]()
    layers: dict[str, list[tuple[Scheme, int]]] = defaultdict(list)
    for item in items:
        block = re.match(r"\D+\.\d+\.", item.module)
        name, (_, k) = block[0] if block else "", item.source.spec.shape
        layers[name].append((item.scheme, k))
        if item.scheme.rounding_learns:
            codes[name] += _LEARNED * item.source.spec.numel
        if item.scheme.rounded_by_data:
            codes[name] += item.source.spec.numel // item.scheme.numerics.weight.element.per_byte
    weights = [weight for own in layers.values() for weight in own]
    most = 0
    for method in methods_of(plan):
        each = max((method.worker_nbytes(own) for own in layers.values()), default=0)
        most = max(most, method.nbytes(weights) + workers * each)
    return most + max(codes.values(), default=0)


def states_budget(skeleton: Skeleton, workers: int, limit: int | None, methods: int) -> int:
    """Bytes of hidden states to hold in memory: the limit less one layer and its work.

    limit: --max-memory; None: most that is free. methods: bytes that methods take.
    """
    layers = range(len(skeleton.layers))
    # while experts are fused, the tensors that they are made of are there as well
    largest = max((skeleton.nbytes(i) * (2 if skeleton.converts(i) else 1) for i in layers), default=0)
    working = _working(skeleton.checkpoint, workers) + methods
    if limit is None:
        check_memory(largest + working, "one decoder layer and its work")
        return max(0, free_memory() * 4 // 5 - largest - working)
    if limit < largest + working:
        raise InputError(
            f"--max-memory {limit:,} bytes: one decoder layer and its work take {largest + working:,}",
            where="--max-memory",
            fix="give more, or fewer --workers",
        )
    return limit - largest - working


def _working(checkpoint: Checkpoint, workers: int) -> int:
    """Bytes of activations inside of a layer, on every thread, and of blocks of a remote model."""
    widest = max((s.spec.row_nbytes for s in checkpoint.tensors.values()), default=0)
    remote = most_memory() if isinstance(checkpoint.path, RemoteFolder) else 0
    return workers * BATCH_TOKENS * widest * _COPIES + remote
