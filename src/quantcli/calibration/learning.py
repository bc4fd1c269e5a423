"""What a layer's schemes learn: its quantized outputs are brought near to its float ones.

Teacher and student are the same layer on the same inputs. A step's gradients are those of single
batches, each computed by one thread and summed in their order: workers change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from quantcli.calibration.engine import Engine, Quantizer
from quantcli.calibration.loaded import Layer
from quantcli.calibration.skeleton import Segment
from quantcli.calibration.taps import Matrices, Matrix, Tap
from quantcli.core.errors import InputError
from quantcli.schemes.base import Learner, Schedule

_TINY = 1e-30  # an error of nothing, as of a layer of zeros
_LAST_RATE = 1e-3  # of the learning rate, where the cosine ends


class Course:
    """A loaded layer and its learners, by matrix."""

    def __init__(self, layer: Layer, learners: Mapping[Matrix, Learner]) -> None:
        self._layer = layer
        self._replay = layer.run.replay
        self._batches = layer.run.batches
        self._matrices = Matrices(layer.name, layer.module)
        self._learners = learners
        self._each = list(dict.fromkeys(learners.values()))
        self._targets: dict[int, Tensor] = {}
        self._left = layer.run.held_targets  # bytes; what is not held is computed again

    def learn(self, schedule: Schedule, generator: torch.Generator) -> tuple[float, float]:
        """Learn; the loss before and after. What was learned is what had the lower one.

        Loss: squared error of the layer's outputs over their sum of squares, on all batches.
        """
        before = self.loss()
        first = [learner.state() for learner in self._each]
        steps = self._steps(schedule.batch)
        groups = [group for learner in self._each for group in learner.parameters()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        total = schedule.epochs * len(steps)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * n / total)) / 2
        )
        for _ in range(schedule.epochs):
            for place in torch.randperm(len(steps), generator=generator).tolist():
                optimizer.zero_grad()
                self._step(steps[place])
                optimizer.step()
                rates.step()
        after = self.loss()
        if not after < before:
            for learner, state in zip(self._each, first, strict=True):
                learner.restore(state)
        return before, after

    def _steps(self, samples: int) -> list[list[int]]:
        """Batches in groups of about so many samples."""
        steps: list[list[int]] = [[]]
        filled = 0
        for number, batch in enumerate(self._batches):
            if filled >= samples:
                steps.append([])
                filled = 0
            steps[-1].append(number)
            filled += len(batch.input_ids)
        return steps

    def _step(self, numbers: list[int]) -> None:
        begun = [learner.begin() for learner in self._each]
        leaves = [leaf for some in begun for leaf in some]

        def work(number: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                error, _ = self._error(number, Tap(self._matrices, _Student(self._learners)))
                gradients = torch.autograd.grad(
                    error, leaves, allow_unused=True, materialize_grads=True
                )
            return error.detach(), *gradients

        found = self._replay.each(work, numbers)
        error, *summed = (reduce(torch.add, of_leaf) for of_leaf in zip(*found, strict=True))
        # of the logarithm of the error: hard batches do not drown easy ones
        summed = [gradient / error.clamp_min(_TINY) for gradient in summed]
        size = sum(gradient.square().sum() for gradient in summed)
        if not bool(torch.isfinite(torch.as_tensor(size))):
            raise InputError(
                f"`{self._layer.name}`: gradients are not finite",
                where="what its scheme learns",
                fix="take a smaller `lr`, or set calibration.dtype to float32",
            )
        start = 0
        for learner, some in zip(self._each, begun, strict=True):
            try:
                learner.end(summed[start : start + len(some)])
            except InputError as error:
                modules = ", ".join(
                    f"`{m.parameter.removesuffix('.weight')}`" for m in self._of(learner)
                )
                raise InputError(error.what, where=modules, fix=error.fix) from None
            start += len(some)

    def _of(self, learner: Learner) -> list[Matrix]:
        return [matrix for matrix, its in self._learners.items() if its is learner]

    def loss(self) -> float:
        """As the learners have it now."""
        for learner in self._each:
            learner.begin()
        return self._loss(lambda: Tap(self._matrices, _Student(self._learners)))

    def served_loss(self, segments: Mapping[str, list[list[Segment]]], quantizer: Quantizer) -> float:
        """By the engine's arithmetic."""
        engine = Engine(self._layer.name, self._layer.module, segments, quantizer)
        return self._loss(lambda: Tap(self._matrices, engine))

    def _loss(self, tap: Callable[[], Tap]) -> float:
        def work(number: int) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                error, size = self._error(number, tap())
            return error.double(), size.double()

        found = self._replay.each(work, range(len(self._batches)))
        errors, sizes = (torch.stack(values).sum() for values in zip(*found, strict=True))
        return float(errors / sizes) if float(sizes) else 0.0

    def _error(self, number: int, tap: Tap) -> tuple[Tensor, Tensor]:
        """Squared error of a batch's outputs, and their sum of squares; padding counts for nothing."""
        target, at = self._target(number), self._layer
        out = self._replay.forward(at.index, at.module, at.states, number, lambda _: tap)
        error = out.float() - target
        mask = self._batches[number].mask
        if mask is not None:
            shape = (*mask.shape, *[1] * (out.dim() - 2))
            error = error * mask.to(out.device).view(shape)
        return error.square().sum(), target.square().sum()

    def _target(self, number: int) -> Tensor:
        found, at = self._targets.get(number), self._layer
        if found is None:
            with torch.no_grad():
                found = self._replay.forward(at.index, at.module, at.states, number).float()
            if found.nbytes <= self._left:
                self._left -= found.nbytes
                self._targets[number] = found
        return found


class _Student:
    """A listener that computes with what the learners have."""

    def __init__(self, learners: Mapping[Matrix, Learner]) -> None:
        self._learners = learners

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor | None:
        learner = self._learners.get(matrix)
        return None if learner is None else learner.linear(matrix, x, bias)
