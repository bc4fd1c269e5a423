"""The contents of a checkpoint, folded for people to read. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.detect import draft_of, of_cache, quantization
from quantcli.checkpoint.head import lm_head, tied
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.roles import WEIGHTS, Role, roles_of
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError, closest
from quantcli.core.untrusted.patterns import glob_matches

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_NO_ROLES: Mapping[str, Role] = MappingProxyType({})
_HOLE = "\0"  # stands for a number in a folded name; no tensor name holds it


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ only in the numbers in their names."""

    name: str  # model.layers.{0..35}.mlp.down_proj
    count: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    role: Role | None = None


def inspect_checkpoint(checkpoint: Checkpoint, tensors: str | None = None) -> dict[str, Any]:
    """The contents of a checkpoint as JSON-able data; with `tensors`, a glob, also each match.

    InputError if the glob matches nothing.
    """
    specs = list(checkpoint.specs())
    by_dtype: dict[str, list[TensorSpec]] = defaultdict(list)
    for spec in specs:
        by_dtype[spec.dtype].append(spec)
    quantized = quantization(checkpoint)
    summary: dict[str, Any] = {
        "path": str(checkpoint.path),
        "model_type": _printable(checkpoint.config.text("model_type")),
        "architectures": [*filter(_printable, checkpoint.config.texts("architectures"))],
        "draft": draft.kind if (draft := draft_of(checkpoint)) else None,
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs),
        "bytes": checkpoint.nbytes,
        "shards": list(checkpoint.shards),
        "dtypes": {
            dtype: {
                "tensors": len(group),
                "parameters": sum(spec.numel for spec in group),
                "bytes": sum(spec.nbytes for spec in group),
            }
            for dtype, group in sorted(by_dtype.items())
        },
        "tied_embeddings": tied_embeddings(checkpoint),
        "quantization": None
        if quantized is None
        else {
            "format": quantized.format,
            "modules": quantized.modules,
            "evidence": quantized.evidence,
        },
        "kv_cache": _cache(checkpoint),
        "groups": [
            {
                "name": group.name,
                "count": group.count,
                "dtype": group.dtype,
                "shape": list(group.shape),
                "bytes": group.nbytes,
                "role": group.role,
            }
            for group in fold(specs, roles_of(checkpoint))
        ],
        "other_files": checkpoint.aux,
        "left_out": checkpoint.left_out,
        "problems": [{"what": p.what, "where": p.where, "fix": p.fix} for p in checkpoint.problems],
        "notes": checkpoint.notes,
    }
    if tensors is not None:
        summary["matches"] = _matches(checkpoint, tensors)
    return summary


def _cache(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The scales and offsets of the cache of keys and values; None if there are none."""
    names = [name for name in checkpoint.on_disk if of_cache(name)]
    example = min(names, key=lambda name: not name.endswith("scale"), default=None)
    return {"tensors": len(names), "example": example} if names else None


def _printable(name: str | None) -> str | None:
    """A name in config.json, which is untrusted; None if it cannot be printed."""
    return name if name is not None and name.isprintable() else None


def _matches(checkpoint: Checkpoint, pattern: str) -> list[dict[str, Any]]:
    chosen: list[StoredTensor] = [
        stored
        for name, stored in checkpoint.tensors.items()
        if glob_matches(pattern, name) or glob_matches(pattern, name.removesuffix(".weight"))
    ]
    if not chosen:
        near = closest(pattern, list(checkpoint.tensors)[:2000])
        raise InputError(
            "no tensor matches",
            where=f"--tensors {pattern}",
            fix=f"closest names: {near}" if near else "patterns match the whole name",
        )
    return [
        {
            "name": stored.spec.name,
            "dtype": stored.spec.dtype,
            "shape": list(stored.spec.shape),
            "bytes": stored.spec.nbytes,
            "shard": stored.file.name,
        }
        for stored in chosen
    ]


def tied_embeddings(checkpoint: Checkpoint) -> str:
    """Whether lm_head shares the embedding: what config.json says against what is stored."""
    return {
        "stored": "tied in config.json, yet lm_head is stored" if tied(checkpoint) else "no",
        "tied": "yes",
        "none": "no: the model has no lm_head",
        "lost": "no lm_head, though config.json says untied",
    }[lm_head(checkpoint)]


def fold(specs: list[TensorSpec], roles: Mapping[str, Role] = _NO_ROLES) -> list[TensorGroup]:
    """Group tensors that differ only in layer or expert numbers, in order of their names.

    roles: by module, or by the whole name of a stack; those of a group are the same.
    """
    families: dict[tuple[str, str, tuple[int, ...], Role | None], list[TensorSpec]]
    families = defaultdict(list)
    for spec in specs:
        module, _, suffix = spec.name.rpartition(".")
        role = roles.get(module if suffix in WEIGHTS else spec.name)
        families[_NUMBER.sub(_HOLE, spec.name), spec.dtype, spec.shape, role].append(spec)
    groups = []
    for (name, dtype, shape, role), members in families.items():
        numbers = zip(*(_NUMBER.findall(spec.name) for spec in members), strict=True)
        spans = [_span(sorted({int(n) for n in column})) for column in numbers]
        pieces = itertools.zip_longest(name.split(_HOLE), spans, fillvalue="")
        folded = "".join(itertools.chain.from_iterable(pieces))
        nbytes = sum(spec.nbytes for spec in members)
        name = folded.removesuffix(".weight")
        groups.append(TensorGroup(name, len(members), dtype, shape, nbytes, role))
    return sorted(groups, key=_place)


def _place(group: TensorGroup) -> tuple[str, ...]:
    return tuple(re.split(r"\{[^}]*\}", group.name))


def _span(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> {0..2,5}; a single number stays as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(f"{members[0]}..{members[-1]}" if len(members) > 1 else str(members[0]))
    if len(runs) > 6:
        runs = [*runs[:5], "...", runs[-1]]
    return "{" + ",".join(runs) + "}"
