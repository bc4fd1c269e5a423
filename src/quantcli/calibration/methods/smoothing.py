"""SmoothQuant: move outliers of activations into weights, by scales that keep the model's function.

For each channel s = max|x|^alpha / max|W column|^(1 - alpha) (Xiao et al. 2023); the
source of the channel is divided by s, and the columns that read it are multiplied. Scales are powers of
two, so that no float number is rounded, except in norms that add one to their weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quantcli.calibration.channels import LayerLayout, Producer
from quantcli.calibration.loaded import LoadedLayer
from quantcli.calibration.replay.taps import Matrix
from quantcli.calibration.report import SmoothedGroup
from quantcli.planning.measured import EditFactors

_LIMIT = 13  # scales stay within 2^-13 .. 2^13


def scales(
    producer: Producer,
    amax: Mapping[Matrix, Tensor],
    weights: Mapping[Matrix, Tensor],
    alpha: float,
) -> Tensor:
    """The scale of each channel, float32 [channels], powers of two; 1 without tokens.

    amax: max |x| of each column of a reader's input. weights: a reader's matrix [n, k].
    """
    count = len(producer.used)
    seen, weight = torch.zeros(count), torch.zeros(count)
    largest = math.inf
    for reader in producer.readers:
        columns = weights[reader.matrix].float().abs().amax(0).cpu()
        seen.scatter_reduce_(0, reader.channels, amax[reader.matrix], "amax")
        weight.scatter_reduce_(0, reader.channels, columns, "amax")
        largest = min(largest, torch.finfo(weights[reader.matrix].dtype).max)
    exponent = alpha * seen.log2() - (1 - alpha) * weight.log2()
    # no weight may overflow if it is kept in float16
    room = (math.log2(largest) - 1 - weight.log2()).floor()
    exponent = exponent.round().clamp(-_LIMIT, _LIMIT).minimum(room)
    sound = (seen > 0) & (weight > 0) & producer.used
    return torch.where(sound, exponent, 0.0).exp2()


def smooth(
    layer: LoadedLayer, layout: LayerLayout, edits: dict[str, EditFactors]
) -> list[SmoothedGroup]:
    """Add the edits that smooth a loaded layer; a report, one entry a producer."""
    policy = layer.run.policy
    report: list[SmoothedGroup] = []
    candidates: list[tuple[Producer, float]] = []
    for producer in layout.producers():
        modules = layout.modules(reader.matrix for reader in producer.readers)
        quantized = [module for module in modules if module in policy.quantized]
        alpha = policy.alpha(quantized) if quantized else None
        if alpha is not None:
            candidates.append((producer, alpha))
    if not candidates:
        return report
    widths = {r.matrix: len(r.channels) for producer, _ in candidates for r in producer.readers}
    amax = layer.channel_amax(widths)
    weights = {matrix: layer.weight(matrix) for matrix in widths}
    for producer, alpha in candidates:
        scale = scales(producer, amax, weights, alpha)
        scale = layer.divide(producer, scale, edits)
        if bool((scale == 1).all()):
            continue
        report.append(
            SmoothedGroup(
                producer.name,
                alpha,
                least=float(scale.min()),
                most=float(scale.max()),
                readers=sorted({r.matrix.parameter for r in producer.readers}),
            )
        )
    return report
