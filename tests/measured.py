"""Schemes that need data, given some: what tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantcli.checkpoint.header import StoredTensor, read_header
from quantcli.planning.measured import Measured
from quantcli.schemes.arithmetic.observers import ChannelSquare, Observer
from quantcli.schemes.base import Scheme


def maxima(scheme: Scheme, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a scheme needs to know of a whole weight [n, k], of this weight alone."""
    columns = weight.float().abs().amax(0)
    found = {"column_amax": columns} if scheme.needs_column_amax else {}
    return found | {"weight_amax": columns.amax().view(1)} if scheme.needs_weight_amax else found


def constants(
    scheme: Scheme,
    serving: torch.dtype,
    x: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Stats of inputs x, or of an observer that saw nothing if x is None. Also the maxima of the
    whole weight and a learned transform, if the scheme needs them."""
    found: dict[str, Any] = {}
    if scheme.needs_weight_amax or scheme.needs_column_amax:
        assert weight is not None
        found |= maxima(scheme, weight)
    if scheme.schedule is not None:  # a transform that does nothing
        k = (x if weight is None else weight).shape[-1]
        stats = scheme.blank(k, serving)
        return found | scheme.constants(stats, serving) | {"weight_clip": torch.ones(1, 1)}
    observers = [scheme.observer(serving)]
    if scheme.clips_by_inputs:
        assert x is not None
        observers.append(Observer(ChannelSquare()))
    stats: dict[str, torch.Tensor] = {}
    for observer in observers:
        if observer is not None:
            if x is not None:
                observer.update(x.to(serving), 0)
            stats |= observer.stats()
    return found | (scheme.constants(stats, serving) if stats else {})


def weight_dtype(scheme: Scheme, serving: torch.dtype) -> torch.dtype:
    """The dtype in which engines hold `weight_scale`."""
    in_float32 = scheme.name.startswith("fp8_") or scheme.name in {
        "w8a8_static",
        "w4a4_dynamic",
        "w4a4_flatquant",
        "w4a4_hadamard",
    }
    return torch.float32 if in_float32 else serving


def quantize(
    scheme: Scheme,
    weight: torch.Tensor,
    serving: torch.dtype,
    x: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """A whole weight, with constants from x, as the engine will hold it."""
    found = constants(scheme, serving, x, weight)
    return scheme.quantize(weight, weight_dtype(scheme, serving), found, bias)


def store(file: Path, stats: dict[str, dict[str, torch.Tensor]]) -> Measured:
    """What was measured, by module, on disk and as the planner takes it."""
    named = {f"{m}/{name}": t.clone() for m, found in stats.items() for name, t in found.items()}
    save_file(named, file)
    table: dict[str, dict[str, StoredTensor]] = {}
    for stored in read_header(file)[0]:
        module, _, name = stored.spec.name.partition("/")
        table.setdefault(module, {})[name] = stored
    return Measured(table)
