"""The report of a layer's calibration, which the store keeps as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ModuleReport:
    """A module. tokens: rows of its input.

    numbers: its stats of one number, and the relative errors of its output, by name.
    rounded_to_nearest: why its codes are not chosen by data, if they should be.
    """

    tokens: int
    numbers: dict[str, float]
    rounded_to_nearest: str = ""

    def document(self) -> dict[str, Any]:
        """JSON-able data."""
        why = {"rounded_to_nearest": self.rounded_to_nearest} if self.rounded_to_nearest else {}
        return {"tokens": self.tokens, **self.numbers, **why}


@dataclass
class LearningReport:
    """Modules that have learned together. Losses: squared error of the layer's outputs over their sum
    of squares, before and after, and with the engine's arithmetic."""

    modules: list[str]
    loss_before: float
    loss_after: float
    condition: float
    kept: str
    loss_served: float = 0.0


@dataclass(frozen=True)
class SmoothedGroup:
    """Channels of a producer that were scaled, by `least` to `most`; parameters that read them."""

    producer: str
    alpha: float
    least: float
    most: float
    readers: list[str]


@dataclass
class LayerReport:
    """A layer. edits: vectors by tensor and kind. uncalibrated: modules that no token reached."""

    layer: str
    modules: dict[str, ModuleReport] = field(default_factory=dict)
    smoothed: list[SmoothedGroup] = field(default_factory=list)
    edits: dict[str, dict[str, str]] = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)
    learned: LearningReport | None = None

    def document(self) -> dict[str, Any]:
        """JSON-able data."""
        modules = {name: module.document() for name, module in self.modules.items()}
        document = {**asdict(self), "modules": modules}
        return document if self.learned else {k: v for k, v in document.items() if k != "learned"}
