"""The checks of verification by name, and the report that their findings make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from quantcli.core.findings import Finding

Depth = Literal["structure", "full", "against", "run"]

# Every check by its name: at which depth it runs, and what holds where it passes.
CHECKS: dict[str, tuple[Depth, str]] = {
    "headers": ("structure", "weight files have sound headers, and every byte belongs to a tensor"),
    "index": ("structure", "the index lists the tensors that are there, each in its file, none twice"),
    "files": ("structure", "files that an engine needs are there, and none misleads it"),
    "config": ("structure", "config.json has no stale quantization and a dtype that can be served"),
    "sizes": ("structure", "config.json says what the tensors' shapes and the numbers of layers say"),
    "manifest": ("structure", "every file of the manifest is there with its size"),
    "description": ("structure", "description and tensors name each other, with types that exist"),
    "parameters": ("structure", "each module has the tensors that the engine registers, right in dtype "
                   "and shape"),
    "siblings": ("structure", "modules that the engine merges have one type, and equal shared tensors"),
    "experts": ("structure", "the experts of a layer are whole and alike"),
    "loader": ("structure", "the engine's loader finds each module's type and takes none for float"),
    "layers": ("structure", "as many layers as config.json says, none with less than its like"),
    "tp": ("structure", "modules can be split over the tensor parallel sizes that were asked for"),
    "hashes": ("full", "every file has the hash of the manifest"),
    "values": ("full", "no NaN or Inf, scales positive, codes in range"),
    "arithmetic": ("full", "numbers that follow from others do"),
    "source": ("against", "every tensor and file of the other model is accounted for"),
    "copies": ("against", "tensors that stay are the same, byte for byte, or edited for a reason"),
    "edits": ("against", "what is divided in one place is multiplied in another"),
    "sqnr": ("against", "each weight is as near to the other model's as its type allows"),
    "layer outputs": ("run", "each layer puts out what the other model's does"),
    "perplexity": ("run", "perplexity on the text has not grown beyond the limit"),
    "kl": ("run", "predictions have not moved beyond the limit"),
}  # fmt: skip


@dataclass
class Report:
    """The outcome of a verification. Fields as in the JSON document, see `document`."""

    checkpoint: str
    format: str = "unknown"
    against: str | None = None
    depths: list[Depth] = field(default_factory=list)
    limits: dict[str, float | None] = field(default_factory=dict)
    _found: dict[Finding, None] = field(default_factory=dict)  # in their order
    checked: dict[str, int] = field(default_factory=dict)  # by check: how many things
    modules: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, int] | None = None
    run: dict[str, Any] | None = None

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings in, each once."""
        self._found |= dict.fromkeys(findings)

    def count(self, check: str, things: int) -> None:
        """`things` more were checked."""
        self.checked[check] = self.checked.get(check, 0) + things

    @property
    def findings(self) -> list[Finding]:
        """All of them, in the order in which they were found."""
        return list(self._found)

    @property
    def errors(self) -> list[Finding]:
        """What makes the answer no."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors

    def document(self, tool: str) -> dict[str, Any]:
        """The report as JSON-able data: errors first, modules worst first."""
        errors = [finding.check for finding in self.errors]
        return {
            "ok": self.ok,
            "checkpoint": self.checkpoint,
            "format": self.format,
            "against": self.against,
            "tool": tool,
            "depths": list(self.depths),
            "limits": self.limits,
            "checks": [
                {
                    "name": name,
                    "depth": depth,
                    "about": about,
                    "checked": self.checked.get(name, 0),
                    "failed": errors.count(name),
                }
                for name, (depth, about) in CHECKS.items()
                if name in self.checked or name in errors
            ],
            "findings": [asdict(f) for f in sorted(self.findings, key=lambda f: f.severity)],
            "modules": sorted(self.modules, key=lambda m: (m["sqnr_db"] - m["limit_db"], m["module"])),
            "tensors": self.tensors,
            "run": self.run,
        }
