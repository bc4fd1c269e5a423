"""The Plan: what will happen, a pure value that fixes everything but the numbers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from quantcli import __version__
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.detect import draft_of
from quantcli.checkpoint.header import StoredTensor, encode_header, layout
from quantcli.checkpoint.manifest import VERSION as MANIFEST_VERSION
from quantcli.checkpoint.manifest import tool_of
from quantcli.checkpoint.spec import TensorSpec, torch_dtype
from quantcli.checkpoint.tensors import content_of, read_tensor, tensor_bytes
from quantcli.core.errors import InputError
from quantcli.core.numerics import EMPTY, Cache, Module, Numerics
from quantcli.core.registry import packages_of
from quantcli.planning.measured import Basis, Edit
from quantcli.planning.siblings import Siblings
from quantcli.recipe.methods import MethodOptions, methods_for
from quantcli.recipe.recipe import Recipe, name_of_data
from quantcli.schemes.base import Scheme
from quantcli.targets.base import PlannedCheckpoint, Target
from quantcli.targets.kv_cache import AttentionLayer, CachePart
from quantcli.targets.layouts import Output, StoredModule
from quantcli.targets.serving import Served

NOTHING_MEASURED: Mapping[str, StoredTensor] = EMPTY


@dataclass(frozen=True)
class Copy:
    """A tensor that goes over byte for byte, or with an edit that keeps the model's function.

    dtype: the float dtype to store it in; None for its own.
    """

    source: StoredTensor
    edit: Edit | None = None
    dtype: str | None = None

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The tensor itself."""
        spec = self.source.spec
        return (Output(TensorSpec(spec.name, self.dtype, spec.shape) if self.dtype else spec),)

    @property
    def height(self) -> int:
        """Rows of the tensor; those of a scalar are one."""
        return self.source.spec.shape[0] if self.source.spec.shape else 1


@dataclass(frozen=True)
class CacheScale(Copy):
    """A scale or an offset of the cache of keys and values: measured, or of the source.

    source: the numbers, under the name and in the shape that they get.
    layer:  the name of its layer of attention. part: what it is there.
    ready:  whether there are numbers; there are none yet before a calibration.
    """

    layer: str = ""
    part: CachePart = "k_scale"
    ready: bool = True


@dataclass(frozen=True)
class PlannedCache:
    """The cache of keys and values.

    measured: whether calibration gives its scales; else they are those of the source.
    """

    cache: Cache
    layers: Mapping[str, AttentionLayer]
    measured: bool


class EngineDtypes(NamedTuple):
    """The dtypes in which the engine will hold a module's scales, as in "BF16"."""

    weight_scale: str
    input_scale: str


@dataclass(frozen=True)
class Quantize:
    """A weight [n, k] and the tensors that it is quantized into.

    where: its rule in the recipe, file:line.
    bias: the module's own, [n], if codes depend on it. It is copied as well.
    stats: statistics of the module's input, by name; empty if the scheme needs no data, and in a plan
        that cannot be executed yet.
    """

    source: StoredTensor
    module: str
    scheme: Scheme
    where: str
    engine_dtypes: EngineDtypes
    outputs: tuple[Output, ...]
    bias: StoredTensor | None = None
    stats: Mapping[str, StoredTensor] = field(default_factory=lambda: NOTHING_MEASURED)
    edit: Edit | None = None  # of the weight, before it is quantized
    bias_edit: Edit | None = None
    row_multiple: int = 1  # blocks of rows are cut at multiples of it
    surveyed: tuple[tuple[StoredTensor, Edit | None], ...] = ()  # weights whose maxima are needed first

    @property
    def asked(self) -> frozenset[str]:
        """Names of the statistics and codes that calibration must give; empty for data-free schemes."""
        return _asked(self.scheme, self.source.spec.shape[-1], self.engine_dtypes.input_scale)

    @property
    def row_stats(self) -> dict[str, StoredTensor]:
        """Stats with a row per row of the weight."""
        return {name: self.stats[name] for name in self.scheme.row_stats & self.stats.keys()}

    @property
    def height(self) -> int:
        """Rows of the weight."""
        return self.source.spec.shape[0]

    def measured(self, *, shared: bool = False) -> bytes:
        """Names and values of the statistics that do not depend on rows, from disk.

        shared: only of those that the engine keeps once for modules that it merges.
        """
        content = b""
        own = self.scheme.row_stats | (self.scheme.column_stats if shared else frozenset())
        for name, stored in sorted(self.stats.items()):
            if name in own:
                continue
            content += f"{name}\0{stored.spec.dtype}\0{stored.spec.shape}\0".encode()
            content += tensor_bytes(read_tensor(stored))
        return content


@lru_cache  # experts come in tens of thousands
def _asked(scheme: Scheme, k: int, input_dtype: str) -> frozenset[str]:
    return frozenset(scheme.blank(k, torch_dtype(input_dtype)))


@dataclass(frozen=True)
class Repack:
    """A quantized module [n, k] in one format, and the tensors that hold the same numbers in another.

    source:  its codes; the other tensors are in `module`.
    origin:  the format of the source.
    row_multiple: see `Quantize`.
    bias:    the module's own, [n].
    """

    source: StoredTensor
    module: StoredModule
    origin: Target
    outputs: tuple[Output, ...]
    row_multiple: int = 1
    bias: StoredTensor | None = None

    @property
    def numerics(self) -> Numerics:
        """The numerics, which are the same before and after."""
        assert self.module.numerics is not None
        return self.module.numerics

    @property
    def height(self) -> int:
        """Rows of the weight."""
        return self.module.shape[0]


Item = Copy | Quantize | Repack


def _found_for(item: Item) -> bytes:
    """The statistics that an item is made with, row by row those as hashes; empty without any."""
    content = b""
    if isinstance(item, Quantize) and item.stats:
        content += item.measured()
        for name, stored in sorted(item.row_stats.items()):
            content += f"{name}\0{stored.spec}\0{content_of(stored)}\0".encode()
    if not isinstance(item, Repack) and item.edit is not None:
        content += item.edit.digest()
    is_scale = isinstance(item, CacheScale) and item.ready
    return content + bytes(tensor_bytes(read_tensor(item.source)) if is_scale else b"")


@dataclass(frozen=True)
class Shard:
    """One weight file: its tensors in the order of their data, and the items that make them."""

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

    @property
    def source_nbytes(self) -> int:
        """Bytes of the source that are read for it."""
        return sum(item.source.nbytes for item in self.items)

    @property
    def by_columns(self) -> set[str]:
        """The names of tensors whose columns hold the rows of a weight."""
        return {out.spec.name for item in self.items for out in item.outputs if out.axis}


def make_shards(files: Iterable[tuple[str, Sequence[Item]]]) -> tuple[Shard, ...]:
    """The weight files, each from its name and items. InputError for a tensor that is there twice."""
    names: set[str] = set()
    shards = []
    for file, items in files:
        shard = Shard(file, layout(out.spec for item in items for out in item.outputs), tuple(items))
        for spec in shard.tensors:
            if spec.name in names:
                raise InputError("the model already has a tensor of this name", where=f"`{spec.name}`")
            names.add(spec.name)
        shards.append(shard)
    return tuple(shards)


def as_planned(
    checkpoint: Checkpoint,
    modules: Sequence[Module],
    shards: Sequence[Shard],
    serving_dtype: str,
    cache: Cache | None = None,
) -> PlannedCheckpoint:
    """The output as a target sees it when it makes its sidecars."""
    return PlannedCheckpoint(
        modules=modules,
        tensors={spec.name: spec for shard in shards for spec in shard.tensors},
        files={spec.name: shard.file for shard in shards for spec in shard.tensors},
        config=checkpoint.config,
        serving_dtype=serving_dtype,
        cache=cache,
    )


@dataclass(frozen=True)
class RuleLine:
    """The effect of one rule, for the plan's table. Sizes in bytes of weights."""

    number: int
    scheme: str
    label: str
    modules: int
    nbytes_before: int
    nbytes_after: int
    loads_on: str | None


@dataclass(frozen=True)
class Kept:
    """Tensors that stay as they are, and why.

    linears:     number of weights in linears and experts among them; routers and embeddings are none.
    quantizable: those of `linears` in layers of the language model that the engine would take.
    """

    reason: str
    tensors: int
    nbytes_before: int  # as stored, codes with their scales
    nbytes: int
    names: tuple[str, ...]  # folded: model.layers.{0..35}.input_layernorm
    linears: int = 0
    quantizable: int = 0


@dataclass(frozen=True)
class Coverage:
    """How much of a model is quantized, as numbers of weights.

    quantized:   in linears in layers of the language model. quantizable: these, and those that the
                 engine would take with these schemes.
    linears:     in all linears, those of heads, towers and draft layers among them; routers and
                 embeddings are none. quantized_linears: quantized ones of them.
    """

    quantized: int
    quantizable: int
    quantized_linears: int
    linears: int

    @property
    def quantizable_pct(self) -> float:
        """Percentage of quantizable weights that are quantized; 100 if there are none."""
        return 100 * self.quantized / self.quantizable if self.quantizable else 100.0

    @property
    def linear_pct(self) -> float:
        """Percentage of the weights of all linears that are quantized; 100 if there are none."""
        return 100 * self.quantized_linears / self.linears if self.linears else 100.0


@dataclass(frozen=True)
class Work:
    """A whole checkpoint to be written: everything is fixed except its numbers."""

    checkpoint: Checkpoint
    target: Target
    shards: tuple[Shard, ...]
    sidecars: dict[str, bytes]  # generated files
    serving_dtype: str
    recipe_text: str | None  # of the numbers, overrides included; None: not known
    notes: tuple[str, ...]
    params: int
    quantized_params: int
    cache: PlannedCache | None  # of keys and values; None: it stays float

    @cached_property
    def served(self) -> Served:
        """What the command that serves the output depends on."""
        used: dict[int, Numerics] = {}  # numerics hash slowly, and experts come in tens of thousands
        for item in self.items:
            if isinstance(item, Quantize):
                used[id(item.scheme)] = item.scheme.numerics
            elif isinstance(item, Repack):
                used[id(item.module.numerics)] = item.numerics
        labels = frozenset(map(self.target.label, used.values()))
        cache = self.cache.cache if self.cache else None
        return Served(labels, self.checkpoint.config, cache, draft_of(self.checkpoint))

    @property
    def items(self) -> Iterator[Item]:
        """Everything that is done, in the order of the files."""
        return (item for shard in self.shards for item in shard.items)

    @cached_property
    def copies(self) -> dict[str, int]:
        """Files of the source that go along unchanged -> bytes."""
        return {name: n for name, n in self.checkpoint.aux.items() if name not in self.sidecars}

    @property
    def packages(self) -> dict[str, str]:
        """Other people's packages that its classes come from, such as schemes, and their versions."""
        classes: set[type] = {type(self.target)}
        for item in self.items:
            if isinstance(item, Quantize):
                classes.add(type(item.scheme))
            elif isinstance(item, Repack):
                classes.add(type(item.origin))
        return packages_of(classes)

    def manifest(self) -> dict[str, Any]:
        """The manifest without its files: no times, no paths of this machine."""
        return {
            "manifest_version": MANIFEST_VERSION,
            "tool": tool_of(self.packages),
            "plan": self.digest,
            "source": ({"id": i} if (i := self.checkpoint.hub_id) else {})
            | {
                "fingerprint": self.checkpoint.fingerprint,
                "tensors": len(self.checkpoint.on_disk),
                "bytes": self.checkpoint.nbytes,
            }
            | ({"files": found} if (found := self.checkpoint.weight_hashes) is not None else {}),
            "target": self.target.name,
            "serving_dtype": self.serving_dtype,
            "quantized_params_pct": round(self.quantized_params_pct, 4),
            "recipe": self.recipe_text,
        } | ({} if (turned := self.checkpoint.rotation) is None else {"rotation": turned})

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the finished directory, without the manifest."""
        written = sum(shard.nbytes for shard in self.shards) + sum(map(len, self.sidecars.values()))
        return written + sum(self.copies.values())

    @property
    def quantized_params_pct(self) -> float:
        """Quantized parameters as a percentage of all."""
        return 100 * self.quantized_params / self.params if self.params else 0.0

    @cached_property
    def weight_nbytes(self) -> int:
        """Bytes of all tensors written."""
        return sum(spec.nbytes for shard in self.shards for spec in shard.tensors)

    @cached_property
    def _found(self) -> dict[str, bytes]:
        """sha256 of what calibration found for an item, by the name of its tensor."""
        found = ((i.source.spec.name, _found_for(i)) for i in self.items)
        return {name: hashlib.sha256(each).digest() for name, each in found if each}

    @cached_property
    def digest(self) -> str:
        """sha256 over all that fixes the output: version, source headers, items, statistics, files."""
        digest = hashlib.sha256(f"{__version__}\n{self.checkpoint.fingerprint}\n".encode())
        for name, version in self.packages.items():
            digest.update(f"package {name} {version}\n".encode())
        schemes = {
            item.scheme: repr((item.scheme.name, item.scheme.model_dump()))
            for item in self.items
            if isinstance(item, Quantize)
        }
        for shard in self.shards:
            digest.update(shard.header)
            for item in shard.items:
                how = "copy"
                if isinstance(item, Quantize):
                    bias = item.bias.spec.name if item.bias else ""
                    how = f"{schemes[item.scheme]} {' '.join(item.engine_dtypes)} {bias}"
                elif isinstance(item, Repack):
                    formats = f"{item.origin.name} {item.origin} {self.target.name} {self.target}"
                    how = f"pack {formats} {item.module.layout.label} {item.numerics}"
                name = item.source.spec.name
                digest.update(
                    f"{name}\0{how}{item.source.kind}\n".encode() + self._found.get(name, b"")
                )
        for name, content in sorted(self.sidecars.items()):
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        digest.update(json.dumps(sorted(self.copies.items())).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Plan(Work):
    """The conversion of a model by a recipe."""

    recipe: Recipe
    siblings: Siblings
    rules: tuple[RuleLine, ...]
    kept: tuple[Kept, ...]
    coverage: Coverage
    measured: tuple[str, ...]  # modules whose schemes measure inputs
    needs_data: tuple[str, ...]  # those that are not measured yet; the plan cannot run if there are any
    edited: Mapping[str, int]  # groups of channels, see `Measured`
    taken_from: Mapping[str, str]  # see `Measured`
    experts: Mapping[str, Any]  # likewise
    basis: Basis | None  # likewise

    @cached_property
    def methods(self) -> tuple[MethodOptions, ...]:
        """The calibration methods, in their order."""
        schemes = {item.scheme: None for item in quantized_items(self)}
        return methods_for(self.recipe.methods, schemes)

    @property
    def packages(self) -> dict[str, str]:
        """Also those of methods."""
        methods = packages_of(type(method) for method in self.methods)
        return dict(sorted({**super().packages, **methods}.items()))

    def manifest(self) -> dict[str, Any]:
        """The manifest without its files; with a calibration also what that was made of."""
        head, block = super().manifest(), self.recipe.file.calibration
        if self.basis is not None and block is not None and self.needs_calibration:
            head["calibration"] = self.basis.record(name_of_data(block.data or ""), self._found)
        return head

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe asks for samples: for inputs, for a method, or to learn a rotation."""
        return bool(self.methods) or self.recipe.file.learns_rotation

    @property
    def asked(self) -> dict[str, int]:
        """Number of modules for each result of the methods that schemes ask for, such as ranges."""
        schemes = Counter(item.scheme for item in quantized_items(self))
        methods = sorted(self.methods, key=lambda method: bool(method.edited_as))  # edits last
        return {
            result: sum(n for scheme, n in schemes.items() if result in method.uses(scheme))
            for method in methods
            for result in method.results
        }

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the scales and offsets of the cache."""
        scales = (item for item in self.items if isinstance(item, CacheScale))
        return sum(item.outputs[0].spec.nbytes for item in scales)

    @property
    def quantized_modules(self) -> int:
        """Number of quantized modules."""
        return sum(line.modules for line in self.rules if line.scheme != "keep")


def quantized_items(plan: Plan) -> list[Quantize]:
    """Everything that the plan quantizes."""
    return [item for item in plan.items if isinstance(item, Quantize)]
