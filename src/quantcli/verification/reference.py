"""The model that a checkpoint is compared with, and how single tensors and files of both differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import CONFIG, QUANTIZATION_KEYS, Checkpoint, open_checkpoint
from quantcli.checkpoint.encoded import decoded_kinds
from quantcli.checkpoint.header import StoredTensor
from quantcli.core.disk import sha256_of
from quantcli.core.findings import Finding, failed, noted
from quantcli.sources.decode import decoded
from quantcli.targets.base import StoredCheckpoint, Target, target_of
from quantcli.targets.layouts import StoredModule, own_names
from quantcli.targets.module_rows import ModuleReader
from quantcli.verification.compare import rows_of

_BLOCK = 2**20  # bytes that are compared together


@dataclass(frozen=True)
class Reference:
    """A checkpoint, float or quantized: then with its format, and as the engine would take it."""

    checkpoint: Checkpoint
    target: Target | None
    stored: StoredCheckpoint | None

    def weight(self, module: str) -> StoredTensor | StoredModule | None:
        """What holds a module's weight."""
        if self.stored is not None and module in self.stored.modules:
            return self.stored.modules[module]
        return self.checkpoint.tensors.get(f"{module}.weight")

    def names(self) -> set[str]:
        """Tensors with a meaning of their own: all but what else quantized modules are made of."""
        modules = self.stored.modules if self.stored is not None else {}
        return own_names(self.checkpoint.tensors, modules)

    def nbytes(self, name: str) -> int:
        """Bytes of one of `names`: of its codes, where a module is quantized."""
        weight = self.weight(name.removesuffix(".weight")) if name.endswith(".weight") else None
        stored = weight.codes if isinstance(weight, StoredModule) else weight
        return (stored or self.checkpoint.tensors[name]).spec.nbytes


def open_reference(path: Path) -> Reference:
    """The model to compare with. InputError where it is damaged."""
    checkpoint = open_checkpoint(path)
    target = target_of(checkpoint)
    if target is None:
        return Reference(decoded(checkpoint), None, None)
    return Reference(checkpoint, target, None if target is None else target.open_stored(checkpoint))


def difference(before: StoredTensor, after: StoredTensor) -> str | None:
    """How two stored tensors differ; None where their values are the same, byte for byte, or as
    float32 where one was widened."""
    a, b = before.spec, after.spec
    if a.shape != b.shape:
        return f"is {b}, in the other model {a}"
    if a.dtype != b.dtype and "F32" not in {a.dtype, b.dtype}:
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


def codes(reference: StoredTensor | StoredModule, ours: StoredTensor | StoredModule) -> dict[str, Any]:
    """Codes that differ, and by how much scales do, where both are quantized in one way."""
    alike = (
        isinstance(reference, StoredModule)
        and isinstance(ours, StoredModule)
        and reference.layout.kind == ours.layout.kind
        and reference.layout.weight.suffix == ours.layout.weight.suffix
        and reference.codes.spec.dtype == ours.codes.spec.dtype
        and reference.codes.spec.shape == ours.codes.spec.shape
    )
    if not alike:
        return {"codes_differ": None, "scale_ratio": None}
    assert isinstance(reference, StoredModule)
    assert isinstance(ours, StoredModule)
    differ, ratios = 0, []
    first, second = reference.codes, ours.codes
    step = rows_of(ours.shape[1])
    with (
        first.open() as a,
        second.open() as b,
        ModuleReader(reference) as v,
        ModuleReader(ours) as w,
    ):
        for start in range(0, first.spec.shape[0], step):
            x, y = a.weight(start, step), b.weight(start, step)
            differ += int((x.view(torch.uint8) != y.view(torch.uint8)).sum())
            if first.spec.shape[0] == ours.shape[0]:  # a row of codes for a row of weights
                ratios.append(_scale(w.weight(start, step), y) / _scale(v.weight(start, step), x))
    ratio = torch.cat(ratios) if ratios else torch.zeros(0)
    ratio = ratio[torch.isfinite(ratio)]
    ends = [round(float(ratio.min()), 6), round(float(ratio.max()), 6)] if len(ratio) else None
    return {"codes_differ": differ, "scale_ratio": ends}


def _scale(weight: Tensor, codes: Tensor) -> Tensor:
    """What a row's largest code stands for, over that code: [rows]."""
    return weight.abs().amax(1) / codes.float().abs().amax(1)


def compare_files(ours: Checkpoint, reference: Checkpoint) -> Iterator[Finding]:
    """Files that go along with a model: each of the other one is here, unchanged."""
    for name in sorted(reference.aux):
        if not (ours.path / name).is_file():
            fix = "copy it from the other model"
            yield failed("source", "file of the other model is missing", name, fix)
        elif sha256_of(ours.path / name) != sha256_of(reference.path / name):
            if name == CONFIG:
                yield from _config(ours.config, reference.config)
            else:
                yield failed("source", "file differs from the other model's", name, "copy it again")


# of config.json, at any level: what conversion sets, and removes
_MAY_CHANGE = {"torch_dtype", "dtype", *QUANTIZATION_KEYS}


def _config(ours: Any, reference: Any, place: str = "") -> Iterator[Finding]:
    """Keys of config.json that conversion does not touch, and that differ."""
    for key in sorted({*ours, *reference} - _MAY_CHANGE):
        value, other = ours.get(key), reference.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _config(value, other, f"{place}{key}.")
        elif value != other:
            what = (
                f"`{place}{key}` is {value!r:.60} in {CONFIG}, not {other!r:.60} as in the other model"
            )
            fix = "take the other model's value" if key in reference else "remove it"
            yield failed("source", what, CONFIG, fix)


def other_model(ours: Checkpoint, reference: Checkpoint) -> Finding | None:
    """A finding where both cannot be of one model, so that nothing else need be compared."""
    unlike = _embeddings(ours) != _embeddings(reference)
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        value, other = ours.text_config.get(key), reference.text_config.get(key)
        if value != other and (unlike or key == "model_type"):
            what = f"these are different models: {key} is {value!r:.40} here and {other!r:.40} there"
            fix = "give --against the model that the checkpoint was made from"
            return failed("source", what, str(reference.path), fix)
    return None


def _embeddings(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    tensors = checkpoint.tensors
    names = sorted(name for name in tensors if name.endswith("embed_tokens.weight"))
    return [tensors[name].spec.shape for name in names]


def noted_kind(reference: Reference) -> Iterator[Finding]:
    """A word where the other model is quantized itself."""
    encoded = decoded_kinds(reference.checkpoint.tensors.values())
    count = sum(kind["modules"] for kind in encoded)
    if reference.stored is not None:
        count = len(reference.stored.modules)
    if count:
        what = (
            f"the other model is quantized, too ({count} modules): differences between both are shown"
        )
        yield noted("source", what, str(reference.checkpoint.path))
