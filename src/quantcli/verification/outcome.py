"""The checks of verification by name, and the report that they fill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from quantcli import __version__
from quantcli.core.findings import Finding, noted
from quantcli.recipe.fields import Verify
from quantcli.targets.serving import ServeCommand
from quantcli.verification.on_text.reports import RunReport

Depth = Literal["structure", "identity", "full", "against", "run"]
CONVERT = "convert the model again"
COPY = "copy the checkpoint again, or convert the model again"

# Every check by its name: its depth, and the statement that it proves.
CHECKS: dict[str, tuple[Depth, str]] = {
    "headers": ("structure", "weight files have sound headers, and every byte belongs to a tensor"),
    "index": ("structure", "the index lists the tensors that are there, each in its file, none twice"),
    "files": ("structure", "files that an engine needs are there, and none misleads it"),
    "config": ("structure", "config.json has no stale quantization, and the dtype that is served"),
    "sizes": ("structure", "config.json agrees with the shapes of tensors and the numbers of layers"),
    "manifest": ("structure", "files of the manifest are there with their sizes, and no others"),
    "description": ("structure", "description and tensors name each other, with types that exist"),
    "parameters": ("structure", "each module has the tensors that the engine registers, right in dtype "
                   "and shape"),
    "siblings": ("structure", "modules that the engine merges have one type, and equal shared tensors"),
    "experts": ("structure", "the experts of a layer are whole and alike"),
    "loader": ("structure", "the engine's loader finds each module's type and takes none for float"),
    "cache": ("structure", "each layer of attention has the scales of the cache that the engine reads"),
    "layers": ("structure", "as many layers as config.json says, none with fewer modules than others"),
    "tp": ("structure", "modules can be split over the given tensor parallel sizes"),
    "signature": ("identity", "the identity signed the checkpoint, and every file is what was signed"),
    "hashes": ("full", "every file has the hash of the manifest"),
    "values": ("full", "no NaN or Inf, scales positive, codes in range"),
    "arithmetic": ("full", "derived numbers agree with those that they are derived from"),
    "source": ("against", "tensors, files and keys of config.json are the other model's, no more"),
    "copies": ("against", "tensors that stay are the same, byte for byte, or edited for a reason"),
    "rotation": ("against", "one orthogonal matrix explains all tensors of the residual stream"),
    "edits": ("against", "a division in one place is compensated by a multiplication in another"),
    "sqnr": ("against", "each weight is as near to the other model's as its type allows"),
    "recomputed": ("against", "codes and scales are, bit by bit, what the recipe makes of the source"),
    "layer outputs": ("run", "the outputs of each layer are near to those of the other model"),
    "rounded cache": ("run", "keys and values come out of the cache as near as its type allows"),
    "outputs": ("run", "the outputs of a model that predicts no text are near to the other model's"),
    "perplexity": ("run", "perplexity on the text has not grown beyond the limit"),
    "kl": ("run", "predictions have not moved beyond the limit"),
    "served": ("run", "the predictions of a server that was asked are within these limits"),
    "not worse": ("run", "it is not worse than the first checkpoint, or than the baseline"),
}  # fmt: skip


@dataclass(frozen=True)
class Maker:
    """The tool that made a checkpoint, and its recipe as YAML, as the checkpoint says."""

    tool: str
    recipe: str | None


@dataclass(frozen=True)
class SizeReport:
    """The modules of one label: how many, their weights, their bytes with scales.

    weights: numbers in them; None if this version cannot read the label.
    """

    label: str
    modules: int
    weights: int | None
    bytes: int


@dataclass(frozen=True)
class RowReport:
    """A row of a weight with a low SQNR."""

    row: int
    sqnr_db: float


@dataclass(frozen=True)
class ChannelReport:
    """An input channel with a large rms, as a ratio to the median channel's."""

    channel: int
    ratio: float


@dataclass(frozen=True)
class Histogram:
    """Errors of a weight, over the mean error of their row: the ends of the bins, and their counts."""

    edges: list[float]
    counts: list[int]


@dataclass
class ModuleReport:
    """A weight compared with the other model's.

    sqnr_db, limit_db: SQNR of the whole weight, and the least that it may have.
    max_rel_error:     largest error over the largest weight.
    edited:            rows and columns that were multiplied, as text.
    codes_differ:      number of codes; None unless both are quantized in one way.
    scale_ratio:       smallest and largest ratio of a row's scale to the other model's.
    """

    module: str
    label: str
    shape: list[int]
    sqnr_db: float
    cosine: float
    max_rel_error: float
    worst_rows: list[RowReport]
    outlier_channels: list[ChannelReport]
    histogram: Histogram | None
    limit_db: float
    edited: str | None
    codes_differ: int | None
    scale_ratio: list[float] | None
    ok: bool = True

    @property
    def margin_db(self) -> float:
        """SQNR above the limit; negative if the module failed by it."""
        return self.sqnr_db - self.limit_db


@dataclass
class TensorCounts:
    """How many tensors of the other model are the same, edited, or quantized here."""

    edited: int = 0
    equal: int = 0
    quantized: int = 0

    def add(self, other: TensorCounts) -> None:
        """Add the counts of some more tensors."""
        self.edited += other.edited
        self.equal += other.equal
        self.quantized += other.quantized


@dataclass
class Report:
    """The outcome of a verification. `to_json` gives its fields as they are documented for --json."""

    checkpoint: str
    format: str = "unknown"
    against: str | None = None
    made_by: Maker | None = None
    depths: list[Depth] = field(default_factory=list)
    limits: Verify = field(default_factory=Verify)
    _findings: dict[Finding, None] = field(default_factory=dict)  # a set in order
    checked: dict[str, int] = field(default_factory=dict)  # check -> number of things
    modules: list[ModuleReport] = field(default_factory=list)
    serve: tuple[ServeCommand, ...] = ()
    sizes: list[SizeReport] = field(default_factory=list)
    tensors: TensorCounts | None = None
    run: RunReport | None = None
    compared: dict[str, Any] | None = None  # with the first of several checkpoints
    baseline: dict[str, Any] | None = None  # the change against an earlier report
    not_checked: list[str] = field(
        default_factory=list
    )  # things that a depth which ran left out, and why

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings, each once."""
        self._findings |= dict.fromkeys(findings)

    def excuse(self, of_source: Iterable[Finding]) -> None:
        """Make notes of errors that the other model has, too. of_source: its findings."""
        of_both = {(finding.check, finding.what, finding.where) for finding in of_source}
        findings = [
            noted(f.check, f"{f.what}; the other model is like that", f.where)
            if f.severity == "error" and (f.check, f.what, f.where) in of_both
            else f
            for f in self._findings
        ]
        self._findings = dict.fromkeys(findings)

    def count(self, check: str, things: int) -> None:
        """Add to the number of things that a check looked at."""
        self.checked[check] = self.checked.get(check, 0) + things

    @property
    def findings(self) -> list[Finding]:
        """All findings in the order of their discovery."""
        return list(self._findings)

    @property
    def errors(self) -> list[Finding]:
        """The findings for which verification fails."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able data: errors first, modules worst first."""
        failures = Counter(finding.check for finding in self.errors)
        return {
            "ok": self.ok,
            "checkpoint": self.checkpoint,
            "format": self.format,
            "against": self.against,
            "tool": f"quantcli {__version__}",
            "made_by": self.made_by and asdict(self.made_by),
            "depths": list(self.depths),
            "limits": self.limits.model_dump(),
            "checks": [
                {
                    "name": name,
                    "depth": depth,
                    "about": about,
                    "checked": self.checked.get(name, 0),
                    "failed": failures[name],
                }
                for name, (depth, about) in CHECKS.items()
                if name in self.checked or name in failures
            ],
            "findings": [asdict(f) for f in sorted(self.findings, key=lambda f: f.severity)],
            "modules": [asdict(m) for m in sorted(self.modules, key=lambda m: (m.margin_db, m.module))],
            "sizes": [asdict(size) for size in self.sizes],
            "tensors": self.tensors and asdict(self.tensors),
            "run": self.run and asdict(self.run),
            "compared": self.compared,
            "baseline": self.baseline,
            "not_checked": list(self.not_checked),
            "serve": [command.to_json() for command in self.serve],
        }
