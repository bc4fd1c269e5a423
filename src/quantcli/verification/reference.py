"""The model that a checkpoint is compared with, and differences of single tensors and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint, open_checkpoint, read_json_file
from quantcli.checkpoint.detect import of_cache, quantization
from quantcli.checkpoint.encoded import decoded_kinds
from quantcli.checkpoint.files import CARD, MANIFEST
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.disk import sha256_of
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding, failed, noted
from quantcli.planning.card.source import is_card
from quantcli.sources.decode import decoded
from quantcli.sources.stacked import split_experts
from quantcli.targets.base import StoredCheckpoint, Target, target_of
from quantcli.targets.kv_cache import StoredCache, sides_of, stored_cache
from quantcli.targets.layouts import StoredModule, own_names
from quantcli.targets.module_rows import ModuleReader
from quantcli.targets.stored_format import some
from quantcli.verification.compare import Weight, rows_of
from quantcli.verification.config import OF_PRODUCER, compare_config
from quantcli.verification.kinds import use_of, written
from quantcli.verification.outcome import CONVERT
from quantcli.verification.rotation.turned import ROTATED

_BLOCK = 2**20  # bytes that are compared together


@dataclass(frozen=True)
class Reference:
    """A checkpoint; `target` and `stored` are its format and its modules if it is quantized."""

    checkpoint: Checkpoint
    target: Target | None = None
    stored: StoredCheckpoint | None = None

    @property
    def modules(self) -> Mapping[str, StoredModule]:
        """The quantized modules by name."""
        return {} if self.stored is None else self.stored.modules

    @property
    def unchecked(self) -> Mapping[str, str]:
        """The formats of quantized modules that this version cannot read, by name."""
        return {} if self.stored is None else self.stored.unchecked

    def quantized(self, name: str) -> StoredModule | None:
        """The quantized module of the tensor MODULE.weight; None for any other tensor."""
        return self.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def weight(self, module: str) -> Weight:
        """The weight of a module. KeyError if there is none."""
        return self.modules.get(module) or self.checkpoint.tensors[f"{module}.weight"]

    def names(self) -> set[str]:
        """Tensors with a meaning of their own: not the scales and other parts of modules."""
        names = own_names(self.checkpoint.tensors, self.modules, self.unchecked)
        return {name for name in names if not self.scales_cache(name)}

    @property
    def cache(self) -> StoredCache | None:
        """The scales of its cache of keys and values."""
        if self.stored is not None:
            return self.stored.cache
        return stored_cache({n: t for n, t in self.checkpoint.on_disk.items() if of_cache(n)})

    def scales_cache(self, name: str) -> bool:
        """Whether a tensor is a scale or an offset of the cache."""
        return self.stored is not None and of_cache(name)

    def nbytes(self, name: str) -> int:
        """Bytes of one of `names`: of its codes, if the module is quantized."""
        if name.removesuffix(".weight") in self.unchecked:
            return 0
        module = self.quantized(name)
        return (module.codes if module else self.checkpoint.tensors[name]).spec.nbytes


def open_reference(path: Path) -> Reference:
    """The model to compare with. InputError if it is damaged.

    A checkpoint at which an engine would stop is compared by the weights that it decodes to.
    """
    checkpoint = open_checkpoint(path)
    target = target_of(checkpoint)
    if target is None:
        return Reference(decoded(checkpoint))
    stored = target.open_stored(checkpoint)
    unread = not (stored.modules or stored.unchecked) and quantization(checkpoint) is not None
    if unread or any(f.severity == "error" and f.check == "parameters" for f in stored.findings):
        # codes of a module that is not read would be taken for weights
        return Reference(decoded(checkpoint))
    return Reference(split_experts(checkpoint), target, stored)


def difference(before: StoredTensor, after: StoredTensor) -> str | None:
    """The first difference of two stored tensors; None if their values are the same.

    They are compared byte for byte, or as float32 if one of them was widened to it.
    """
    a, b = before.spec, after.spec
    if a.shape != b.shape or (a.dtype != b.dtype and "F32" not in {a.dtype, b.dtype}):
        return f"is {b}, in the other model {a}"
    step = max(1, _BLOCK // max(1, a.row_nbytes))
    with before.open() as first, after.open() as second:
        for start in range(0, a.shape[0] if a.shape else 1, step):
            x, y = first.weight(start, step), second.weight(start, step)
            if before.kind:
                x = x.to(y.dtype)
            if x.dtype != y.dtype:
                x, y = x.float(), y.float()
            if not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
                bytes_differ = x.view(torch.uint8) != y.view(torch.uint8)
                element = int(bytes_differ.flatten().int().argmax()) // x.element_size()
                place, width = divmod(element, max(1, x[0].numel() if x.dim() else 1)), x.dim()
                index = f"{start + place[0]}" + (f", {place[1]}" if width > 1 else "")
                return f"differs from the other model, first at [{index}]"
    return None


def compare_codes(reference: Weight, ours: Weight) -> tuple[int | None, list[float] | None]:
    """The number of codes that differ, and the smallest and largest ratio of scales.

    None for both unless both weights are quantized in one way; None for the ratio if there is none.
    """
    if not (isinstance(reference, StoredModule) and isinstance(ours, StoredModule)):
        return None, None
    layouts = [(m.layout.operand.dtype, m.layout.weight.suffix, m.codes.spec.dtype, m.codes.spec.shape)
               for m in (reference, ours)]  # fmt: skip
    if layouts[0] != layouts[1]:
        return None, None
    differ, ratios = 0, []
    codes, step = ours.layout.weight, rows_of(ours.shape[1])
    with ModuleReader(reference) as a, ModuleReader(ours) as b:
        for start in range(0, ours.shape[0], step):
            x, y = (
                reader.rows(start, step)[codes.suffix].movedim(codes.axis, 0).contiguous()
                for reader in (a, b)
            )
            differ += int((x.view(torch.uint8) != y.view(torch.uint8)).sum())
            if codes.rows == 1:
                ratios.append(_scale(b.weight(start, step), y) / _scale(a.weight(start, step), x))
    ratio = torch.cat(ratios) if ratios else torch.zeros(0)
    ratio = ratio[torch.isfinite(ratio)]
    return differ, [round(float(end), 6) for end in ratio.aminmax()] if len(ratio) else None


def _scale(weight: Tensor, codes: Tensor) -> Tensor:
    """The largest weight of each row over its largest code: [rows]."""
    return weight.abs().amax(1) / codes.float().abs().amax(1)


def compare_names(ours: Reference, reference: Reference) -> Iterator[Finding]:
    """Findings for tensors that one of the models lacks; a note if the other one is quantized."""
    names, reference_names = ours.names(), reference.names()
    for name in sorted(reference_names - names):
        yield failed("source", f"`{name}` of the other model is missing", None, CONVERT)
    for name in sorted(names - reference_names):
        yield failed("source", f"`{name}` is not in the other model", None, CONVERT)
    kinds = decoded_kinds(reference.checkpoint.tensors.values())
    kinds = [kind for kind in kinds if kind["format"] != ROTATED]
    if count := len(reference.modules) or sum(kind["modules"] for kind in kinds):
        what = (
            f"the other model is quantized, too ({count} modules): differences between both are shown"
        )
        yield noted("source", what, str(reference.checkpoint.path))


_FAR = 4.0  # times another scale of the same keys, from other text or by another rule


def compare_cache(ours: StoredCache | None, reference: StoredCache | None) -> Iterator[Finding]:
    """Findings for scales of the cache that are far from the other model's.

    A note if only one model has some, or if they differ.
    """
    if ours is None or not ours.layers:
        if reference is not None and reference.layers:
            what = "the other model has scales of a cache of keys and values, and this one has none"
            yield noted("source", what, f"`{reference.tensors[0].spec.name}`")
        return
    if reference is None or reference.cache != ours.cache:
        what = "the cache of keys and values is quantized, and the other model's is not"
        if reference is not None:
            what = f"the cache is quantized in {ours.cache}, the other model's in {reference.cache}"
        named = some([tensor.spec.name for tensor in ours.tensors])
        yield noted("source", f"{what}: nothing is compared with {named}")
        return
    differ = []
    for layer, parts in ours.layers.items():
        for part in (part for part in parts if part in sides_of(ours.cache)):
            other = reference.layers.get(layer, {}).get(part)
            if other is None or other.spec.numel != parts[part].spec.numel:
                what = f"the other model has no such {part}"
                yield failed("source", what, f"`{parts[part].spec.name}`", CONVERT)
                continue
            x, y = (read_tensor(stored).flatten().double() for stored in (parts[part], other))
            if not torch.equal(x, y):
                differ.append(parts[part].spec.name)
            ratio = float((x / y).log2().abs().nan_to_num(torch.inf).max().exp2())
            if ratio > _FAR:
                what = f"is {ratio:.3g} times the other model's, or that part of it"
                fix = "it is of another layer or model: measure it anew"
                yield failed("source", what, f"`{parts[part].spec.name}`", fix)
    if differ:
        what = "scales of the cache differ from the other model's, as if measured on other text"
        yield noted("source", f"{what}: {some(differ)}")


def compare_files(ours: Checkpoint, reference: Checkpoint) -> Iterator[Finding]:
    """Findings for files of the other model that are missing here, or differ, and for added ones.

    An added file is an error if something may read it, else a note. This tool copies files byte for
    byte, and writes a manifest; other producers load and save the model, and leave out files that
    nothing reads.
    """
    manifest = _manifest(ours)
    for name in sorted(reference.aux):
        own, other = ours.path / name, reference.path / name
        if not own.is_file():
            what, fix = "file of the other model is missing", "copy it from the other model"
            read = manifest is not None or use_of(name) is not None
            yield failed("source", what, name, fix) if read else noted("source", what, name)
        elif sha256_of(own) != sha256_of(other):
            if name == CONFIG:
                yield from compare_config(ours, reference, manifest)
            elif name == CARD and is_card(own):
                continue  # it quotes the other model's
            elif manifest is not None or not _same_settings(own, other):
                yield failed("source", "file differs from the other model's", name, "copy it again")
    present = {*ours.aux, *ours.left_out}
    generated = written() | ({CARD} if CARD in ours.aux and is_card(ours.path / CARD) else set())
    for name in sorted(present - {*reference.aux, *ours.shards, *generated}):
        if not _is_own_index(ours, name):  # the check of files has a note on it
            yield _added(name, ours.path / name, reference.path / name)


def _manifest(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The manifest; empty if it cannot be read, None if there is none."""
    if not (checkpoint.path / MANIFEST).is_file():
        return None
    try:
        return read_json_file(checkpoint.path / MANIFEST)
    except InputError:
        return {}


def _is_own_index(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a file lists the tensors that are there, under another name than engines look for."""
    if not name.endswith(".index.json"):
        return False
    try:
        listed = read_json_file(checkpoint.path / name).get("weight_map")
    except InputError:
        return False
    return listed == {name: stored.file.name for name, stored in checkpoint.tensors.items()}


def _same_settings(own: Path, other: Path) -> bool:
    """Whether two JSON files say the same, whatever their order, and the program that saved them."""
    try:
        tables = [read_json_file(path) for path in (own, other)]
    except InputError:
        return False
    first, second = ({k: v for k, v in t.items() if k not in OF_PRODUCER} for t in tables)
    return first == second


def _added(name: str, file: Path, other: Path) -> Finding:
    """The finding for a file that no conversion puts into a checkpoint; other: in the other model."""
    if file.is_file() and other.is_file() and sha256_of(file) == sha256_of(other):
        what = "file is the other model's, and belongs to its own weights: conversions leave it out"
        return noted("source", what, name)
    what = f"{'folder' if name.endswith('/') else 'file'} is not in the other model"
    if (use := use_of(name)) is None:
        return noted("source", f"{what}; engines do not read it", name)
    fix = "remove it, or give --against the model that it belongs to"
    return failed("source", f"{what}: {use}", name, fix)


def other_model(ours: Checkpoint, reference: Checkpoint) -> Finding | None:
    """A finding if both cannot be of one model, so that nothing else need be compared."""
    unlike = _embeddings(ours) != _embeddings(reference)
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        value, other = ours.text_config.value(key), reference.text_config.value(key)
        if value != other and (unlike or key == "model_type"):
            what = f"these are different models: {key} is {value!r:.40} here and {other!r:.40} there"
            fix = "give --against the model that the checkpoint was made from"
            return failed("source", what, str(reference.path), fix)
    return None


def _embeddings(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    tensors = checkpoint.tensors
    names = sorted(name for name in tensors if name.endswith("embed_tokens.weight"))
    return [tensors[name].spec.shape for name in names]
