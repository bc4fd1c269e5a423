"""Learning a Kronecker transform for matrices that read one input (FlatQuant, Sun et al. 2024).

Both factors are M = U diag(d) V^T with U and V orthogonal (Cayley) and d > 0 (softplus), so that they
stay invertible and M^-1 = V diag(1 / d) U^T is exact. Rounding is passed straight through; scales are
functions of the values that are rounded, and gradients flow through them.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.numerics import Stats, decompose
from quantcli.schemes.arithmetic.clipping import INT4, least_error
from quantcli.schemes.arithmetic.kronecker import LARGEST_CONDITION
from quantcli.schemes.base import Learner, LearningTask
from quantcli.schemes.integer import LARGEST, LEAST

_OPEN = 4.0  # sigmoid(4) = 0.982: the first clip of inputs
_NARROWEST, _WIDEST = 0.2, 0.99  # clips of rows at the start
_TINY = torch.finfo(torch.float32).tiny
_CLIPS_FASTER = 10.0
_LEAST_AMAX = 1e-5
_LIMIT = 2.0**12  # of channel scales, either way


def quantize_tokens(values: Tensor, clip_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Transformed inputs as the kernel makes int4 of them: values float32 [..., k], of float16.

    Codes -8..7 as float32 [..., k], scale float32 [..., 1]; a token of zeros has codes and scale 0.
    """
    amax = values.abs().amax(-1, keepdim=True)
    multiplier = torch.where(amax > 0, (LARGEST / clip_ratio) / amax, LARGEST)
    codes = (values * multiplier).to(torch.float16).float().round_().clamp_(LEAST, LARGEST)
    return codes, amax * clip_ratio / LARGEST


class _FakeQuant(torch.autograd.Function):
    """y = clamp(round(x / s), -8, 7) s. Inside of the range dy/dx = 1 and dy/ds = q - x / s; outside
    dy/dx = 0 and dy/ds = q."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio)
        return ratio.round().clamp_(LEAST, LARGEST).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        (ratio,) = ctx.saved_tensors
        codes = ratio.round()
        inside = (codes >= LEAST) & (codes <= LARGEST)
        through = grads[0] * inside
        codes.clamp_(LEAST, LARGEST).mul_(grads[0]).addcmul_(through, ratio, value=-1)
        return through, codes.sum(-1, keepdim=True)


def fake_quant(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., k] on the grid of scale [..., 1], with gradients for both."""
    rounded: Tensor = _FakeQuant.apply(x, scale)  # type: ignore[no-untyped-call]
    return rounded


class Rounding(ABC):
    """How learned transforms see a type of codes: numbers on its grid, with gradients.

    clips: whether a share of the range of inputs, and of rows, can be learned.
    """

    clips: ClassVar[bool]

    @abstractmethod
    def inputs(self, values: Tensor, clip: Tensor) -> Tensor:
        """Transformed inputs [..., k] as they are rounded; clip [1]: the share of their range."""

    @abstractmethod
    def rows(self, rows: Tensor, clip: Tensor | None) -> Tensor:
        """Transformed weights [n, k] as they are rounded; clip [n, 1]: the share of a row's range."""

    def first_clips(self, rows: Tensor) -> Tensor:
        """The shares [n, 1] with the least squared error of rows [n, k]; asked if rows are clipped."""
        raise AssertionError(f"{type(self).__name__} has no clips")


class Int4(Rounding):
    """Int4, a scale for each token and each row."""

    clips: ClassVar[bool] = True

    def inputs(self, values: Tensor, clip: Tensor) -> Tensor:
        """With the scale max |x| clip / 7."""
        amax = values.abs().amax(-1, keepdim=True)
        return fake_quant(values, (amax * clip / LARGEST).clamp_min(_TINY))

    def rows(self, rows: Tensor, clip: Tensor | None) -> Tensor:
        """With the scale max |w| clip / 7."""
        step = rows.abs().amax(-1, keepdim=True) / LARGEST
        return fake_quant(rows, (step if clip is None else step * clip).clamp_min(_TINY))

    def first_clips(self, rows: Tensor) -> Tensor:
        """By a search."""
        widest = (rows.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(_TINY)
        return least_error(rows, widest, torch.float32, INT4, None) / widest


class _Side:
    """One factor M [size, size], of equal blocks on the diagonal; at first each a random rotation."""

    def __init__(
        self, size: int, generator: torch.Generator, device: torch.device, blocks: int = 1
    ) -> None:
        self.size = size
        self._block = size // blocks
        # of U and V, one behind the other: [2, blocks, block, block]
        first = [_random_orthogonal(self._block, generator) for _ in range(2 * blocks)]
        self._first = torch.stack(first).view(2, blocks, self._block, self._block).to(device)
        self._turns = torch.zeros_like(self._first)  # only what is above the diagonals counts
        self._stretch = torch.full((size,), math.log(math.e - 1), device=device)  # softplus: 1

    @property
    def parameters(self) -> list[Tensor]:
        return [self._turns, self._stretch]

    def both(self) -> tuple[Tensor, Tensor]:
        """M and its inverse."""
        u, v = self._first @ self._rotations()
        d = F.softplus(self._stretch).view(-1, 1, self._block)
        return _on_diagonal((u * d) @ v.mT), _on_diagonal((v / d) @ u.mT)

    def condition(self) -> float:
        """max d / min d."""
        d = F.softplus(self._stretch.detach())
        return float(d.amax() / d.amin())

    def _rotations(self) -> Tensor:
        """(I + A / 2)^-1 (I - A / 2) of the skew matrices A with `turns` above their diagonals."""
        above = self._turns.triu(1)
        skew = (above - above.mT) / 2
        one = torch.eye(self._block, device=skew.device)
        rotations: Tensor = torch.linalg.solve(one + skew, one - skew)
        return rotations


def _on_diagonal(blocks: Tensor) -> Tensor:
    """[blocks, size, size] -> [blocks size, blocks size], zero outside of the blocks."""
    count, size, _ = blocks.shape
    if count == 1:
        return blocks[0]
    rows = (
        F.pad(block, (place * size, (count - 1 - place) * size)) for place, block in enumerate(blocks)
    )
    return torch.cat(list(rows))


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    signs = r.diagonal().sign()
    turned: Tensor = q * torch.where(signs == 0, 1.0, signs)
    return turned.float()


class KroneckerLearner(Learner):
    """One transform, one clip of inputs, and a clip for each row of each weight."""

    def __init__(
        self,
        task: LearningTask,
        rounding: Rounding,
        lr: float,
        alpha: float,
        *,
        clips_rows: bool = False,
        blocks: int = 1,
    ) -> None:
        """lr: of the transforms. alpha: how much of outlier channels moves into the weights. blocks: on
        the diagonal of the left transform."""
        self._rounding = rounding
        weights = [weight.detach().float() for weight in task.weights.values()]
        # of all matrices, one below the other: they are multiplied at once
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._places = {key: place for place, key in enumerate(task.weights)}
        self._heights = [len(weight) for weight in weights]
        self._engine_dtype = task.engine_dtype
        self._lr = lr
        device, (left, right) = self._weight.device, decompose(self._weight.shape[1], blocks)
        self._left = _Side(left, task.generator, device, blocks)
        self._right = _Side(right, task.generator, device)
        self._clip = torch.full((1,), _OPEN, device=device)
        self._rows = torch.full((len(self._weight), 1), _OPEN, device=device)
        self._clips_rows = clips_rows
        self._channels: Tensor | None = None  # log of the scales
        self._scalable = task.scalable
        if task.scalable != "not at all":
            self._channels = self._first_scales(task.amax.to(device), alpha)
        if clips_rows:
            self._start_clips()
        self._local = threading.local()
        for parameter in self._all():
            parameter.requires_grad_(True)

    def _first_scales(self, amax: Tensor, alpha: float) -> Tensor:
        """log of max |w|^(1 - alpha) / max |x|^alpha of each channel."""
        columns = self._weight.abs().amax(0)
        weight, seen = columns.clamp_min(_LEAST_AMAX).log(), amax.clamp_min(_LEAST_AMAX).log()
        scale = (1 - alpha) * weight - alpha * seen
        scale = torch.where(amax > 0, scale, scale.median())
        scale = (scale - scale.median()).clamp(-math.log(_LIMIT), math.log(_LIMIT))
        if self._scalable == "by powers of two":
            scale = (scale / math.log(2)).round() * math.log(2)
        return scale

    def _start_clips(self) -> None:
        """The first clips of rows: those with the least squared error of their weights."""
        rows = self._transformed(self._left.both()[1], self._right.both()[1])
        self._rows = self._rounding.first_clips(rows).clamp(_NARROWEST, _WIDEST).logit()

    def _transformed(self, left_inverse: Tensor, right_inverse: Tensor) -> Tensor:
        """The weights as they are to be rounded: L^-1 W R^-T, each row of W seen as [l, r]."""
        grid = self._weight if self._channels is None else self._weight / self._channels.exp()
        grid = grid.reshape(-1, self._right.size) @ right_inverse.mT
        grid = left_inverse @ grid.view(-1, self._left.size, self._right.size)
        return grid.reshape(self._weight.shape)

    def _all(self) -> list[Tensor]:
        learned = [*self._left.parameters, *self._right.parameters]
        if self._rounding.clips:
            learned.append(self._clip)
        if self._clips_rows:
            learned.append(self._rows)
        if self._channels is not None and self._scalable == "freely":
            learned.append(self._channels)
        return learned

    def parameters(self) -> list[dict[str, Any]]:
        """Groups for the optimizer: clips learn ten times as fast."""
        clips = [self._clip] if self._rounding.clips else []
        clips += [self._rows] if self._clips_rows else []
        others = [p for p in self._all() if not any(p is clip for clip in clips)]
        return [
            {"params": others, "lr": self._lr},
            {"params": clips, "lr": _CLIPS_FASTER * self._lr},
        ]

    # -- one step --------------------------------------------------------------------------------

    def begin(self) -> list[Tensor]:
        """Make this step's matrices; the leaves that `linear` uses."""
        left, left_inverse = self._left.both()
        right, right_inverse = self._right.both()
        rows = self._transformed(left_inverse, right_inverse)
        share = self._rows.sigmoid() if self._clips_rows else None
        tensors = [left, right, self._clip.sigmoid(), self._rounding.rows(rows, share)]
        if self._channels is not None:
            tensors.append(self._channels.exp())
        self._leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        self._graph = [tensor for tensor in tensors if tensor.requires_grad]
        self._local = threading.local()
        return [leaf for leaf in self._leaves if leaf.requires_grad]

    def linear(self, key: Hashable, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., k] -> [..., n] with rounded inputs and weights."""
        seen = getattr(self._local, "seen", None)
        if seen is None or seen[0] is not x:
            outputs = F.linear(self._inputs(x), self._leaves[3])
            seen = self._local.seen = (x, torch.split(outputs, self._heights, -1))
        y: Tensor = seen[1][self._places[key]]
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def _inputs(self, x: Tensor) -> Tensor:
        left, right, clip = self._leaves[:3]
        values = x.float()
        if self._channels is not None:
            values = values * self._leaves[4]
        inner = (values.reshape(-1, self._right.size) @ right).view(-1, len(left), len(right))
        # (L^T X R)^T: one large product instead of many small ones
        inner = inner.transpose(1, 2) @ left
        values = inner.transpose(1, 2).reshape(x.shape)
        return self._rounding.inputs(values, clip)

    def end(self, gradients: list[Tensor]) -> None:
        """Gradients of leaves -> gradients of parameters. InputError for a runaway transform."""
        torch.autograd.backward(self._graph, gradients)
        condition = self.condition
        if not condition <= LARGEST_CONDITION:
            raise InputError(
                f"the learned transform has a condition number of {condition:.3g}",
                fix="take a smaller `lr`, fewer `epochs` or more calibration samples",
            )

    # -- results ---------------------------------------------------------------------------------

    @property
    def condition(self) -> float:
        """The larger one of the two factors'."""
        return max(self._left.condition(), self._right.condition())

    @property
    def channel_scale(self) -> Tensor | None:
        """The factors of inputs, float32 [k] on the CPU."""
        return None if self._channels is None else self._channels.detach().exp().cpu()

    def state(self) -> list[Tensor]:
        """A copy of all parameters."""
        return [parameter.detach().clone() for parameter in self._all()]

    def restore(self, state: list[Tensor]) -> None:
        """Take the parameters of a copy."""
        with torch.no_grad():
            for parameter, value in zip(self._all(), state, strict=True):
                parameter.copy_(value)

    def stats(self, key: Hashable) -> Stats:
        """left_trans, right_trans, clip_ratio; weight_clip [n, 1] if rows are clipped. On the CPU."""
        with torch.no_grad():
            learned = {
                "left_trans": self._left.both()[0].to(self._engine_dtype),
                "right_trans": self._right.both()[0].to(self._engine_dtype),
                "clip_ratio": self._clip.sigmoid() if self._rounding.clips else torch.ones(1),
            }
            if self._clips_rows:
                rows = torch.split(self._rows, self._heights)[self._places[key]]
                learned["weight_clip"] = rows.sigmoid()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in learned.items()}
