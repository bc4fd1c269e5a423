"""Experts that no token reached, and those whose statistics they take: `calibration.uncalibrated`.

`group`: all experts of the layer. `nearest`: the expert whose row of the router's weight points in the
most similar direction, as the router gives alike tokens to such experts. MC-SMoE (Li et al. 2024, arXiv
2310.01334, "Merge, Then Compress") groups experts by how alike the router's outputs for them are; its
rows tell that without tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from quantcli.calibration.methods.base import LayerWork
from quantcli.calibration.report import TAKEN_FROM
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError
from quantcli.targets.vllm_family import EXPERT, float_linear


def donors_of(
    work: LayerWork, empty: Collection[str], reached: Collection[str]
) -> dict[str, list[str]]:
    """The modules whose statistics each of `empty` takes, out of those that tokens reached.

    Empty with the policies `error` and `dynamic`. A module that has none is left out. InputError if
    the layer has no router with a row for each expert.
    """
    policy = work.run.policy.uncalibrated
    found: dict[str, list[str]] = {}
    if not empty or policy not in {"nearest", "group"}:
        return found
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for module in sorted(reached):
        alike[_alike(module)].append(module)
    similar: dict[str, Tensor] = {}
    entries = work.report.results.setdefault(TAKEN_FROM, {})
    for module in sorted(empty):
        others = alike.get(_alike(module), [])
        if not others:
            continue
        expert = EXPERT.fullmatch(module)
        if policy == "group" or expert is None:
            found[module] = others
            pattern = ".".join(part or "*" for part in _alike(module))
            entries[module] = f"{expert['experts']}.*.{expert['rest']}" if expert else pattern
            continue
        layer = expert["experts"]
        if layer not in similar:
            similar[layer] = _similarity(work, layer)
        row = similar[layer][int(expert["index"])]
        best = max(others, key=lambda name: (float(row[_number(name)]), -_number(name)))
        found[module] = [best]
        entries[module] = best
    return found


def _alike(module: str) -> tuple[str, ...]:
    """A module's name without its numbers: the same for the same part of all experts."""
    return tuple("" if part.isdigit() else part for part in module.split("."))


def _number(module: str) -> int:
    expert = EXPERT.fullmatch(module)
    return int(expert["index"]) if expert else 0


def _similarity(work: LayerWork, layer: str) -> Tensor:
    """The cosine of the angle between the router's rows, by two experts: float64 [experts, experts]."""
    checkpoint = work.run.skeleton.checkpoint
    router = _router(checkpoint, layer, work.run.policy.quantized)
    if router is None:
        raise InputError(
            f"no router of `{layer}` was found: no float weight next to it has a row for each expert",
            where="calibration.uncalibrated",
            fix="set calibration.uncalibrated to group or dynamic",
        )
    rows = read_tensor(router).double()
    rows /= rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return rows @ rows.T


def _router(checkpoint: Checkpoint, layer: str, quantized: Mapping[str, object]) -> StoredTensor | None:
    """The weight of a router: [experts, hidden], next to the experts of a layer; by its name if there
    are several of this shape."""
    widths, numbers = set[int](), set[int]()
    for name, stored in checkpoint.tensors.items():
        match = EXPERT.fullmatch(name)
        if match and match["experts"] == layer and len(stored.spec.shape) == 2:
            numbers.add(int(match["index"]))
            widths.add(stored.spec.shape[1])
    parent = f"{layer.rpartition('.')[0]}."
    found = {
        module: stored
        for name, stored in checkpoint.tensors.items()
        if name.startswith(parent)
        and (module := name.removesuffix(".weight")) != name
        and module not in quantized
        and not EXPERT.fullmatch(name)
        and len(stored.spec.shape) == 2
        and stored.spec.shape[0] == len(numbers)
        and stored.spec.shape[1] in widths
    }
    named = {module: stored for module, stored in found.items() if float_linear(module)}
    return next(iter((named if len(found) > 1 else found).values()), None)
