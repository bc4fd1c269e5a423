"""A checkpoint checked by its headers and small files alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.detect import quantization
from quantcli.checkpoint.files import INDEX
from quantcli.checkpoint.inspection import tied_embeddings
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding, failed, noted
from quantcli.targets.base import StoredCheckpoint, Target, target_of
from quantcli.targets.layouts import own_names
from quantcli.verification.opening import open_for_verification
from quantcli.verification.outcome import CONVERT, Report
from quantcli.verification.sizes import check_sizes

_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*?(?:layers|h|blocks|block))\.(?P<index>\d+)\.(?P<rest>.+)")
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "vocab.tiktoken", "qwen.tiktoken",
)  # fmt: skip
# checks that fail if the source itself was incomplete
_OF_SOURCE = {"layers", "sizes", "experts", "files", "tp"}


@dataclass(frozen=True)
class Structure:
    """The report so far, and the opened checkpoint for deeper checks.

    target:   its format; None, like `stored`, if no header could be read.
    stored:   the checkpoint as the engine would take it.
    manifest: None if there is no sound one.
    """

    report: Report
    target: Target | None
    stored: StoredCheckpoint | None
    manifest: dict[str, Any] | None


def verify_structure(path: Path, tp: Sequence[int] = (1,)) -> Structure:
    """Check `path` by its headers.

    tp: tensor parallel sizes to serve it with. Reads no weights: headers, JSON files, and tensors that
    a module has once. Raises InputError if there is no checkpoint, or its format is not known.
    """
    opened = open_for_verification(path)
    report = Report(str(path), depths=["structure"])
    report.add(opened.findings)
    checkpoint = opened.checkpoint
    if checkpoint is None:
        report.count("headers", 1)
        return Structure(report, None, None, None)
    report.count("headers", len(checkpoint.shards))
    report.count("index", len(checkpoint.tensors))
    if opened.manifest is not None:
        report.count("manifest", len(opened.manifest["files"]))
    target = target_of(checkpoint)
    if target is None:
        if (other := quantization(checkpoint)) is None:
            raise InputError(
                "this is a float model: nothing in it is quantized, so there is nothing to verify",
                where=str(path),
                fix="give a quantized checkpoint; `quantcli inspect` shows what a float model holds",
            )
        raise InputError(
            f"no quantized checkpoint of a format that this version verifies: {other.format}",
            where=f"{path}, {other.evidence}",
            fix="give a checkpoint that `quantcli quantize` wrote, or one for such an engine",
        )
    report.format = target.name
    stored = target.open_stored(checkpoint)
    # if a weight file is missing, most other checks fail for that reason alone
    report.add(f for f in stored.findings if opened.whole or f.check == "config")
    for check, things in stored.checked.items():
        report.count(check, things)
    report.add(_files(checkpoint, opened.manifest))
    report.count("files", len(checkpoint.aux))
    if opened.whole:
        report.add(_layers(stored))
        report.count("layers", 1)
        report.count("sizes", 1)
    for size in tp:
        report.add(stored.check_tp(size))
        report.count("tp", len(stored.modules))
    return Structure(report, target, stored, opened.manifest)


def _files(checkpoint: Checkpoint, manifest: dict[str, Any] | None) -> Iterator[Finding]:
    """Tokenizer and leftovers. The check of the manifest reports files that are missing."""
    names = {*checkpoint.aux, *checkpoint.left_out}
    files = {} if manifest is None else manifest["files"]
    for name in _TOKENIZERS:
        if checkpoint.aux.get(name) == 0:
            yield failed("files", "file is empty", name, "copy it from the source")
    if not any(name in names for name in _TOKENIZERS) and not files.keys() & set(_TOKENIZERS):
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


def layer_of(name: str) -> str | None:
    """The decoder layer of a tensor, such as model.layers.0; None outside of layers."""
    match = _LAYER.fullmatch(name)
    return f"{match['stack']}.{match['index']}" if match else None


def _layers(stored: StoredCheckpoint) -> Iterator[Finding]:
    """Decoder layers against config.json and each other, embeddings, head."""
    checkpoint = stored.checkpoint
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in own_names(checkpoint.tensors, stored.modules):  # layers may differ in type
        if match := _LAYER.fullmatch(name):
            rest = re.sub(r"\bexperts\.\d+\.", "experts.*.", match["rest"])
            stacks[match["stack"]][int(match["index"])].add(rest.removesuffix(".weight"))
    for stack, layers in stacks.items():
        absent = sorted(set(range(max(layers) + 1)) - layers.keys())
        if absent:
            yield failed("layers", f"layer {absent[0]} is missing", f"`{stack}`", CONVERT)
        yield from _incomplete(stack, layers)
    yield from check_sizes(stored, [len(layers) for layers in stacks.values()])
    if tied_embeddings(checkpoint).startswith("no lm_head"):
        what = "lm_head is missing, though config.json says that embeddings are not tied"
        yield failed("layers", what, str(checkpoint.path), CONVERT)


def _incomplete(stack: str, layers: dict[int, set[str]]) -> Iterator[Finding]:
    """A layer that lacks modules: no other is like it, and several have all its modules and more."""
    kinds: dict[frozenset[str], list[int]] = defaultdict(list)
    for index, names in layers.items():
        kinds[frozenset(names)].append(index)
    for modules, indices in kinds.items():
        larger = [kind for kind, members in kinds.items() if modules < kind and len(members) > 1]
        if len(indices) == 1 and larger:
            _, lacking = min((len(kind - modules), sorted(kind - modules)) for kind in larger)
            what = f"lacks `{lacking[0]}`, which other layers have"
            yield failed("layers", what, f"`{stack}.{indices[0]}`", CONVERT)


def verified(folder: Path) -> tuple[list[Finding], tuple[str, ...]]:
    """Errors of a checkpoint of ours before it is published, from its headers; then, as text, faults
    that it has from its source."""
    opened = open_for_verification(folder)
    checkpoint = opened.checkpoint
    if checkpoint and target_of(checkpoint) is None and quantization(checkpoint) is None:
        # a plain float model, not in the format of an engine
        errors = [finding for finding in opened.findings if finding.severity == "error"]
    else:
        errors = verify_structure(folder).report.errors
    faults = [finding for finding in errors if finding.check in _OF_SOURCE]
    return [finding for finding in errors if finding not in faults], tuple(
        f"the model, {f.check}: {f.what}" + (f" ({f.where})" if f.where else "") for f in faults
    )
