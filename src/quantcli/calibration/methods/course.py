"""A course: a layer whose learners bring its outputs near to those of the float layer.

Teacher and student are the same layer on the same inputs. A step's gradients are those of single
batches, each computed by one thread and summed in their order: workers change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from quantcli.calibration.loaded import LoadedLayer
from quantcli.calibration.replay.engine import Quantizer
from quantcli.calibration.replay.taps import Matrix, Tap
from quantcli.core.errors import InputError
from quantcli.core.exact import exact
from quantcli.schemes.base import Learner, Schedule

FORWARDS = 3  # that forward and backward take together
_TINY = 1e-30  # an error of nothing, as of a layer of zeros
_LAST_RATE = 1e-3  # of the learning rate, where the cosine ends
_JUDGED = 16  # samples that losses are of, at least; others say the same


class Course:
    """A loaded layer and its learners, by matrix."""

    def __init__(self, layer: LoadedLayer, learners: Mapping[Matrix, Learner]) -> None:
        self._layer = layer
        self._replay = layer.run.replay
        self._batches = layer.run.batches
        self._matrices = layer.matrices()
        self._learners = learners
        self._each = list(dict.fromkeys(learners.values()))
        self._targets: dict[int, Tensor] = {}
        self._left = layer.run.budget  # bytes; other targets are computed again

    def learn(self, schedule: Schedule, generator: torch.Generator) -> tuple[float, float]:
        """Learn; the loss before and after. The learners keep the state with the lower one.

        Loss: squared error of the layer's outputs over their sum of squares, on every nth batch.
        """
        progress = self._layer.run.progress
        progress.phase("loss before", passes=0)
        before = self.loss()
        first = [learner.state() for learner in self._each]
        steps = self._steps(schedule.batch)
        groups = [group for learner in self._each for group in learner.parameters()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        total = schedule.epochs * len(steps)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * n / total)) / 2
        )
        progress.phase("learning", passes=FORWARDS * schedule.epochs)
        for epoch in range(schedule.epochs):
            places = torch.randperm(len(steps), generator=generator).tolist()
            for done, place in enumerate(places, epoch * len(steps) + 1):
                optimizer.zero_grad()
                loss = self._step(steps[place])
                optimizer.step()
                rates.step()
                tokens = sum(self._batches[number].input_ids.numel() for number in steps[place])
                progress.step(done, total, noun="step", tokens=tokens, loss=loss)
        progress.phase("loss after", passes=0)
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

    def _step(self, numbers: list[int]) -> float:
        """Learn from some batches. Returns their loss before."""
        leaves_of = self._begun()
        leaves = [leaf for some in leaves_of for leaf in some]

        def work(number: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                error, size = self._error(number, self._student())
                gradients = torch.autograd.grad(
                    error, leaves, allow_unused=True, materialize_grads=True
                )
            return error.detach(), size, *gradients

        results = self._replay.each(work, numbers, counted=False)
        error, size, *summed = (reduce(torch.add, of_leaf) for of_leaf in zip(*results, strict=True))
        loss = error / size.clamp_min(_TINY)
        # of the logarithm of the error: hard batches do not drown easy ones
        summed = [gradient / error.clamp_min(_TINY) for gradient in summed]
        length = sum(gradient.square().sum() for gradient in summed)
        if not bool(torch.isfinite(torch.as_tensor(length))):
            raise InputError(
                f"`{self._layer.name}`: gradients are not finite",
                where="what its scheme learns",
                fix="take a smaller `lr`, or set calibration.dtype to float32",
            )
        gradients = iter(summed)
        its_own = [[next(gradients) for _ in some] for some in leaves_of]

        def end(place: int) -> None:
            learner = self._each[place]
            try:
                learner.end(its_own[place])
            except InputError as error:
                modules = ", ".join(
                    f"`{m.parameter.removesuffix('.weight')}`" for m in self._of(learner)
                )
                raise InputError(error.what, where=modules, fix=error.fix) from None

        self._replay.each(end, range(len(self._each)), counted=False)
        return float(loss)

    def _student(self) -> Tap:
        """The layer with its learners, for one forward."""
        return Tap(self._matrices, _Student(self._learners))

    def _begun(self) -> list[list[Tensor]]:
        """The leaves of each learner, which each has on a thread of its own."""
        count = range(len(self._each))
        return self._replay.each(lambda place: self._each[place].begin(), count, counted=False)

    def _of(self, learner: Learner) -> list[Matrix]:
        return [matrix for matrix, its in self._learners.items() if its is learner]

    def loss(self) -> float:
        """With the present state of the learners."""
        self._begun()
        return self._loss(self._student)

    def served_loss(self, quantizer: Quantizer) -> float:
        """With the engine's arithmetic."""
        engine = self._layer.engine(quantizer)
        return self._loss(lambda: Tap(self._matrices, engine))

    def _loss(self, tap: Callable[[], Tap]) -> float:
        def work(number: int) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                error, size = self._error(number, tap())
            return exact(error).double(), exact(size).double()

        samples = sum(len(batch.input_ids) for batch in self._batches)
        some = range(0, len(self._batches), max(1, samples // _JUDGED))
        results = self._replay.each(work, some, counted=False)
        errors, sizes = (torch.stack(values).sum() for values in zip(*results, strict=True))
        return float(errors / sizes) if float(sizes) else 0.0

    def _error(self, number: int, tap: Tap) -> tuple[Tensor, Tensor]:
        """Squared error of a batch's outputs, and their sum of squares; padding counts for nothing."""
        target, layer = self._target(number), self._layer
        out = self._replay.forward(layer.index, layer.module, layer.states, number, lambda _: tap)
        error = out.float() - target
        mask = self._batches[number].mask
        if mask is not None:
            shape = (*mask.shape, *[1] * (out.dim() - 2))
            error = error * mask.to(out.device).view(shape)
        return error.square().sum(), target.square().sum()

    def _target(self, number: int) -> Tensor:
        target, layer = self._targets.get(number), self._layer
        if target is None:
            with torch.no_grad():
                target = self._replay.forward(layer.index, layer.module, layer.states, number).float()
            if target.nbytes <= self._left:
                self._left -= target.nbytes
                self._targets[number] = target
        return target


class _Student:
    """A listener that computes with the learners."""

    def __init__(self, learners: Mapping[Matrix, Learner]) -> None:
        self._learners = learners

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor | None:
        learner = self._learners.get(matrix)
        return None if learner is None else learner.linear(matrix, x, bias)
