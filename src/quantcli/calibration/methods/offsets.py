"""Learned rounding: codes and scales of a layer's weights by the error of the layer's outputs.

Each weight has a number z, which is rounded to its code, and each group a factor exp(t) of its scale.
Both learn from the gradients of the weight w = q s that they make, as if rounding were not there:

    dL/dz = dL/dw s        dL/dt = sum over the group of dL/dw w

They begin at codes and scales that GPTQ has found, z as near to the float weight as the code allows:
if all began in the middle, steps of equal size would take many codes to the next one at once.
Sources: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568;
Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", arXiv 2309.05516.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantcli.calibration.methods.base import LayerWork
from quantcli.calibration.methods.course import Course
from quantcli.calibration.replay.skeleton import Segment
from quantcli.calibration.replay.taps import Matrix
from quantcli.core.errors import InputError
from quantcli.core.number_types import ElementType
from quantcli.core.numerics import NO_STATS, Parts, Stats
from quantcli.schemes.arithmetic import elements, tiles
from quantcli.schemes.base import Learner, Schedule, Scheme
from quantcli.schemes.by_data import Learned

_INSIDE = 0.45  # of the smallest step between two codes: how far from its code a z begins at most
_REACH = 1.0  # how far a z may go from where it began
_SLOWER = 0.02  # the rate of factors, over that of z: an error of 1 % of a scale is a large one


@dataclass(frozen=True)
class RoundedRows:
    """Rows of a weight and how they are rounded.

    rows:     the float weight, float32 [n, k].
    numbers:  those of its codes, float32 [n, k].
    scale:    float32 [n, groups], as it is stored; columns: that share one.
    whole:    what all scales are multiplied with, float32 [1] or None.
    zero:     zero points, float32 [n, k] or None.
    to_scale: the nearest numbers that may be a scale; None: scales stay.
    """

    rows: Tensor
    numbers: Tensor
    scale: Tensor
    columns: int
    element: ElementType
    whole: Tensor | None = None
    zero: Tensor | None = None
    to_scale: Callable[[Tensor], Tensor] | None = None

    def spread(self, scale: Tensor) -> Tensor:
        """What each column is multiplied with, float32 [n, k]."""
        step = scale if self.whole is None else scale * self.whole
        return tiles.spread(step, (1, self.columns), *self.rows.shape)

    def less_zero(self, numbers: Tensor) -> Tensor:
        """Numbers less their zero points."""
        return numbers if self.zero is None else numbers - self.zero


def together(
    pieces: Sequence[tuple[Tensor, Parts]],
    scheme: Scheme,
    to_scale: Callable[[Tensor], Tensor] | None,
    device: torch.device,
) -> RoundedRows:
    """The rows of a matrix that is made of several modules: of each its float rows, and its parts."""
    weight = scheme.numerics.weight
    rows = torch.cat([scheme.to_round(rows, NO_STATS) for rows, _ in pieces]).to(device)

    def part(name: str) -> Tensor:
        return torch.cat([parts[name] for _, parts in pieces]).to(device)

    n, k = rows.shape
    tile = weight.block or (1, k)
    whole = pieces[0][1].get("weight_global_scale")
    zero = None if weight.symmetric else tiles.spread(part("weight_zero_point").float(), tile, n, k)
    return RoundedRows(
        rows,
        elements.decode(part("weight"), weight.element, k),
        part("weight_scale").float(),
        tile[1],
        weight.element,
        None if whole is None else whole.to(device),
        zero,
        to_scale,
    )


class OffsetLearner(Learner):
    """Of one matrix."""

    def __init__(self, start: RoundedRows, lr: float) -> None:
        self._start, self._lr = start, lr
        step = start.spread(start.scale)
        exact = start.rows / step if start.zero is None else start.rows / step + start.zero
        inside = _INSIDE * start.element.step
        offset = (exact - start.numbers).nan_to_num(0.0).clamp(-inside, inside)
        self._z = start.numbers + offset
        # codes beyond the ends of their type are not there
        self._low = (self._z - _REACH).clamp_min(start.element.least - inside)
        self._high = (self._z + _REACH).clamp_max(start.element.largest + inside)
        self._factor = torch.zeros_like(start.scale)
        self._leaf = self._numbers = self._step = torch.empty(0)

    def parameters(self) -> list[dict[str, Any]]:
        """All z, and the factors if scales are free."""
        groups: list[dict[str, Any]] = [{"params": [self._z], "lr": self._lr}]
        if self._start.to_scale is not None:
            groups.append({"params": [self._factor], "lr": self._lr * _SLOWER})
        return groups

    def _rounded(self) -> tuple[Tensor, Tensor]:
        """Numbers of codes [n, k], and scales [n, groups]."""
        numbers = elements.nearest(self._z.clone(), self._start.element)
        scale, to_scale = self._start.scale, self._start.to_scale
        if to_scale is None:
            return numbers, scale
        found = to_scale((scale * self._factor.exp()).abs()).copysign(scale)
        return numbers, torch.where(torch.isfinite(found), found, scale)

    @torch.no_grad()
    def begin(self) -> list[Tensor]:
        """The weight that codes and scales stand for."""
        torch.minimum(torch.maximum(self._z, self._low), self._high, out=self._z)
        self._numbers, scale = self._rounded()
        self._step = self._start.spread(scale)
        self._leaf = (self._start.less_zero(self._numbers) * self._step).requires_grad_()
        return [self._leaf]

    def linear(self, key: Hashable, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., k] -> [..., n], in the dtype of x."""
        y = F.linear(x, self._leaf.to(x.dtype))
        return y if bias is None else y + bias

    @torch.no_grad()
    def end(self, gradients: list[Tensor]) -> None:
        """See the module."""
        (gradient,) = gradients
        self._z.grad = gradient * self._step
        by_weight = gradient * self._leaf
        self._factor.grad = tiles.cut(by_weight, self._start.columns).sum(-1)

    @property
    def channel_scale(self) -> Tensor | None:
        """Channels stay as they are."""
        return None

    @property
    def condition(self) -> float:
        """Nothing is transformed."""
        return 1.0

    def state(self) -> list[Tensor]:
        """All z, and the factors."""
        return [self._z.clone(), self._factor.clone()]

    def restore(self, state: list[Tensor]) -> None:
        """Take them."""
        self._z.copy_(state[0])
        self._factor.copy_(state[1])

    @torch.no_grad()
    def stats(self, key: Hashable) -> Stats:
        """`codes`, and `scales` if they are free."""
        torch.minimum(torch.maximum(self._z, self._low), self._high, out=self._z)
        numbers, scale = self._rounded()
        found = {"codes": elements.encode(numbers, self._start.element).cpu()}
        return found if self._start.to_scale is None else found | {"scales": scale.cpu()}


def learn(
    work: LayerWork,
    starts: Mapping[Matrix, tuple[Learned, Sequence[Segment]]],
    start_of: Callable[[Sequence[Segment]], RoundedRows],
) -> None:
    """Let the codes of a layer's matrices learn: new stats `codes` and `scales`, and a remark.

    starts: by matrix, how it learns, and the modules that are its rows. start_of: these rows. The
    start is kept unless the loss on the samples is smaller afterwards. InputError for several options.
    """
    run = work.run
    named = {how: segments[0].module for how, segments in starts.values()}
    if len(named) > 1:
        raise InputError(
            f"{' and '.join(f'`{name}`' for name in named.values())} are in one layer, and their "
            "rounding learns with different options",
            where=run.policy.quantized[next(iter(named.values()))].rule,
            fix="give their rules the same ones",
        )
    (how,) = named
    samples = sum(len(batch.input_ids) for batch in run.batches)
    schedule = Schedule(max(1, round(how.steps * how.batch / samples)), how.batch)
    generator = torch.Generator().manual_seed(run.policy.seed * 2**20 + work.layer.index)
    learners = {
        matrix: OffsetLearner(start_of(segments), how.lr) for matrix, (_, segments) in starts.items()
    }
    before, after = Course(work.layer, learners).learn(schedule, generator)
    for matrix, (_, segments) in starts.items():
        found = learners[matrix].stats(matrix)
        for segment in segments:
            rows = slice(segment.start, segment.stop)
            own = {name: tensor[rows].clone() for name, tensor in found.items()}
            work.stats[segment.module] = {**work.stats[segment.module], **own}
            numbers = work.report.modules[segment.module].numbers
            for key in ("output_error", "output_error_nearest"):  # of the codes before learning
                numbers.pop(key, None)
            numbers |= {
                "layer_error_before": math.sqrt(before),
                "layer_error": math.sqrt(min(before, after)),
            }
    kept = "" if after < before else ": no better, kept as it was"
    work.report.note = f"loss {before:.2e} -> {after:.2e}{kept}"
