"""Function-preserving edits: what makes some channels is divided, what reads them is multiplied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.calibration.layout import Producer
from quantcli.calibration.skeleton import Segment
from quantcli.planning.measured import Factors


def norm_offset(norm: nn.Module) -> int | None:
    """The c of a norm that multiplies by (c + weight): 0, or 1 as in Gemma. None if it does not.

    Found by trying: a copy of the norm with other weights, on random inputs.
    """
    probe: Any = copy.deepcopy(norm).float().cpu()
    k = len(probe.weight)
    generator = torch.Generator().manual_seed(0)
    x, drawn = torch.randn(4, k, generator=generator), torch.rand(k, generator=generator)
    if getattr(probe, "bias", None) is not None:
        probe.bias = nn.Parameter(torch.zeros(k), requires_grad=False)

    def made(weight: Tensor) -> Tensor:
        probe.weight = nn.Parameter(weight, requires_grad=False)
        with torch.no_grad():
            out: Tensor = probe(x)
        return out

    at_zero, at_one = made(torch.zeros(k)), made(torch.ones(k))
    slope = at_one - at_zero
    for offset in (0, 1):
        if torch.allclose(at_zero, offset * slope, atol=1e-6) and torch.allclose(
            made(drawn), (offset + drawn) * slope, atol=1e-5
        ):
            return offset
    return None


def scale_norm(norm: nn.Module, offset: int, scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """New `weight` and `bias` of a norm whose channels are divided by `scale`, in its own dtype.

    Also returns the scales as they came out, float32: where c + weight had to be rounded, readers are
    multiplied by what the norm was really divided by.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    before = weight.detach().cpu().double() + offset
    new = (before / scale.double() - offset).to(weight.dtype)
    after = new.double() + offset
    real = before / after
    sound = (before != 0) & (after != 0) & torch.isfinite(new)
    new = torch.where(sound, new, weight.detach().cpu())
    real = torch.where(sound, real, 1.0).float()
    made = {"weight": new}
    bias = getattr(norm, "bias", None)
    if bias is not None:
        made["bias"] = (bias.detach().cpu().double() / real.double()).to(bias.dtype)
    return made, real


def fold(
    producer: Producer,
    segments: Mapping[str, list[list[Segment]]],
    scale: Tensor,
    edits: dict[str, Factors],
) -> None:
    """Add to `edits`, by stored tensor: rows of the producer divided, columns of readers multiplied.

    A norm's own edit is the caller's. Scales [channels] are of all its channels.
    """
    if producer.matrix is not None:
        for segment in segments[producer.matrix.parameter][producer.matrix.expert]:
            rows = 1 / scale[segment.start : segment.stop]
            if bool((rows != 1).any()):
                for suffix in ("weight", "bias"):
                    _add(edits, f"{segment.module}.{suffix}", Factors(rows=rows))
    for reader in producer.readers:
        columns = scale[reader.channels]
        for segment in segments[reader.matrix.parameter][reader.matrix.expert]:
            _add(edits, f"{segment.module}.weight", Factors(columns=columns))


def _add(edits: dict[str, Factors], name: str, new: Factors) -> None:
    old = edits.get(name, Factors())
    edits[name] = Factors(
        rows=_times(old.rows, new.rows), columns=_times(old.columns, new.columns), value=old.value
    )


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b
