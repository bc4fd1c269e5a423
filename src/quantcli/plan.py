"""The Plan: what will happen, a pure value that fixes everything but the numbers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from quantcli import __version__
from quantcli.checkpoint import Checkpoint
from quantcli.header import StoredTensor, encode_header
from quantcli.recipe import Recipe
from quantcli.schemes.base import Scheme
from quantcli.tensorspec import TensorSpec


@dataclass(frozen=True)
class Copy:
    """A tensor that goes over byte for byte."""

    source: StoredTensor

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensor itself."""
        return (self.source.spec,)


@dataclass(frozen=True)
class Quantize:
    """A weight [n, k] and the tensors that are made of it, each with n rows."""

    source: StoredTensor
    module: str
    scheme: Scheme
    held: str  # dtype in which the engine will hold the scale
    outputs: tuple[TensorSpec, ...]


Item = Copy | Quantize


@dataclass(frozen=True)
class Shard:
    """One weight file: its tensors in the order of their data, and what they are made from."""

    file: str
    tensors: tuple[TensorSpec, ...]
    items: tuple[Item, ...]

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes, up to the data."""
        return encode_header(self.tensors)

    @cached_property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(spec.nbytes for spec in self.tensors)


@dataclass(frozen=True)
class RuleLine:
    """What one rule does, for the plan's table. Sizes in bytes of weights."""

    number: int
    scheme: str
    label: str
    modules: int
    nbytes_before: int
    nbytes_after: int
    loads_on: str | None


@dataclass(frozen=True)
class Kept:
    """Tensors that stay as they are, and why."""

    reason: str
    tensors: int
    nbytes: int
    names: tuple[str, ...]  # folded: model.layers.{0..35}.input_layernorm


@dataclass(frozen=True)
class Plan:
    """The whole output but for its numbers."""

    checkpoint: Checkpoint
    recipe: Recipe
    shards: tuple[Shard, ...]
    sidecars: dict[str, bytes]  # generated files
    copies: dict[str, int]  # files of the source that go along unchanged -> bytes
    serving_dtype: str
    rules: tuple[RuleLine, ...]
    kept: tuple[Kept, ...]
    notes: tuple[str, ...]
    params: int
    quantized_params: int

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the finished directory, without the manifest."""
        written = sum(shard.nbytes for shard in self.shards) + sum(map(len, self.sidecars.values()))
        return written + sum(self.copies.values())

    @property
    def quantized_params_pct(self) -> float:
        """Quantized parameters as a percentage of all."""
        return 100 * self.quantized_params / self.params if self.params else 0.0

    @property
    def quantized_modules(self) -> int:
        """Number of quantized modules."""
        return sum(line.modules for line in self.rules if line.scheme != "keep")

    @cached_property
    def weight_nbytes(self) -> int:
        """Bytes of all tensors written."""
        return sum(spec.nbytes for shard in self.shards for spec in shard.tensors)

    @cached_property
    def digest(self) -> str:
        """sha256 over all that fixes the output: tool version, source headers, items, files."""
        digest = hashlib.sha256(f"{__version__}\n{self.checkpoint.fingerprint}\n".encode())
        schemes = {
            item.scheme: repr((item.scheme.name, item.scheme.model_dump()))
            for shard in self.shards
            for item in shard.items
            if isinstance(item, Quantize)
        }
        for shard in self.shards:
            digest.update(shard.header)
            for item in shard.items:
                how = f"{schemes[item.scheme]} {item.held}" if isinstance(item, Quantize) else "copy"
                digest.update(f"{item.source.spec.name}\0{how}\n".encode())
        for name, content in sorted(self.sidecars.items()):
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        digest.update(json.dumps(sorted(self.copies.items())).encode())
        return digest.hexdigest()
