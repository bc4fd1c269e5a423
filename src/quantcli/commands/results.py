"""What the functions of the Python API return: frozen dataclasses, whose `to_dict()` is JSON-able.

A list such as `modules` holds flat dicts, one for each row of a table. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # JSON-able; one line of a table


@dataclass(frozen=True)
class Result:
    """The outcome of a command."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data: what the command prints with --json, next to the keys that all
        commands have."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, kw_only=True)
class Planned(Result):
    """What `quantize` would write, and its cost; `plan` of its document.

    out:          the folder of the checkpoint.
    digest:       sha256 (hex) over all that fixes the output.
    bytes_before, bytes_after: bytes of all tensors.
    shards:       {"file", "bytes", "tensors"} for each weight file.
    files:        names of the other files.
    disk_needed, disk_free, memory_needed: bytes; memory is what is needed next to torch.
    shards_done:  whole weight files that an interrupted run left.
    serve:        "engine", "command" and "note" of each engine that serves the output.
    rules:        the effect of each rule: its modules, and their bytes before and after.
    kept:         what stays float: the reason, tensors, bytes.
    expected:     limits of the recipe's `expect` block, and the values compared with them.
    calibration:  the calibration that runs first or was found; None if no data is needed.
    """

    model: str
    out: Path
    target: str
    serving_dtype: str
    digest: str
    bytes_before: int
    bytes_after: int
    shards: list[Row]
    files: list[str]
    disk_needed: int
    disk_free: int
    memory_needed: int
    workers: int
    shards_done: int
    serve: list[Row]
    notes: list[str]
    rules: list[Row]
    kept: list[Row]
    kv_cache: Row | None
    quantized_params_pct: float
    quantizable_pct: float
    linear_pct: float
    quantized_modules: int
    expected: list[Row]
    decoded: list[Row]
    calibration: Row | None
    experts: dict[str, Any]
    taken_from: dict[str, str]
    part: Row | None


@dataclass(frozen=True, kw_only=True)
class Repacked(Result):
    """What `pack` writes, and its cost; `plan` of its document. origin: the format that was read."""

    checkpoint: str
    origin: str
    out: Path
    target: str
    serving_dtype: str
    digest: str
    bytes_before: int
    bytes_after: int
    shards: list[Row]
    files: list[str]
    disk_needed: int
    disk_free: int
    memory_needed: int
    workers: int
    shards_done: int
    serve: list[Row]
    notes: list[str]
    state: str | None
    modules: list[Row]
    copied_tensors: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data; `origin` is the key `from`."""
        return {"from" if key == "origin" else key: value for key, value in super().to_dict().items()}


@dataclass(frozen=True, kw_only=True)
class Merged(Result):
    """The parts of a conversion that were joined; `plan` of its document.

    parts: {"folder", "part", "of", "files", "bytes"} each. linked: weight files take no more space.
    """

    parts: list[Row]
    digest: str
    out: Path
    bytes: int
    linked: bool
    workers: int


@dataclass(frozen=True, kw_only=True)
class _Written(Result):
    """A checkpoint that was written.

    bytes:         of all files but the manifest.
    shards_reused: weight files of an interrupted run.
    files:         {"bytes", "sha256"} by name; sha256 is None without `checksum`.
    notes:         remarks on the run, and of the plan those that were not known before it.
    """

    out: Path
    bytes: int
    shards_reused: int
    files: dict[str, Row]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Converted(_Written):
    """The checkpoint that `quantize` wrote. plan: as it was carried out, after a calibration."""

    plan: Planned


@dataclass(frozen=True, kw_only=True)
class Packed(_Written):
    """The checkpoint that `pack` wrote."""

    plan: Repacked | Merged


@dataclass(frozen=True, kw_only=True)
class Calibrated(Result):
    """A finished calibration.

    calibration:  its folder.
    modules:      {"module", "tokens", ...} for each module that was measured.
    experts:      tokens that the router gave, by layer.
    taken_from:   modules that have the statistics of another one.
    edited:       groups of channels that methods changed, by how, such as "smoothed".
    uncalibrated: modules that no token reached and that were filled in.
    no_tokens:    modules that no token reached.
    length:       tokens of a sample, at most.
    """

    calibration: Path
    layers: int
    modules: list[Row]
    experts: dict[str, Any]
    taken_from: dict[str, str]
    edited: dict[str, list[Any]]
    uncalibrated: list[str]
    no_tokens: list[str]
    samples: int
    length: int

    @classmethod
    def of(cls, report: dict[str, Any]) -> Calibrated:
        """The result of a report of `calibration.session.summary`."""
        own = {field.name for field in fields(cls)} - {"edited"}
        modules = [{"module": name, **module} for name, module in report["modules"].items()]
        given = {key: value for key, value in report.items() if key in own}
        edited = {key: value for key, value in report.items() if key not in own}
        return cls(
            **{**given, "calibration": Path(report["calibration"]), "modules": modules}, edited=edited
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data: `modules` by name, and a key for each list in `edited`."""
        data = super().to_dict()
        edited = data.pop("edited")
        modules = {
            row["module"]: {k: v for k, v in row.items() if k != "module"} for row in self.modules
        }
        return {**data, "modules": modules, **edited}


@dataclass(frozen=True, kw_only=True)
class Inspection(Result):
    """The contents of a checkpoint, from its headers.

    tensors, parameters, bytes: numbers of all tensors. dtypes: the same by dtype.
    quantization: the format and the number of modules; None for a float model.
    groups:       tensors whose names differ only in numbers: "name", "count", "dtype", "shape",
                  "bytes", "role".
    other_files:  bytes by name. left_out: files that a conversion leaves out, and why.
    problems:     {"what", "where", "fix"} of each fault; an empty list for a sound checkpoint.
    matches:      the tensors that were asked for; None if none were.
    """

    path: Path
    model_type: str | None
    architectures: list[str]
    draft: str | None
    tensors: int
    parameters: int
    bytes: int
    shards: list[str]
    dtypes: dict[str, Row]
    tied_embeddings: str
    quantization: Row | None
    kv_cache: Row | None
    groups: list[Row]
    other_files: dict[str, int]
    left_out: dict[str, str]
    problems: list[Row]
    notes: list[str]
    matches: list[Row] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data; `matches` only if tensors were asked for."""
        data = super().to_dict()
        if self.matches is None:
            del data["matches"]
        return data


@dataclass(frozen=True, kw_only=True)
class Outliers(Result):
    """The weights of a checkpoint, hardest to quantize first.

    ranked_by: the operand by whose SQNR `modules` are sorted.
    modules:   "module", "shape", "sqnr_db" (dB by operand), "amax_over_rms", "kurtosis", ... each.
    advice:    a rule that keeps float what int8 costs most; None if no module stands out.
    """

    path: Path
    ranked_by: str
    operands: dict[str, Any] | list[Any]
    modules: list[Row]
    left_out: list[Row]
    advice: Row | None


@dataclass(frozen=True)
class Support(Result):
    """Every pair of scheme and target: "scheme", "target", "supported", "options", and "label",
    "loads_on", "tensors" or "why" each."""

    support: list[Row]


@dataclass(frozen=True, kw_only=True)
class Verification(Result):
    """The outcome of a verification; docs/verify.md describes each key.

    ok:       whether no check failed.
    checks:   "name", "depth", "about", "checked", "failed" each.
    findings: "severity", "check", "what", "where", "fix" each, errors first.
    modules:  "module", "label", "sqnr_db", "cosine", "limit_db", "ok", ... each, worst first.
    made_by:  "tool" and "recipe", as the checkpoint says.
    sizes:    "label", "modules", "weights", "bytes" of each type of weights.
    run:      perplexity, KL divergence and layers, if both models ran on text.
    serve:    "engine", "command" and "note" of each engine that serves it.
    card_written: whether the model card has the figures; None without `card`.
    """

    ok: bool
    checkpoint: str
    format: str
    against: str | None
    tool: str
    made_by: Row | None
    depths: list[str]
    limits: Row
    checks: list[Row]
    findings: list[Row]
    modules: list[Row]
    sizes: list[Row]
    tensors: Row | None
    run: Row | None
    not_checked: list[str]
    serve: list[Row]
    card_written: bool | None
