"""What is wrong with a checkpoint, told from headers and small files alone."""

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
from quantcli.verification.outcome import Report
from quantcli.verification.sizes import check_sizes

_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*?(?:layers|h|blocks|block))\.(?P<index>\d+)\.(?P<rest>.+)")
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "vocab.tiktoken", "qwen.tiktoken",
)  # fmt: skip
_AGAIN = "convert the model again"


@dataclass(frozen=True)
class Structure:
    """What was found from headers, and what deeper checks start from.

    target:   its format.
    stored:   the checkpoint as the engine would take it; None, both, where no header could be read.
    manifest: None where there is none that is sound.
    """

    report: Report
    target: Target | None
    stored: StoredCheckpoint | None
    manifest: dict[str, Any] | None


def verify_structure(path: Path, tp: Sequence[int] = (1,)) -> Structure:
    """Check `path` by its headers.

    tp: tensor parallel sizes that it is to be served with. Reads no weights: headers, JSON files, and
    tensors that a module has once. Raises InputError where there is no checkpoint, or it is in no
    format that is known.
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
        if (found := quantization(checkpoint)) is None:
            raise InputError(
                "this is a float model: nothing in it is quantized, so there is nothing to verify",
                where=str(path),
                fix="give a quantized checkpoint; `quantcli inspect` shows what a float model holds",
            )
        raise InputError(
            f"no quantized checkpoint of a format that this version verifies: {found.format}",
            where=f"{path}, {found.evidence}",
            fix="give a checkpoint that `quantcli quantize` wrote, or one for such an engine",
        )
    report.format = target.name
    stored = target.open_stored(checkpoint)
    # while a weight file is missing, so is half of everything
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
    """Tokenizer and leftovers. A manifest tells whether a file was lost; it says so elsewhere."""
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


def _layers(stored: StoredCheckpoint) -> Iterator[Finding]:
    """Decoder layers against config.json and each other, embeddings, head."""
    checkpoint = stored.checkpoint
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in own_names(checkpoint.tensors, stored.modules):  # layers need not be of one type
        if match := _LAYER.fullmatch(name):
            rest = re.sub(r"\bexperts\.\d+\.", "experts.*.", match["rest"])
            stacks[match["stack"]][int(match["index"])].add(rest.removesuffix(".weight"))
    for stack, layers in stacks.items():
        absent = sorted(set(range(max(layers) + 1)) - layers.keys())
        if absent:
            yield failed("layers", f"layer {absent[0]} is missing", f"`{stack}`", _AGAIN)
        yield from _incomplete(stack, layers)
    yield from check_sizes(stored, [len(layers) for layers in stacks.values()])
    if tied_embeddings(checkpoint).startswith("no lm_head"):
        what = "there is no lm_head, though config.json says that it is not the embedding"
        yield failed("layers", what, str(checkpoint.path), _AGAIN)


def _incomplete(stack: str, layers: dict[int, set[str]]) -> Iterator[Finding]:
    """A layer that lacks modules of its like: nothing else is as it is, and several have all it has."""
    kinds: dict[frozenset[str], list[int]] = defaultdict(list)
    for index, names in layers.items():
        kinds[frozenset(names)].append(index)
    for modules, indices in kinds.items():
        larger = [kind for kind, members in kinds.items() if modules < kind and len(members) > 1]
        if len(indices) == 1 and larger:
            lacking = min(
                (kind - modules for kind in larger), key=lambda kind: (len(kind), sorted(kind))
            )
            what = f"lacks `{min(lacking)}`, which other layers have"
            yield failed("layers", what, f"`{stack}.{indices[0]}`", _AGAIN)


_OF_SOURCE = {
    "layers",
    "sizes",
    "experts",
    "files",
    "tp",
}  # checks that fail where the model was not whole


def verified(folder: Path) -> tuple[list[Finding], tuple[str, ...]]:
    """What is wrong with a checkpoint of ours that is to be published, told from its headers.

    First errors, then, as text, faults of its source.
    """
    opened = open_for_verification(folder)
    checkpoint = opened.checkpoint
    if checkpoint and target_of(checkpoint) is None and quantization(checkpoint) is None:
        # a plain float model, of no engine's own format
        errors = [finding for finding in opened.findings if finding.severity == "error"]
    else:
        errors = verify_structure(folder).report.errors
    return [finding for finding in errors if finding.check not in _OF_SOURCE], tuple(
        f"the model, {f.check}: {f.what}" + (f" ({f.where})" if f.where else "")
        for f in errors
        if f.check in _OF_SOURCE
    )
