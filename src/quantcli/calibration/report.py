"""The report of a layer's calibration, which the store keeps as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ModuleReport:
    """A module. tokens: rows of its input.

    routed:  those that the router gave it, if it was shown all tokens; else None.
    numbers: its stats of one number, and those that methods add, such as relative errors, by name.
    remarks: what methods have to say about it, by name.
    """

    tokens: int
    numbers: dict[str, float]
    remarks: dict[str, str] = field(default_factory=dict)
    routed: int | None = None

    def document(self) -> dict[str, Any]:
        """JSON-able data."""
        routed = {} if self.routed is None else {"routed": self.routed}
        return {"tokens": self.tokens, **routed, **self.numbers, **self.remarks}


@dataclass
class LayerReport:
    """A layer.

    edits:        vectors by tensor and kind.
    uncalibrated: modules that no token reached.
    results:      what methods report, dataclasses or JSON-able data; the list of the groups of channels
                  that one has edited is named by its `edited_as`.
    messages:     lines for people, which are not stored.
    note:         a remark for the progress display, which is not stored either.
    """

    layer: str
    modules: dict[str, ModuleReport] = field(default_factory=dict)
    edits: dict[str, dict[str, str]] = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    note: str = ""

    def document(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "layer": self.layer,
            "modules": {name: module.document() for name, module in self.modules.items()},
            "edits": self.edits,
            "uncalibrated": self.uncalibrated,
            **asdict(self)["results"],
        }
