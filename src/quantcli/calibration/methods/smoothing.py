"""SmoothQuant: move outliers of activations into weights, by scales that keep the model's function.

For each channel s = rms(x)^alpha / max|W column|^(1 - alpha); the source of the channel is divided by
s, and the columns that read it are multiplied. Xiao et al. 2023 take max|x|, which a single token
decides; with the root of the mean square, int8 has two thirds of the KL divergence on a pretrained
model (`benchmarks/pretrained.py`).

Only outliers are moved. Which of the other channels are a little larger than the rest depends on the
text: smoothing them helps on the text of the calibration and hurts on others
(`benchmarks/generalisation.py`). So s is taken over the median of a group's channels, and is 1 for all
that are within a factor of it.

A norm's weight is divided and rounded first; what it then divides by is what the columns of its readers
are multiplied with, in float32. If a matrix that stays float reads it too, scales are powers of two,
which round nothing; so are those of rows of a matrix, which verification finds again in quantized rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from quantcli.calibration.channels import Producer
from quantcli.calibration.methods.base import LayerWork, Method
from quantcli.calibration.methods.scales import as_scales
from quantcli.calibration.policy import Policy
from quantcli.calibration.replay.taps import Matrix
from quantcli.recipe.fields import Block, Match, matches
from quantcli.schemes.arithmetic.observers import ChannelSquare, Summary


class SmoothRule(Block):
    """The strength of smoothing for groups of channels that a matching module reads."""

    match: Match
    alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="0 to 1")
    skip: bool = Field(False, description="leave these groups alone")
    optional: bool = Field(False, description="do not fail when nothing matches")

    @model_validator(mode="after")
    def _one_of_both(self) -> SmoothRule:
        if (self.alpha is None) != self.skip:
            raise ValueError("give either `alpha` or `skip: true`")
        return self


@dataclass(frozen=True)
class SmoothedGroup:
    """Channels of a producer that were scaled, by `least` to `most`; parameters that read them."""

    producer: str
    alpha: float
    least: float
    most: float
    readers: list[str]


def scales(
    producer: Producer,
    square: Mapping[Matrix, Tensor],
    weights: Mapping[Matrix, Tensor],
    alpha: float,
    within: float,
    *,
    powers: bool,
) -> Tensor:
    """The scale of each channel, float32 [channels]; 1 without tokens.

    within: the factor around the median within which channels are left alone.
    square: the mean of x^2 of each column of a reader's input. weights: a reader's matrix [n, k].
    powers: only powers of two; else numbers of bfloat16, in which the last bits of a power are lost.
    """
    count = len(producer.used)
    seen, weight = torch.zeros(count), torch.zeros(count)
    largest = math.inf
    for reader in producer.readers:
        columns = weights[reader.matrix].float().abs().amax(0).cpu()
        seen.scatter_reduce_(0, reader.channels, square[reader.matrix], "amax")
        weight.scatter_reduce_(0, reader.channels, columns, "amax")
        largest = min(largest, torch.finfo(weights[reader.matrix].dtype).max)
    exponent = alpha / 2 * seen.double().log2() - (1 - alpha) * weight.double().log2()
    sound = (seen > 0) & (weight > 0) & producer.used
    if within > 1 and bool(sound.any()):
        exponent -= exponent[sound].median()
        exponent = torch.where(exponent.abs() > math.log2(within), exponent, 0.0)
    return as_scales(torch.where(sound, exponent, 0.0), weight, largest, powers=powers)


class Smoothing(Method):
    """Move outliers of activations into weights (SmoothQuant)."""

    name: ClassVar[str] = "smooth"
    results: ClassVar[tuple[str, ...]] = ("smoothing",)
    edited_as: ClassVar[str] = "smoothed"
    divisible: ClassVar[bool] = True
    by_schemes: ClassVar[bool] = False

    alpha: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="0 to 1, for all groups")
    within: Annotated[float, Field(ge=1)] = Field(
        2.0,
        description="channels whose scale is within this factor of their group's median stay as they "
        "are: they are not outliers; 1: all are scaled",
    )
    rules: list[SmoothRule] = Field([], description="first match wins over `alpha`")

    @property
    def module_rules(self) -> list[SmoothRule]:
        """The rules."""
        return self.rules

    def strength(self, modules: Sequence[str], policy: Policy) -> float | None:
        """The alpha for channels that these modules read; None: no smoothing, as of float modules."""
        quantized = [module for module in modules if module in policy.quantized]
        if not quantized:
            return None
        for rule in self.rules:
            if any(matches(rule.match, module) for module in quantized):
                return rule.alpha
        return self.alpha

    def has_work(self, modules: Sequence[str], policy: Policy) -> bool:
        """Whether any of them may be smoothed."""
        return any(self.strength([module], policy) is not None for module in modules)

    def asked(self, work: LayerWork) -> Iterator[tuple[Matrix, type[Summary]]]:
        """The inputs of all that may be smoothed."""
        for producer, _ in self._candidates(work):
            for reader in producer.readers:
                yield reader.matrix, ChannelSquare

    def _candidates(self, work: LayerWork) -> list[tuple[Producer, float]]:
        """Producers that may be scaled, and how strongly."""
        candidates: list[tuple[Producer, float]] = []
        for producer in work.layout.producers():
            modules = work.layout.modules(reader.matrix for reader in producer.readers)
            alpha = self.strength(modules, work.run.policy)
            if alpha is not None:
                candidates.append((producer, alpha))
        return candidates

    def edit(self, work: LayerWork) -> None:
        """Scale the channels of every producer; a pass over the samples for them, if there are any and
        none has been made."""
        layer, layout, policy = work.layer, work.layout, work.run.policy
        groups: list[SmoothedGroup] = []
        work.report.results[self.edited_as] = groups
        candidates = self._candidates(work)
        if not candidates:
            return
        widths = {r.matrix: len(r.channels) for producer, _ in candidates for r in producer.readers}
        work.run.progress.phase("smoothing")
        square = layer.channel_square(widths)
        weights = {matrix: layer.weight(matrix) for matrix in widths}
        for producer, alpha in candidates:
            powers = producer.norm is None or layout.rounded_again(producer, policy.quantized)
            scale = scales(producer, square, weights, alpha, self.within, powers=powers)
            scale = layer.divide(producer, scale, work.edits)
            if bool((scale == 1).all()):
                continue
            groups.append(
                SmoothedGroup(
                    producer.name,
                    alpha,
                    least=float(scale.min()),
                    most=float(scale.max()),
                    readers=sorted({r.matrix.parameter for r in producer.readers}),
                )
            )
        _explain(work, [producer.name for producer, _ in candidates], groups)


def _explain(work: LayerWork, names: Sequence[str], groups: Sequence[SmoothedGroup]) -> None:
    """Say which channels were scaled, and which were not."""
    scaled = {group.producer: group for group in groups}
    done = [f"{name} (by {g.least:.3g} to {g.most:.3g})" for name, g in scaled.items()]
    left = [name for name in names if name not in scaled]
    text = f"{work.layer.name}: smoothed {', '.join(done) or 'nothing'}"
    if left:
        text += f"; not {', '.join(left)}, whose channels cannot be scaled or need not be"
    work.run.progress.detail(text)
