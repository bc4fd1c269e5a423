"""A quantized checkpoint and another format -> what to write, planned from headers: no new rounding."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.detect import of_cache
from quantcli.checkpoint.files import MANIFEST, SOURCE_RECIPE
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.manifest import read_manifest
from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import read_span, read_tensor
from quantcli.core.errors import InputError
from quantcli.core.numerics import Module
from quantcli.core.text import count
from quantcli.planning.card.card import with_card
from quantcli.planning.card.making import packing
from quantcli.planning.items import cache_items, planned_outputs
from quantcli.planning.matching import family_of, must_be_taken, raise_first
from quantcli.planning.measured import Measured
from quantcli.planning.plan import (
    CacheScale,
    Copy,
    Item,
    PlannedCache,
    Repack,
    Shard,
    Work,
    as_planned,
    make_shards,
)
from quantcli.planning.recode import WORDS, moved_scales, recode
from quantcli.targets.base import (
    ScalePart,
    StoredCheckpoint,
    Target,
    must_be_readable,
    must_be_sound,
    quantization_of,
    target_of,
)
from quantcli.targets.layouts import Output, StoredModule


@dataclass(frozen=True)
class Packed:
    """Modules of one kind, for the plan's table. Sizes in bytes of weights."""

    before: str  # the engine's name in the format that they are in
    label: str  # and in the one that they go to
    modules: int
    nbytes_before: int
    nbytes_after: int
    loads_on: str


@dataclass(frozen=True)
class Repacking(Work):
    """The same numbers in another format."""

    origin: Target
    lines: tuple[Packed, ...]
    floats: int  # tensors that are copied
    state: str  # "lossless", or what is not

    def manifest(self) -> dict[str, Any]:
        """The manifest without its files; `state` says whether a number was rounded."""
        head = super().manifest()
        first = {key: head.pop(key) for key in ("manifest_version", "tool", "plan")}
        source = {**head.pop("source"), "target": self.origin.name}
        return {**first, "state": self.state, "source": source, **head}


def plan_repacking(checkpoint: Checkpoint, target: Target) -> Repacking:
    """Plan it from headers, config.json and what modules have once.

    InputError for a float model, a format that is not known, damage, and what `target` cannot hold.
    """
    origin = _origin(checkpoint, target)
    stored = origin.open_stored(checkpoint)
    must_be_readable(stored)
    must_be_sound(stored)
    if not stored.modules:
        raise InputError(
            f"no module of this {origin.name} checkpoint is quantized",
            where=str(checkpoint.path),
            fix="there is nothing to pack",
        )
    for module in stored.modules.values():
        _must_have_label(module, origin, target)
    cache = _cache_of(stored, target)
    must_be_taken(checkpoint, target)
    modules = list(_modules(checkpoint, stored))
    raise_first(target.check_family(modules, family_of(checkpoint)), {})
    raise_first(target.check(modules), {})
    shards = _shards(repack_items(checkpoint, stored, origin, target), checkpoint)
    recipe = _recipe(checkpoint)
    output = as_planned(
        checkpoint, modules, shards, stored.serving_dtype, cache.cache if cache else None
    )
    sidecars = dict(target.sidecars(output))
    if recipe is not None:
        sidecars[SOURCE_RECIPE] = recipe.encode()
    items = [item for shard in shards for item in shard.items]
    last_bits = tuple(_last_bits(items, target))
    plain = sum(i.source.spec.numel for i in items if isinstance(i, Copy))
    coded = sum(math.prod(i.module.shape) for i in items if isinstance(i, Repack))
    plan = Repacking(
        checkpoint=checkpoint,
        target=target,
        shards=shards,
        sidecars=sidecars,
        serving_dtype=stored.serving_dtype,
        recipe_text=recipe,
        notes=(
            *checkpoint.notes,
            *target.advise(modules, checkpoint.config.text("model_type") or ""),
            *_to_be_checked(items, target),
            *filter(None, [target.cache_note(cache.cache) if cache else None]),
            *last_bits,
        ),
        params=plain + coded,
        quantized_params=coded,
        cache=cache,
        origin=origin,
        lines=tuple(_lines(items, target)),
        floats=sum(isinstance(item, Copy) for item in items),
        state="lossless but for the last bits of global scales" if last_bits else "lossless",
    )
    return with_card(plan, packing(plan))


def _origin(checkpoint: Checkpoint, target: Target) -> Target:
    quantized = quantization_of(checkpoint)
    if quantized is None:
        raise InputError(
            "this is a float model: there are no codes to pack",
            where=str(checkpoint.path),
            fix=f"`quantcli quantize` makes {target.article} checkpoint of it",
        )
    origin = target_of(checkpoint)
    if origin is None:
        raise InputError(
            f"no format that can be packed: {quantized.format}",
            where=f"{checkpoint.path}, {quantized.evidence}",
            fix="`quantcli quantize` can decode some formats, and rounds again",
        )
    if origin.name == target.name:
        what = f"this is {target.article} checkpoint already"
        raise InputError(what, where=str(checkpoint.path), fix="use it as it is")
    return origin


_OF_SCALES = frozenset({"positive", "signed", "divisor", "multiplier"})  # rules for their numbers


def _cache_of(stored: StoredCheckpoint, target: Target) -> PlannedCache | None:
    """The cache of keys and values. InputError if `target` has no place for its scales."""
    names = [name for name in stored.checkpoint.tensors if of_cache(name)]
    source = stored.cache
    kept = {tensor.spec.name for tensor in source.tensors} if source else set[str]()
    other = [name for name in names if name not in kept]
    if not names:
        return None
    if (
        source is None
        or source.cache is None
        or other
        or not source.attention
        or (source.cache not in target.caches)
    ):
        raise InputError(
            f"the cache is quantized, too, and target `{target.name}` has no place for its scales",
            where=f"`{(other or names)[0]}`",
            fix="quantize the float model for the other engine",
        )
    taken = {tensor.part for tensor in target.cache_tensors(source.cache)}
    for part, tensor in ((part, t) for parts in source.layers.values() for part, t in parts.items()):
        if part not in taken and bool(read_tensor(tensor).any()):
            what = f"target `{target.name}` has no offsets of the cache, and this one is not 0"
            raise InputError(what, where=f"`{tensor.spec.name}`", fix="keep the checkpoint as it is")
    return PlannedCache(source.cache, source.attention, measured=False)


def _must_have_label(module: StoredModule, origin: Target, target: Target) -> None:
    """InputError if `target` has no label for the numerics of a module."""
    if module.numerics is None or module.numerics.transform is not None:
        raise InputError(
            f"{module.layout.label} exists in {origin.name} alone: no other format has these numerics",
            where=f"`{module.name}`",
            fix="quantize the float model with a scheme that both have: `quantcli inspect --support`",
        )
    try:
        target.label(module.numerics)
    except InputError as error:
        raise InputError(
            error.what, where=f"`{module.name}` ({module.layout.label})", fix=error.fix
        ) from None


def _modules(checkpoint: Checkpoint, stored: StoredCheckpoint) -> Iterator[Module]:
    """Every module with a weight, as a target sees it, in the order of the files."""
    codes = {module.codes.spec.name: module for module in stored.modules.values()}
    parts = {t.spec.name for module in stored.modules.values() for t in module.tensors.values()}
    for name, tensor in checkpoint.tensors.items():
        if name in codes:
            yield Module(codes[name].name, codes[name].shape, codes[name].numerics)
        elif name.endswith(".weight") and name not in parts:
            yield Module(name.removesuffix(".weight"), tensor.spec.shape, None)


def _shards(items: Iterator[Item], checkpoint: Checkpoint) -> tuple[Shard, ...]:
    """The source's own files: what is in one of them stays together, under its name."""
    by_file: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_file[item.source.file.name].append(item)
    files = [name for name in checkpoint.shards if name in by_file]
    names = dict(zip(files, files, strict=True))
    if len(files) < len(checkpoint.shards):  # one held nothing but scales of modules in others
        names = {f: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, f in enumerate(files, 1)}
    return make_shards((names[file], by_file[file]) for file in files)


def _to_be_checked(items: list[Item], target: Target) -> Iterator[str]:
    """Notes on scales whose values headers do not show: `target` must hold each as it is."""
    scales: tuple[ScalePart, ...] = ("weight_scale", "input_scale")
    narrow: dict[str, None] = {}
    for numerics, serving, origin in {
        (item.numerics, item.module.serving_dtype, item.origin)
        for item in items
        if isinstance(item, Repack)
    }:
        static = numerics.input is not None and not numerics.input.dynamic
        for part in scales[: 1 + static]:
            kind = target.engine_dtype(numerics, part, serving)
            if kind != "F32" and kind != origin.engine_dtype(numerics, part, serving):
                narrow[f"{part} must fit {WORDS[kind]} as it is, which is checked while writing"] = None
    yield from sorted(narrow)


def _last_bits(items: list[Item], target: Target) -> Iterator[str]:
    """A note on global scales whose last bit changes, as `target` stores their reciprocals."""
    moved: dict[str, list[str]] = defaultdict(list)
    for item in items:
        if isinstance(item, Repack) and item.numerics.weight.global_scale:
            module = item.module
            stored = {p.suffix: read_tensor(module.tensors[p.suffix]) for p in module.constants}
            stored |= {p.suffix: read_span(module.tensors[p.suffix], 0, 0) for p in module.row_params}
            parts = item.origin.unpack(item.numerics, stored)
            for name in moved_scales(item.numerics, parts, target):
                moved[name].append(module.name)
    for name, modules in moved.items():
        yield (
            f"{name} of {count(modules, 'module')}, such as `{modules[0]}`, is not 1 / x for any "
            f"float32 x, and {target.name} stores x: engines will multiply with the number next to it, "
            "2^-23 from it at most"
        )


def _lines(items: list[Item], target: Target) -> Iterator[Packed]:
    """The modules by kind, with the labels of both formats."""
    kinds: dict[tuple[str, str], list[Repack]] = defaultdict(list)
    for item in items:
        if isinstance(item, Repack):
            kinds[item.module.layout.label, target.label(item.numerics)].append(item)
    for (before, label), group_items in kinds.items():
        yield Packed(
            before,
            label,
            len(group_items),
            sum(t.spec.nbytes for i in group_items for s, t in i.module.tensors.items() if s != "bias"),
            sum(out.spec.nbytes for item in group_items for out in item.outputs),
            target.loads_on(label),
        )


def _recipe(checkpoint: Checkpoint) -> str | None:
    """The recipe of the source, if quantcli made it."""
    if not (checkpoint.path / MANIFEST).is_file():
        return None
    recipe = read_manifest(checkpoint.path).get("recipe")
    return recipe if isinstance(recipe, str) else None


def repack_items(
    checkpoint: Checkpoint, stored: StoredCheckpoint, origin: Target, target: Target
) -> Iterator[Item]:
    """One item per module and per other tensor, in the order of the files."""
    codes = {module.codes.spec.name: module for module in stored.modules.values()}
    owner = {
        tensor.spec.name: (module, suffix)
        for module in stored.modules.values()
        for suffix, tensor in module.tensors.items()
    }
    cache: dict[Any, tuple[Output, ...]] = {}
    scales: dict[str, CacheScale | None] = {}
    if stored.cache is not None and (planned := _cache_of(stored, target)) is not None:
        scales = {tensor.spec.name: None for tensor in stored.cache.tensors}
        for item in cache_items(planned, target, Measured(), stored.cache):
            scales[stored.cache.layers[item.layer][item.part].spec.name] = item
    for name, tensor in checkpoint.tensors.items():
        if name in scales:
            if (scale := scales[name]) is not None:
                yield scale
        elif name in codes:
            yield _repack(codes[name], tensor, origin, target, cache)
        elif name not in owner:
            yield Copy(tensor)
        elif owner[name][1] == "bias":
            module = owner[name][0]
            assert module.numerics is not None
            dtype = target.bias_dtype(module.numerics)
            yield Copy(tensor, None, None if dtype == tensor.spec.dtype else dtype)


def _repack(
    module: StoredModule, codes: StoredTensor, origin: Target, target: Target, cache: dict[Any, Any]
) -> Repack:
    """The item of a module, from packing blocks that hold nothing; modules of one kind once."""
    assert module.numerics is not None
    multiple = math.lcm(module.layout.row_multiple, target.layout(module.numerics).row_multiple)
    bias = module.tensors.get("bias")
    item = Repack(codes, module, origin, (), row_multiple=multiple, bias=bias)
    kinds = tuple((s, t.spec.dtype, t.spec.shape) for s, t in sorted(module.tensors.items()))
    key = (module.layout.label, module.name.rpartition(".")[2], module.numerics, kinds)
    if key not in cache:
        cache[key] = _dry_run(item, target)
    return replace(item, outputs=tuple(output.of(module.name) for output in cache[key]))


def _dry_run(item: Repack, target: Target) -> tuple[Output, ...]:
    """The tensors by suffix."""

    def packed(rows: int) -> dict[str, Tensor]:
        """Pack codes that are all 0 with scales that are all 1."""
        module, stored = item.module, {}
        for param in (*module.row_params, *module.constants):
            spec = module.tensors[param.suffix].spec
            sides = list(spec.shape)
            if param.rows:
                sides[param.axis] = -(-rows // param.rows)
            shape = tuple(sides)
            dtype = torch_dtype(spec.dtype)
            if param.suffix == "weight_shape":
                stored[param.suffix] = torch.tensor(module.shape, dtype=dtype)
            elif param.suffix == "deq_scale" and dtype == torch.int64:  # bits of a float32
                stored[param.suffix] = torch.ones(shape).view(torch.int32).to(dtype)
            else:
                value = float(param.values in _OF_SCALES or param.suffix == "deq_scale")
                stored[param.suffix] = torch.full(shape, value).to(dtype)
        return recode(item, target, stored, 0, None)

    module = item.module
    return planned_outputs(
        packed, target, item.numerics, item.source.spec.name, module.shape, item.row_multiple
    )
