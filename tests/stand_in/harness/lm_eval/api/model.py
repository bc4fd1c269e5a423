"""The base class of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class LM(ABC):
    """What the harness asks."""

    @abstractmethod
    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        """Of continuations."""

    @abstractmethod
    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        """Of texts."""

    @abstractmethod
    def generate_until(self, requests: Any) -> list[str]:
        """Text that follows."""
