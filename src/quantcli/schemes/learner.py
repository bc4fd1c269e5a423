"""What it takes to learn something for a scheme while a layer runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from quantcli.core.numerics import Stats

# Whether channels of an input may be multiplied, as what makes them can be divided. Powers of two are
# for channels that a float matrix reads, too: its weights would be rounded again.
Scalable: TypeAlias = Literal["freely", "by powers of two", "not at all"]


@dataclass(frozen=True)
class Schedule:
    """How long something is learned. batch: samples a step."""

    epochs: int
    batch: int


class Learner(ABC):
    """What is learned for some matrices that read the same input, while their layer runs.

    A step: `begin`, then any number of forwards that call `linear` on any thread, then `end` with the
    sum of their gradients with respect to what `begin` returned.
    """

    @abstractmethod
    def parameters(self) -> list[dict[str, Any]]:
        """Groups for torch's optimizers."""

    @abstractmethod
    def begin(self) -> list[Tensor]:
        """Make what this step computes with."""

    @abstractmethod
    def linear(self, key: Hashable, x: Tensor, bias: Tensor | None) -> Tensor:
        """One of the matrices, as it will be quantized: x [..., k] -> [..., n]."""

    @abstractmethod
    def end(self, gradients: list[Tensor]) -> None:
        """Take the gradients back to the parameters. InputError where learning has gone astray."""

    @property
    @abstractmethod
    def channel_scale(self) -> Tensor | None:
        """By which the input's channels are to be multiplied before all else: float32 [k], CPU."""

    @property
    @abstractmethod
    def condition(self) -> float:
        """How far the transform is from a rotation; 1 is one."""

    @abstractmethod
    def state(self) -> list[Tensor]:
        """A copy of all that is learned."""

    @abstractmethod
    def restore(self, state: list[Tensor]) -> None:
        """Go back to a copy."""

    @abstractmethod
    def stats(self, key: Hashable) -> Stats:
        """What was learned for a matrix, as the scheme's `constants` and `quantize` take it."""
