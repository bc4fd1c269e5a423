"""A checkpoint checked by its headers and small files alone; damage that stops reading is a finding."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint, scan_checkpoint
from quantcli.checkpoint.config.settings import WrongType
from quantcli.checkpoint.config.sizes import Contradiction
from quantcli.checkpoint.detect import draft_of, quantization
from quantcli.checkpoint.files import (
    INDEX,
    MANIFEST,
    OTHER_WEIGHTS,
    PART,
    PICKLES,
    SIGNATURE,
    has_byte_order_mark,
)
from quantcli.checkpoint.head import generates, lm_head
from quantcli.checkpoint.manifest import Recorded, read_manifest, tool_text
from quantcli.core.errors import InputError, QuantError, named
from quantcli.core.findings import Finding, failed, noted, of_error
from quantcli.core.registry import discover
from quantcli.targets.base import StoredCheckpoint, Target, files_of_targets, target_of
from quantcli.targets.layouts import own_names
from quantcli.targets.serving import Served
from quantcli.targets.stored_experts import uneven_experts
from quantcli.verification.config import check_dtypes, check_tied
from quantcli.verification.kinds import TOKENIZERS, use_of
from quantcli.verification.limits import Limits
from quantcli.verification.outcome import CONVERT, COPY, Report
from quantcli.verification.sizes import Model, check_sizes
from quantcli.verification.stacks import check_stacks

_PART = re.compile(r"\d{5,}(?=-of-\d{5,}\.safetensors$)")
_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*?(?:layers?|h|blocks?))\.(?P<index>\d+)\.(?P<rest>.+)")
_ADDED = "remove it, or copy the checkpoint again"
# checks that fail if the source itself was incomplete
_OF_SOURCE = {"layers", "sizes", "experts", "files", "tp"}


@dataclass
class Structure:
    """A checkpoint as far as it could be opened, and the report so far.

    checkpoint: None if no header could be read. manifest: None if there is no sound one.
    whole:      no weight file is missing.
    target:     the format, once it is known; `stored` is the checkpoint as its engine would take it.
    """

    report: Report
    checkpoint: Checkpoint | None = None
    manifest: dict[str, Any] | None = None
    whole: bool = False
    target: Target | None = None
    stored: StoredCheckpoint | None = None
    limits: Limits = field(default_factory=Limits)


def verify_structure(path: Path, tp: Sequence[int] = (1,)) -> Structure:
    """Check `path` by its headers.

    tp: tensor parallel sizes to serve it with. Reads no weights: headers, JSON files, and tensors that
    a module has once. Raises InputError if there is no checkpoint (no such directory, no weights in it,
    or a part of a conversion), or if its format is not known.
    """
    structure = _open(path)
    _check(structure, tp)
    return structure


def verified(folder: Path) -> tuple[list[Finding], tuple[str, ...]]:
    """Errors of a checkpoint of ours before it is published, from its headers; then, as text, faults
    that it has from its source."""
    structure = _open(folder)
    checkpoint = structure.checkpoint
    # else it is a plain float model, not in the format of an engine
    if checkpoint is None or target_of(checkpoint) or quantization(checkpoint) is not None:
        _check(structure, (1,))
    errors = structure.report.errors
    faults = [finding for finding in errors if finding.check in _OF_SOURCE]
    return [finding for finding in errors if finding not in faults], tuple(
        f"the model, {f.check}: {f.what}" + (f" ({f.where})" if f.where else "") for f in faults
    )


def _open(path: Path) -> Structure:
    """Read headers, index, config and manifest. InputError if there is no checkpoint."""
    report = Report(named(str(path)), depths=["structure"])
    try:
        checkpoint = scan_checkpoint(path)
    except InputError as error:
        none = not path.is_dir() or not any(path.glob("*.safetensors"))
        if none or (path / PART).is_file():
            raise
        report.add([of_error(_check_of(error), error)])
        report.count("headers", 1)
        return Structure(report)
    report.count("headers", len(checkpoint.shards))
    report.count("index", len(checkpoint.tensors))
    report.add(_problems(checkpoint.problems))
    for name, check in {CONFIG: "config", INDEX: "index", **files_of_targets()}.items():
        if has_byte_order_mark(checkpoint.path / name):
            what, fix = "begins with a byte order mark, at which engines stop", "save it without"
            report.add([failed(check, what, name, fix)])
    report.add(noted("files", note) for note in checkpoint.notes if "stale" not in note)
    manifest = None
    if (checkpoint.path / MANIFEST).is_file():
        try:
            manifest = read_manifest(checkpoint.path)
            report.add(_manifest(checkpoint, manifest["files"]))
            report.add(_calibrated_with(manifest))
            report.count("manifest", len(manifest["files"]))
        except InputError as error:
            report.add([of_error("manifest", error)])
    else:
        what = f"there is no {MANIFEST}: sizes and hashes of files are not known"
        report.add([noted("manifest", what)])
    forgotten = list(_forgotten(checkpoint))
    report.add(forgotten)
    missing = any(problem.what.startswith("shard ") for problem in checkpoint.problems)
    return Structure(report, checkpoint, manifest, not missing and not forgotten)


def _must_be_installed(structure: Structure) -> None:
    """InputError if the manifest names a target of a package that is not there."""
    manifest = structure.manifest or {}
    name = manifest.get("target")
    if isinstance(name, str) and name not in discover(Target):
        raise InputError(
            f"`{name:.40}` is the target in its manifest, and no such target is installed",
            where=f"{structure.report.checkpoint}, made by {tool_text(manifest.get('tool'))}",
            fix="install the package that has this target",
        )


def _check(structure: Structure, tp: Sequence[int]) -> None:
    """Check a checkpoint that could be opened. InputError if its format is not known."""
    report, checkpoint = structure.report, structure.checkpoint
    if checkpoint is None:
        return
    try:
        _check_opened(structure, checkpoint, tp)
    except WrongType as error:
        if not any(finding.what == error.what for finding in report.errors):
            report.add([of_error("config", error)])


def _check_opened(structure: Structure, checkpoint: Checkpoint, tp: Sequence[int]) -> None:
    report = structure.report
    target = target_of(checkpoint)
    if target is None:
        _must_be_installed(structure)
        if (other := quantization(checkpoint)) is None:
            raise InputError(
                "this is a float model: nothing in it is quantized, so there is nothing to verify",
                where=report.checkpoint,
                fix="give a quantized checkpoint; `quantcli inspect` shows what a float model holds",
            )
        raise InputError(
            f"no quantized checkpoint of a format that this version verifies: {other.format}",
            where=f"{report.checkpoint}, {other.evidence}",
            fix="give a checkpoint that `quantcli quantize` wrote, or one for such an engine",
        )
    report.format = target.name
    stored = target.open_stored(checkpoint)
    structure.target, structure.stored = target, stored
    report.serve = target.serve(_served(stored), report.checkpoint)
    # if a weight file is missing, most other checks fail for that reason alone
    report.add(f for f in stored.findings if structure.whole or f.check == "config")
    for check, things in stored.checked.items():
        report.count(check, things)
    report.add(check_dtypes(stored, structure.manifest))
    report.add(check_tied(checkpoint))
    report.add(check_stacks(checkpoint))
    report.add(_files(checkpoint, structure.manifest))
    report.count("files", len(checkpoint.aux))
    if structure.whole:
        report.add(_layers(stored))
        report.count("layers", 1)
        report.count("sizes", 1)
    for size in tp:
        report.add(stored.check_tp(size))
        report.count("tp", len(stored.modules))


def _served(stored: StoredCheckpoint) -> Served:
    """What the command that serves a checkpoint depends on."""
    labels = frozenset(module.layout.label for module in stored.modules.values())
    cache = stored.cache.cache if stored.cache else None
    return Served(labels, stored.checkpoint.config, cache, draft_of(stored.checkpoint))


def faults_of_model(stored: Model, where: str) -> Iterator[Finding]:
    """Errors of a checkpoint that no conversion can have brought about: it copies what there is.

    where: stands for the checkpoint as a whole.
    """
    checkpoint = stored.checkpoint
    findings = [*_layers(stored), *_files(checkpoint, None), *uneven_experts(checkpoint)]
    for finding in (finding for finding in findings if finding.severity == "error"):
        whole = finding.where == str(checkpoint.path)
        yield replace(finding, where=where) if whole else finding


def _forgotten(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weight files that belong to the others by their names, but that the index does not list."""
    sets = {_PART.sub("", shard) for shard in checkpoint.shards if _PART.search(shard)}
    for name in sorted(checkpoint.left_out):
        if _PART.search(name) and _PART.sub("", name) in sets:
            what = f"does not list `{name}`, though its name makes it one of the others"
            yield failed("index", what, INDEX, COPY)


def _problems(problems: Iterable[QuantError]) -> Iterator[Finding]:
    """A finding for each problem, but one for all of a kind in the index: they have one cause."""
    kinds: dict[str, list[QuantError]] = defaultdict(list)
    for problem in problems:
        shape = re.sub(r"`[^`]*`", "", problem.what)
        kinds[shape if problem.where == INDEX else problem.what].append(problem)
    for first, *more in kinds.values():
        finding = of_error(_check_of(first), first)
        more_text = f"; {len(more)} more like it" if more else ""
        yield replace(finding, what=finding.what + more_text)


def _check_of(error: QuantError) -> str:
    if isinstance(error, Contradiction):
        return "sizes"
    if CONFIG in error.what or (error.where or "").endswith(CONFIG):
        return "config"
    index = "index" in error.what or INDEX in (error.where or "") or "shard" in error.what
    return "index" if index else "headers"


def _manifest(checkpoint: Checkpoint, files: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Findings for listed files that are missing or have another size, and for files not listed."""
    for name, entry in files.items():
        path = checkpoint.path / name
        if not path.is_file():
            yield failed("manifest", f"file `{name}` is missing", MANIFEST, COPY)
        elif (size := path.stat().st_size) != entry["bytes"]:
            what = f"file has {size} bytes; the manifest says {entry['bytes']}"
            yield failed("manifest", what, name, COPY)
    present = {*checkpoint.shards, *checkpoint.aux, *checkpoint.left_out}
    present |= {INDEX} if (checkpoint.path / INDEX).is_file() else set()
    for name in sorted(present - files.keys() - {MANIFEST, SIGNATURE}):
        if name in checkpoint.shards:
            what = "weight file is not in the manifest: its content cannot be checked"
            yield failed("manifest", what, name, COPY)
        elif (use := use_of(name)) is not None:
            yield failed("manifest", f"file is not in the manifest: {use}", name, _ADDED)
        elif not name.endswith("/"):
            yield noted("manifest", "file is not in the manifest: it was added later", where=name)
        else:
            yield noted("manifest", "folder is not in the manifest: nothing in it is verified", name)


def _calibrated_with(manifest: dict[str, Any]) -> Iterator[Finding]:
    """Findings for a recipe with another text, and for tokenizer files that are others, than those of
    the calibration."""
    recorded = Recorded.of(manifest)
    recipe = manifest.get("recipe")
    if recorded.text is not None and isinstance(recipe, str) and recorded.text not in recipe:
        what = f"the recipe does not name the calibration's text, whose sha256 is {recorded.text:.80}"
        yield failed("manifest", what, MANIFEST, CONVERT)
    for name, sha256 in (recorded.tokenizer or {}).items():
        entry = manifest["files"].get(name, {})
        if entry.get("sha256", sha256) != sha256:
            what = "file is not the tokenizer's that the calibration had"
            yield failed("manifest", what, name, CONVERT)


def _files(checkpoint: Checkpoint, manifest: dict[str, Any] | None) -> Iterator[Finding]:
    """Tokenizer and leftovers. The check of the manifest reports files that are missing."""
    names = {*checkpoint.aux, *checkpoint.left_out}
    files = {} if manifest is None else manifest["files"]
    for name in TOKENIZERS:
        if checkpoint.aux.get(name) == 0:
            yield failed("files", "file is empty", name, "copy it from the source")
    if not any(name in names for name in TOKENIZERS) and not files.keys() & set(TOKENIZERS):
        if manifest is not None:
            yield noted("files", "there is no tokenizer, and the source had none")
        else:
            fix = "copy it from the source"
            yield failed("files", "there is no tokenizer", str(checkpoint.path), fix)
    for name in sorted(checkpoint.left_out):
        if name.endswith(".index.json") and "/" not in name and name != INDEX:
            yield noted("files", f"engines read no index of this name, only {INDEX}", name)
        elif name.endswith(".safetensors"):
            yield noted("files", "weight file is not in the index: engines skip it", name)
        elif name.lower().endswith((*PICKLES, *OTHER_WEIGHTS)):
            yield noted("files", "file is not verified: engines read safetensors in its place", name)


def layer_of(name: str) -> str | None:
    """The decoder layer of a tensor, such as model.layers.0; None outside of layers."""
    match = _LAYER.fullmatch(name)
    return f"{match['stack']}.{match['index']}" if match else None


def _layers(stored: Model) -> Iterator[Finding]:
    """Decoder layers against config.json and each other, embeddings, head."""
    checkpoint = stored.checkpoint
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in own_names(
        checkpoint.tensors, stored.modules, stored.unchecked
    ):  # layers may differ in type
        if match := _LAYER.fullmatch(name):
            rest = re.sub(r"\bexperts\.\d+\.", "experts.*.", match["rest"])
            stacks[match["stack"]][int(match["index"])].add(rest.removesuffix(".weight"))
    for stack, layers in stacks.items():
        absent = next(index for index in itertools.count() if index not in layers)
        if absent < max(layers):
            yield failed("layers", f"layer {absent} is missing", f"`{stack}`", CONVERT)
        yield from _incomplete(checkpoint, stack, layers)
    yield from check_sizes(stored)
    if lm_head(checkpoint) == "lost":
        what = "lm_head is missing, though config.json says that embeddings are not tied"
        yield failed("layers", what, str(checkpoint.path), CONVERT)


def _incomplete(checkpoint: Checkpoint, stack: str, layers: dict[int, set[str]]) -> Iterator[Finding]:
    """A layer that lacks modules: no other is like it, and several have all its modules and more.

    A note if config.json describes it unlike all of those, and for the first norm of a model of
    embeddings, whose input is normalized already.
    """
    kinds: dict[frozenset[str], list[int]] = defaultdict(list)
    for index, names in layers.items():
        kinds[frozenset(names)].append(index)
    described = _described(checkpoint, layers)
    for modules, indices in kinds.items():
        larger = [kind for kind, members in kinds.items() if modules < kind and len(members) > 1]
        if len(indices) == 1 and larger:
            index = indices[0]
            _, lacking = min((len(kind - modules), sorted(kind - modules)) for kind in larger)
            what, where = f"lacks `{lacking[0]}`, which other layers have", f"`{stack}.{index}`"
            norms = all("norm" in name.lower() for name in lacking)
            own = described.get(index)
            if not any(own == described.get(i) for kind in larger for i in kinds[kind]):
                yield noted("layers", f"{what}; config.json describes it in another way", where)
            elif norms and index == 0 and not generates(checkpoint):
                yield noted("layers", f"{what}; its input may be normalized before", where)
            else:
                yield failed("layers", what, where, CONVERT)


# lists in config.json with one entry, or one letter, for each layer
_LISTS = (
    "layer_types", "layers_block_type", "block_configs", "hybrid_override_pattern", "mlp_layer_types",
    "hybrid_layer_pattern", "attn_type_list", "moe_layer_freq",
)  # fmt: skip


def _described(checkpoint: Checkpoint, layers: Collection[int]) -> dict[int, tuple[object, ...]]:
    """For each of the layers, the entries of the lists in config.json that have as many as there are up
    to the last, and whether it is one of the last `num_kv_shared_layers`, which have no keys and values
    of their own."""
    config, count = checkpoint.text_config, max(layers) + 1  # may be any number: a name has it
    values = [config.value(key) for key in _LISTS]
    lists = [value for value in values if isinstance(value, (list, str)) and len(value) == count]
    own = count - (config.size("num_kv_shared_layers") or 0)
    return {index: (*(values[index] for values in lists), index < own) for index in layers}
