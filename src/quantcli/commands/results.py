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
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, kw_only=True)
class _Plan(Result):
    """What would be written, and its cost.

    out:           the folder of the checkpoint, or its URL.
    target:        the format that is written.
    serving_dtype: the dtype in which an engine computes: BF16 or F16.
    digest:        sha256 (hex) over all that fixes the output.
    bytes_before:  bytes of all tensors that are read.
    bytes_after:   bytes of all tensors that are written.
    shards:        "file", "bytes", "tensors" of each weight file.
    files:         names of the other files.
    disk_needed:   bytes.
    disk_free:     bytes; None if `out` is not on a disk of this machine.
    memory_needed: bytes, next to those of torch.
    workers:       threads.
    shards_done:   whole weight files that an interrupted run left.
    download:      bytes of the model that are fetched from the Hub first, into its cache.
    serve:         "engine", "command" and "note" of each engine that serves the output.
    notes:         remarks, such as on what stays float.
    """

    out: Path | str
    target: str
    serving_dtype: str
    digest: str
    bytes_before: int
    bytes_after: int
    shards: list[Row]
    files: list[str]
    disk_needed: int
    disk_free: int | None
    memory_needed: int
    workers: int
    shards_done: int
    download: int
    serve: list[Row]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Planned(_Plan):
    """What `quantize` would write, and its cost; `plan` of its document.

    model:         the folder that is read.
    rules:         "rule", "scheme", "label", "modules", "bytes_before", ..., "loads_on" of each.
    kept:          what stays float: "reason", "tensors", "bytes_before", "bytes", "names", ... of each.
    kv_cache:      "cache", "layers", "measured", "bytes"; None if the recipe quantizes no cache.
    quantized_params_pct: percent of all parameters that are quantized.
    quantizable_pct: percent of the weights that the engine takes with these schemes.
    linear_pct:    percent of all linear weights.
    quantized_modules: number of modules.
    expected:      "key", "limit", "value", "ok" of each limit of the recipe's `expect` block.
    decoded:       formats of a quantized source that is read as floats.
    rotation:      of the model, by the recipe's `rotate`; None: it was not rotated.
    calibration:   the calibration that runs first or was found; None if no data is needed.
    experts:       tokens that the router gave, by layer, once a calibration is there.
    taken_from:    modules that have the statistics of another one.
    part:          "part", "of", "shards", "files", "bytes"; None without --part.
    """

    model: str
    rules: list[Row]
    kept: list[Row]
    kv_cache: Row | None
    quantized_params_pct: float
    quantizable_pct: float
    linear_pct: float
    quantized_modules: int
    expected: list[Row]
    decoded: list[Row]
    rotation: Row | None
    calibration: Row | None
    experts: dict[str, Any]
    taken_from: dict[str, str]
    part: Row | None


@dataclass(frozen=True, kw_only=True)
class Repacked(_Plan):
    """What `pack` writes, and its cost; `plan` of its document.

    checkpoint:     the folder that is read.
    origin:         the format that is read.
    state:          what the source says of its codes, if it says anything.
    modules:        "before", "label", "modules", "bytes_before", ..., "loads_on" of each kind.
    copied_tensors: number of float tensors.
    """

    checkpoint: str
    origin: str
    state: str | None
    modules: list[Row]
    copied_tensors: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data; `origin` is the key `from`."""
        return {"from" if key == "origin" else key: value for key, value in super().to_dict().items()}


@dataclass(frozen=True, kw_only=True)
class Merged(Result):
    """The parts of a conversion that were joined; `plan` of its document.

    parts:   "folder", "part", "of", "files", "bytes" of each.
    digest:  sha256 (hex) over all that fixes the output.
    out:     the folder of the checkpoint, or its URL.
    bytes:   of all files but the manifest.
    linked:  whether weight files take no more space.
    workers: threads.
    """

    parts: list[Row]
    digest: str
    out: Path | str
    bytes: int
    linked: bool
    workers: int


@dataclass(frozen=True, kw_only=True)
class _Written(Result):
    """A checkpoint that was written.

    out:           the folder of the checkpoint, or its URL.
    bytes:         of all files but the manifest.
    shards_reused: weight files of an interrupted run.
    files:         "bytes", "sha256" by name; sha256 is None without `checksum`.
    notes:         remarks on the run, and of the plan those that were not known before it.
    """

    out: Path | str
    bytes: int
    shards_reused: int
    files: dict[str, Row]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Converted(_Written):
    """The checkpoint that `quantize` wrote.

    plan: as it was carried out, after a calibration.
    """

    plan: Planned


@dataclass(frozen=True, kw_only=True)
class Packed(_Written):
    """The checkpoint that `pack` wrote.

    plan: with `merge` the parts.
    """

    plan: Repacked | Merged


@dataclass(frozen=True, kw_only=True)
class Calibrated(Result):
    """A finished calibration.

    calibration:  its folder.
    layers:       number of layers.
    modules:      {"module", "tokens", ...} for each module that was measured.
    experts:      tokens that the router gave, by layer.
    taken_from:   modules that have the statistics of another one.
    edited:       groups of channels that methods changed, by how, such as "smoothed".
    uncalibrated: modules that no token reached and that were filled in.
    no_tokens:    modules that no token reached.
    samples:      number of samples.
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

    path:         the folder.
    model_type:   as config.json says.
    architectures: as config.json says.
    draft:        the kind of draft model; None for a model that works alone.
    tensors:      number of tensors.
    parameters:   number of elements of all tensors.
    bytes:        bytes of all tensors.
    shards:       names of weight files.
    dtypes:       "tensors", "parameters", "bytes" by dtype.
    tied_embeddings: whether embeddings are the head, too, and how that shows.
    quantization: "format", "modules", "evidence"; None for a float model.
    kv_cache:     "tensors", "example" of scales of a cache; None if there are none.
    groups:       tensors whose names differ only in numbers: "name", "count", "dtype", "shape",
                  "bytes", "role".
    other_files:  bytes by name.
    left_out:     files that a conversion leaves out, and why.
    problems:     "what", "where", "fix" of each fault; an empty list for a sound checkpoint.
    notes:        remarks.
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

    path:      the folder.
    ranked_by: the operand by whose SQNR `modules` are sorted.
    operands:  the schemes that quantize weights so, by operand.
    modules:   "module", "shape", "sqnr_db" (dB by operand), "amax_over_rms", "kurtosis", ... of each.
    left_out:  "tensors", "why", "names" of weights that are not ranked.
    verdict:   "hard" and "what": whether the weights are hard to quantize, in one sentence.
    advice:    a rule that keeps float what int8 costs most; None if no module stands out.
    """

    path: Path
    ranked_by: str
    operands: dict[str, list[str]]
    modules: list[Row]
    left_out: list[Row]
    verdict: Row
    advice: Row | None


@dataclass(frozen=True)
class Support(Result):
    """Every pair of scheme and target.

    support: "scheme", "target", "supported", "options" of each, and "label", "loads_on", "tensors" or
             "why".
    """

    support: list[Row]


@dataclass(frozen=True, kw_only=True)
class Recommendation(Result):
    """Shipped recipes for a model on some devices. Sizes are bytes on each device.

    device:      its name, memory, engine, and how many there are.
    context:     tokens of each sequence.
    concurrency: sequences at a time.
    positions:   tokens that the model was made for; None if config.json does not say.
    unquantized: sizes of the float model, and whether it fits.
    recipes:     those that the devices can serve, the best first: "recipe", "fits", "weights_bytes",
                 "max_context", "needs_data", "mean_change", "rank", "reason", "command", ... each.
    left_out:    the other recipes, and why.
    best:        the first recipe that fits; None if none does.
    best_without_data: the first that fits and needs no data.
    advice:      what would fit, if nothing does.
    notes:       remarks on the figures.
    costs:       the model and the text of `mean_change`.
    """

    model: str
    device: Row
    context: int
    concurrency: int
    positions: int | None
    unquantized: Row
    recipes: list[Row]
    left_out: list[Row]
    best: str | None
    best_without_data: str | None
    advice: str | None
    notes: list[str]
    costs: Row


@dataclass(frozen=True, kw_only=True)
class Verification(Result):
    """The outcome of a verification; docs/verify.md describes each key.

    ok:       whether no check failed.
    checkpoint: the folder.
    format:   what the checkpoint is stored in.
    against:  the other model.
    tool:     name and version of quantcli.
    depths:   how far it went: "structure", "full", "against", "run".
    limits:   limits that were set for the whole checkpoint.
    tensors:  "edited", "equal", "quantized" of the other model's.
    not_checked: what was left out, and why.
    checks:   "name", "depth", "about", "checked", "failed" of each.
    findings: "severity", "check", "what", "where", "fix" of each, errors first.
    modules:  "module", "label", "sqnr_db", "cosine", "limit_db", "ok", ... of each, worst first.
    made_by:  "tool" and "recipe", as the checkpoint says.
    sizes:    "label", "modules", "weights", "bytes" of each type of weights.
    baseline: the change against an earlier report; None if none was given.
    compared: the change against the first of several checkpoints, window by window; None for that one.
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
    compared: Row | None
    not_checked: list[str]
    serve: list[Row]
    baseline: Row | None
    card_written: bool | None


@dataclass(frozen=True, kw_only=True)
class Reproduction(Result):
    """The outcome of making a checkpoint again; docs/trust.md describes it.

    ok:          whether all bytes are the same.
    checkpoint:  the folder, the Hub id or the address.
    model:       likewise.
    difference:  "file", "tensor", "index", "stored", "planned", "count" of the first one; None without.
    differences: one for each tensor and file that differs.
    summary:     the first difference as a sentence; None without any.
    files:       how many files were compared.
    tensors:     how many tensors.
    bytes:       of all files, without the manifest.
    statistics:  "recorded" and "now": sha256 of the calibration's results; None without a calibration.
    made_by:     the versions that made the checkpoint.
    here:        the versions that made it again.
    notes:       remarks, such as on what was not recorded.
    """

    ok: bool
    checkpoint: str
    model: str
    difference: Row | None
    differences: list[Row]
    summary: str | None
    files: int
    tensors: int
    bytes: int
    statistics: Row | None
    made_by: str
    here: str
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """The outcome of verifying several checkpoints.

    ok:          whether all passed.
    checkpoints: the outcome of each, with the keys of one.
    """

    ok: bool
    checkpoints: list[Verification]
