"""What can happen to a checkpoint: each function here gives a change of a copy of it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli.checkpoint.manifest import encode_manifest
from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from quantcli.verification.outcome import CHECKS, Report
from tests.rewritten import rewrite
from tests.verify.stock import TEXT, Good, Stock

CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer.json", "generation_config.json"
DESCRIPTION = "quant_model_description.json"
INDEX, MANIFEST = "model.safetensors.index.json", "quantcli_manifest.json"
DEPTHS = ("structure", "full", "against", "run")
# Good checkpoints by the names that the tables give them.
SMALL = "max_shard=60KB"
GOODS: dict[str, tuple[str, ...]] = {
    "mini": ("mini", "w8a8_dynamic"),
    "dynamic": ("llama", "w8a8_dynamic", SMALL),
    "tied": ("qwen2", "w8a8_dynamic", SMALL),
    "static": ("qwen2", "static", SMALL),
    "half": ("llama:float16", "static"),
    "mix": ("qwen2", "mix"),
    "smooth": ("llama", "smooth"),
    "w8a16": ("llama", "w8a16"),
    "fp8": ("qwen3", "fp8_dynamic"),
    "moe": ("qwen3_moe", "w8a8_moe_dynamic", SMALL),
    "mixtral": ("mixtral", "w8a8_dynamic"),
    "latent": ("deepseek_v3", "w8a8_dynamic"),
    "multimodal": ("multimodal", "w8a8_dynamic"),
    "ct dynamic": ("qwen3", "ct_dynamic", SMALL),
    "ct static": ("qwen2", "ct_static"),
    "ct w4a16": ("llama", "ct_w4a16"),
    "ct asymmetric": ("llama", "ct_asymmetric"),
    "ct zeros": ("llama", "ct_zeros"),
    "ct w4a8": ("llama", "ct_w4a8"),
    "ct fp8 static": ("llama", "ct_fp8_static"),
    "ct mixed": ("llama", "ct_mixed"),
    "ct moe": ("qwen3_moe", "ct_dynamic"),
    "gptq": ("llama", "gptq_int4", SMALL),
    "gptq int8": ("qwen2", "gptq_int8"),
    "gptq mixed": ("llama", "gptq_mixed"),
    "gptq moe": ("qwen3_moe", "gptq_int4"),
    "ct nvfp4": ("llama", "ct_nvfp4"),
    "ct nvfp4 moe": ("qwen3_moe", "ct_nvfp4_moe"),
    "ct mxfp4": ("llama", "ct_mxfp4"),
    "ct mxfp8": ("llama", "ct_mxfp8"),
    "mo nvfp4": ("llama", "mo_nvfp4"),
    "mo nvfp4 moe": ("qwen3_moe", "mo_nvfp4_moe"),
    "mo mxfp8": ("llama", "mo_mxfp8"),
    "mo fp8": ("llama", "mo_fp8_static"),
    "mxfp4": ("llama:wide", "mxfp4"),
    "mxfp4 moe": ("qwen3_moe:wide", "mxfp4_fp8"),
    "mxfp4a16 moe": ("qwen3_moe:wide", "mxfp4a16_moe"),
    "mxfp4 flatquant": ("llama:wide", "mx_flatquant"),
    "kv fp8": ("llama", "ct_kv_fp8"),
    "kv heads": ("llama", "ct_kv_fp8_per_head"),
    "kv mo": ("llama", "mo_kv_fp8"),
    "kv c8": ("llama:wide", "ascend_kv_c8"),
    "w4a8": ("w4a8_dynamic",),
    "w4a8 moe": ("qwen3_moe", "w4a8_experts"),
    "w4a16 moe": ("qwen3_moe", "w4a16_experts"),
    "mxfp8": ("w8a8_mxfp8",),
    "flatquant": ("w4a4_flatquant_dynamic",),
    "reference": ("w8a8_static",),
}


class Copy:
    """A good checkpoint's copy, to be harmed."""

    def __init__(self, good: Good, path: Path) -> None:
        shutil.copytree(good.path, path)
        self.path, self.source = path, good.source

    @property
    def shards(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))

    @contextmanager
    def json(self, name: str) -> Iterator[dict[str, Any]]:
        """A JSON file, written again afterwards."""
        table = json.loads((self.path / name).read_text())
        yield table
        (self.path / name).write_text(json.dumps(table, indent=2) + "\n")

    @contextmanager
    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """All tensors by name; written again afterwards, each in its file, and the index with them.
        New ones go into the last file."""
        files = {path: load_file(path) for path in self.shards}
        table = {name: tensor for part in files.values() for name, tensor in part.items()}
        before = dict(table)
        yield table
        last = self.shards[-1]
        place = {name: path for path, part in files.items() for name in part}
        for path, part in files.items():
            now = {n: t.contiguous() for n, t in table.items() if place.get(n, last) == path}
            if now.keys() != part.keys() or any(now[n] is not before[n] for n in now):
                rewrite(path, now)
        if (self.path / INDEX).exists():
            with self.json(INDEX) as index:
                index["weight_map"] = {name: place.get(name, last).name for name in sorted(table)}
                index["metadata"]["total_size"] = sum(t.nbytes for t in table.values())

    def seal(self) -> None:
        """A manifest of what is there now: as if the harm had come before it was written."""
        if not (self.path / MANIFEST).exists():
            return
        table = json.loads((self.path / MANIFEST).read_text())
        table["files"] = {
            name: {
                "bytes": (self.path / name).stat().st_size,
                "sha256": hashlib.sha256((self.path / name).read_bytes()).hexdigest(),
            }
            for name in sorted(
                path.relative_to(self.path).as_posix()
                for path in self.path.rglob("*")
                if path.is_file()
            )
            if name != MANIFEST
        }
        (self.path / MANIFEST).write_bytes(encode_manifest(table))


Damage = Callable[[Copy], object]


@dataclass(frozen=True)
class Row:
    """One corruption.

    check:  of verify/report.py that sees it; no check of a shallower depth may.
    says:   what the finding's text holds: the cause, and the place.
    also:   other checks that have a word to say about it. most: findings that one cause may have.
    sealed: the manifest is of the corrupt checkpoint, so that hashes tell nothing.
    """

    name: str
    good: str
    damage: Damage
    check: str
    says: tuple[str, ...]
    also: frozenset[str] = frozenset()
    most: int = 1
    sealed: bool = True
    tp: tuple[int, ...] = (1,)
    limits: dict[str, float] = field(default_factory=dict)


def row(name: str, good: str, damage: Damage, check: str, *says: str, **more: Any) -> Row:
    """A row of a table."""
    more["also"] = frozenset(more.get("also", ()))
    return Row(name, good, damage, check, says, **more)


def table(rows: list[Row]) -> dict[str, Any]:
    """For pytest.mark.parametrize."""
    assert len({(r.good, r.name) for r in rows}) == len(rows)
    return {"argnames": "row", "argvalues": rows, "ids": [f"{r.good}: {r.name}" for r in rows]}


def good_of(stock: Stock, name: str) -> Good:
    """A good checkpoint by its name in the tables."""
    words = GOODS[name]
    return stock.golden(*words) if len(words) == 1 else stock.good(*words)


def harmed(stock: Stock, row: Row, folder: Path) -> Copy:
    """A copy with the row's harm done."""
    copy = Copy(good_of(stock, row.good), folder / "copy")
    row.damage(copy)
    if row.sealed:
        copy.seal()
    return copy


def examine(copy: Copy, depth: str, row: Row) -> Report:
    """Verification down to a depth."""
    level = DEPTHS.index(depth)
    return verify(
        VerifyOptions(
            copy.path,
            full=level >= 1,
            against=str(copy.source) if level >= 2 else None,
            run=level == 3,
            data=[str(TEXT)] if level == 3 else None,
            samples=4,
            length=16,
            tp=",".join(map(str, row.tp)),
            **row.limits,
        )
    )


def assert_caught(stock: Stock, row: Row, folder: Path) -> None:
    """The promised depth says no, by the promised check and words; no shallower one does."""
    depth = CHECKS[row.check][0]
    report = examine(harmed(stock, row, folder), depth, row)
    # what is damaged differs from what the recipe makes, too, which has tests of its own
    errors = [e for e in report.errors if e.check != "recomputed" or row.check == "recomputed"]
    said = [f"{e.check}: {e.what} | {e.where}" for e in errors]
    shown = "\n".join(said[:12])
    assert not report.ok
    assert {e.check for e in errors} == {row.check, *row.also}, shown
    assert any(
        line.startswith(f"{row.check}: ") and all(words in line for words in row.says) for line in said
    ), shown
    assert len(said) <= row.most, shown
    assert all(error.fix for error in errors if error.check == row.check), shown


# -- what is done to tensors ------------------------------------------------------------------------


def change(name: str, to: Callable[[Tensor], Tensor]) -> Damage:
    """Another tensor in a tensor's place."""

    def damage(copy: Copy) -> None:
        with copy.tensors() as tensors:
            tensors[name] = to(tensors[name].clone())

    return damage


def put(name: str, index: tuple[int, ...], value: float) -> Damage:
    """One number."""

    def to(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change(name, to)


def byte(name: str, value: int, place: int = 0) -> Damage:
    """One byte of a tensor."""

    def to(tensor: Tensor) -> Tensor:
        tensor.view(torch.uint8).view(-1)[place] = value
        return tensor

    return change(name, to)


def bit(name: str, place: int = 5, which: int = 6) -> Damage:
    """One flipped bit in a tensor."""

    def to(tensor: Tensor) -> Tensor:
        raw = tensor.reshape(-1).view(torch.uint8)
        raw[min(place, len(raw) - 1)] ^= 1 << which
        return tensor

    return change(name, to)


def ulp(tensor: Tensor) -> Tensor:
    """The next larger float32."""
    return tensor.nextafter(torch.tensor(math.inf))


def drop(*names: str, described: bool = False, everything: bool = False) -> Damage:
    """Tensors that are gone, from the description too where they are not `described`.

    everything: names are beginnings of names.
    """

    def gone(name: str) -> bool:
        return name.startswith(names) if everything else name in names

    def damage(copy: Copy) -> None:
        with copy.tensors() as tensors:
            for name in [n for n in tensors if gone(n)]:
                del tensors[name]
        if not described:
            with copy.json(DESCRIPTION) as description:
                for name in [n for n in description if gone(n)]:
                    del description[name]

    return damage


def add(name: str, tensor: Tensor, label: str | None = "FLOAT") -> Damage:
    """One tensor more."""

    def damage(copy: Copy) -> None:
        with copy.tensors() as tensors:
            tensors[name] = tensor
        if label:
            describe(**{name: label})(copy)

    return damage


def swap(one: str, other: str, *suffixes: str) -> Damage:
    """Two modules' tensors in each other's place."""

    def damage(copy: Copy) -> None:
        with copy.tensors() as tensors:
            for suffix in suffixes:
                a, b = f"{one}.{suffix}", f"{other}.{suffix}"
                tensors[a], tensors[b] = tensors[b], tensors[a]

    return damage


def to_float(module: str, dtype: torch.dtype = torch.bfloat16) -> Damage:
    """A module that has stayed float, consistently."""

    def damage(copy: Copy) -> None:
        with copy.tensors() as tensors, copy.json(DESCRIPTION) as description:
            weight = tensors[f"{module}.weight"].to(dtype)
            for name in [n for n in tensors if n.startswith(f"{module}.") and not n.endswith(".bias")]:
                del tensors[name], description[name]
            tensors[f"{module}.weight"], description[f"{module}.weight"] = weight, "FLOAT"

    return damage


def to_int8(module: str, label: str = "W8A8_DYNAMIC") -> Damage:
    """A float module that is quantized, consistently."""

    def damage(copy: Copy) -> None:
        with copy.tensors() as tensors, copy.json(DESCRIPTION) as description:
            weight = tensors[f"{module}.weight"].float()
            scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-6)
            parts = {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}
            parts["weight_offset"] = torch.zeros_like(scale)
            for suffix, tensor in parts.items():
                tensors[f"{module}.{suffix}"] = tensor
                description[f"{module}.{suffix}"] = label

    return damage


# -- and to files -----------------------------------------------------------------------------------


def describe(**entries: Any) -> Damage:
    """Entries of the description; None takes one away."""
    return edit(DESCRIPTION, **entries)


def edit(file: str, **entries: Any) -> Damage:
    """Keys of a JSON file; None takes one away."""

    def damage(copy: Copy) -> None:
        with copy.json(file) as table:
            for key, value in entries.items():
                if value is None:
                    del table[key]
                else:
                    table[key] = value

    return damage


def relabel(module: str, label: str) -> Damage:
    """Another type for all tensors of a module."""

    def damage(copy: Copy) -> None:
        with copy.json(DESCRIPTION) as table:
            for name in table:
                if name.startswith(f"{module}.") and not name.endswith(".bias"):
                    table[name] = label

    return damage


def raw(file: str | int, to: Callable[[bytes], bytes]) -> Damage:
    """Other bytes in a file; a number is that of a weight file."""

    def damage(copy: Copy) -> None:
        path = copy.shards[file] if isinstance(file, int) else copy.path / file
        path.write_bytes(to(path.read_bytes()))

    return damage


def flip(file: str | int, place: int, which: int = 0) -> Damage:
    """One flipped bit of a file."""

    def to(data: bytes) -> bytes:
        harmed = bytearray(data)
        harmed[place] ^= 1 << which
        return bytes(harmed)

    return raw(file, to)


def write(file: str, data: bytes = b"{}") -> Damage:
    """A file more."""

    def damage(copy: Copy) -> None:
        (copy.path / file).parent.mkdir(parents=True, exist_ok=True)
        (copy.path / file).write_bytes(data)

    return damage


def lose(file: str | int) -> Damage:
    """A file that is gone."""

    def damage(copy: Copy) -> None:
        (copy.shards[file] if isinstance(file, int) else copy.path / file).unlink()

    return damage


def each(*damages: Damage) -> Damage:
    """One after the other."""

    def damage(copy: Copy) -> None:
        for one in damages:
            one(copy)

    return damage
