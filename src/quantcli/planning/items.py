"""The items of a plan, one for each tensor of the source, from quantizing blocks that have no rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.detect import of_cache
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS, TensorSpec, safetensors_dtype, torch_dtype
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError
from quantcli.core.kernels.machine import shapes_only
from quantcli.core.numerics import LATENTS, Cache, Numerics
from quantcli.core.text import count
from quantcli.planning.matching import Matched
from quantcli.planning.measured import Edit, Measured
from quantcli.planning.plan import (
    NOTHING_MEASURED,
    CacheScale,
    Copy,
    EngineDtypes,
    Item,
    PlannedCache,
    Quantize,
)
from quantcli.planning.siblings import Siblings
from quantcli.recipe.recipe import PLAIN, Recipe, Rule
from quantcli.schemes.base import Scheme
from quantcli.sources.expert_stack import ExpertMatrix
from quantcli.sources.stacked import layout_of
from quantcli.targets.base import Target, target_of
from quantcli.targets.kv_cache import (
    LATENT,
    AttentionLayer,
    StoredCache,
    attention_layers,
    part_of,
    stored_cache,
)
from quantcli.targets.layouts import Output, Param, Sides
from quantcli.targets.stored_format import some


@dataclass(frozen=True)
class Outcome:
    """The outcome of a dry run: the tensors that a weight is quantized into."""

    engine_dtypes: EngineDtypes
    outputs: tuple[Output, ...]  # named by suffix ("weight", "weight_scale")
    stats: Mapping[str, TensorSpec]  # that the scheme needs; empty for schemes that need no data
    row_multiple: int


def dry_run(
    scheme: Scheme,
    target: Target,
    spec: TensorSpec,
    serving_dtype: str,
    bias: TensorSpec | None = None,
) -> Outcome:
    """Quantize and pack a weight without data, as a block of no rows, and return what it becomes.

    Statistics are those of an observer that saw no input. InputError if the target cannot store these
    numerics, and for a bias of another dtype or length. A block of no rows, or of a few zeros if rows
    share a scale, runs the real schemes and needs no memory. The meta device would do as well, but in
    torch 2.13 its binary operations import torch._dynamo, which costs two seconds and 80 MB.
    """
    engine_dtypes = EngineDtypes(
        target.engine_dtype(scheme.numerics, "weight_scale", serving_dtype),
        target.engine_dtype(scheme.numerics, "input_scale", serving_dtype),
    )
    input_dtype = torch_dtype(engine_dtypes.input_scale)
    n, k = spec.shape
    stats = scheme.blank(k, input_dtype)
    if bias:
        _check_bias(bias, spec)
    shared = {name: tensor for name, tensor in stats.items() if name not in scheme.row_stats}
    constants = scheme.constants(shared, input_dtype)
    if scheme.needs_weight_amax:
        constants["weight_amax"] = torch.zeros(1)
    if scheme.needs_column_amax:
        constants["column_amax"] = torch.zeros(k)

    def packed(rows: int) -> dict[str, Tensor]:
        row_stats = {
            name: torch.zeros((rows, *tensor.shape[1:]), dtype=tensor.dtype)
            for name, tensor in stats.items()
            if name in scheme.row_stats
        }
        parts = scheme.quantize(
            torch.zeros((rows, k), dtype=torch_dtype(spec.dtype)),
            torch_dtype(engine_dtypes.weight_scale),
            {**constants, **row_stats},
            torch.zeros(rows, dtype=torch_dtype(bias.dtype)) if stats and bias else None,
        )
        for part in ("weight", "weight_scale"):
            if not isinstance(parts, Mapping) or not isinstance(parts.get(part), Tensor):
                raise InputError(
                    f"scheme `{scheme.name}` gives no tensor `{part}`",
                    where=f"`{spec.name}`",
                    fix="use another scheme, or mend this one",
                )
        parts["weight_scale"] = parts["weight_scale"].to(torch_dtype(engine_dtypes.weight_scale))
        module = spec.name.removesuffix(".weight")
        return target.pack_module(module, scheme.numerics, parts, (n, k))

    multiple = math.lcm(scheme.row_multiple, target.layout(scheme.numerics).row_multiple)
    with shapes_only():
        outputs = planned_outputs(packed, target, scheme.numerics, spec.name, (n, k), multiple)
    specs = {
        name: TensorSpec(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        for name, tensor in stats.items()
    }
    for name in specs.keys() & scheme.row_stats:
        specs[name] = replace(specs[name], shape=(n, *specs[name].shape[1:]))
    return Outcome(engine_dtypes, outputs, specs, multiple)


class _Undeclared(Exception):
    """Raised for a tensor that is packed and not declared so; the text says which."""


def planned_outputs(
    packed: Callable[[int], Mapping[str, Tensor]],
    target: Target,
    numerics: Numerics,
    weight: str,
    sides: Sides,
    multiple: int,
) -> tuple[Output, ...]:
    """The tensors of a packed weight, named by suffix, each with its place for every row.

    packed: what `target.pack` gives for a number of rows, of any values; called with 0 and `multiple`.
    weight: its name. sides: n and k. InputError for a tensor of another name, dtype or shape than
    `target.layout` declares, or with rows along another dimension.
    """
    params = {param.suffix: param for param in target.layout(numerics).params}
    outputs: list[Output] = []
    try:
        for rows in (0, multiple):
            tensors = packed(rows)
            for suffix in params:
                if params[suffix].required and suffix not in tensors:
                    given = ", ".join(tensors) or "nothing"
                    raise _Undeclared(f"`{suffix}` is declared, and pack gives {given}")
            outputs = [
                _planned(suffix, tensor, params.get(suffix), rows, sides)
                for suffix, tensor in tensors.items()
            ]
    except _Undeclared as error:
        raise InputError(
            f"target `{target.name}` packs other tensors than its layout declares: {error}",
            where=f"`{weight}`",
            fix="use another target, or mend this one",
        ) from None
    return tuple(outputs)


def _planned(suffix: str, tensor: Tensor, param: Param | None, rows: int, sides: Sides) -> Output:
    """One tensor that was packed of `rows` rows, as that of the whole weight. Raises _Undeclared."""
    n, k = sides
    if not isinstance(tensor, Tensor):
        raise _Undeclared(f"`{suffix}` is not a tensor")
    spec = TensorSpec(suffix, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
    given = f"pack gives {spec} for {rows} rows of {k} columns"
    if param is None:
        raise _Undeclared(f"no `{suffix}` is declared; {given}")
    if spec.dtype not in param.dtypes:
        raise _Undeclared(f"`{suffix}` is declared {' or '.join(param.dtypes)}; {given}")
    if not param.rows:
        if not param.fits(spec.shape, n, k):
            raise _Undeclared(f"`{suffix}` is declared {list(param.shape(n, k))}; {given}")
        return Output(spec, rows=0)
    axis, shape = param.axis, list(spec.shape)
    if axis >= len(shape) or axis > 1 or (axis == 1 and len(shape) != 2):
        raise _Undeclared(f"`{suffix}` is declared with rows along dimension {axis}; {given}")
    if shape[axis] != -(-rows // param.rows) or not param.fits(spec.shape, rows, k):
        along = f"an element along dimension {axis} for {param.rows} rows"
        raise _Undeclared(f"`{suffix}` is declared {list(param.shape(rows, k))}, {along}; {given}")
    shape[axis] = -(-n // param.rows)
    if not param.fits(tuple(shape), n, k):
        declared = f"declared {list(param.shape(n, k))} for {n} rows"
        raise _Undeclared(f"`{suffix}` is {declared}, an element for {param.rows} rows; {given}")
    return Output(TensorSpec(suffix, spec.dtype, tuple(shape)), axis, param.rows)


def make_items(
    checkpoint: Checkpoint, matched: Matched, target: Target, serving_dtype: str, measured: Measured
) -> list[Item]:
    """The items of a plan, in the order of the source: each tensor on disk is consumed exactly once.

    InputError for statistics that a scheme lacks, and for siblings with different ones.
    """
    items = list(_items(checkpoint, matched, target, serving_dtype, measured))
    _check_siblings(items, matched.siblings)
    return items


def _items(
    checkpoint: Checkpoint, matched: Matched, target: Target, serving_dtype: str, measured: Measured
) -> Iterator[Item]:
    assigned, siblings = matched.rules, matched.siblings
    # by rule, last part of the name, dtypes and shapes: experts come in tens of thousands of equal ones
    outcomes: dict[tuple[Any, ...], Outcome] = {}
    amax_groups = _amax_groups(checkpoint, assigned, siblings, measured)
    copies = _copies(checkpoint, assigned, target, serving_dtype, measured)
    for name, stored in checkpoint.tensors.items():
        if name in copies:
            copy = copies[name]
            if copy is not None:
                yield copy
            continue
        module = name.removesuffix(".weight")
        rule = assigned[module]
        assert rule is not None
        assert rule.scheme is not None
        scheme, spec = rule.scheme, stored.spec
        bias = checkpoint.tensors.get(f"{module}.bias")
        added = bias.spec if bias else None
        also = (added.dtype, added.shape) if added else ("", ())
        key = (rule.key, module.rpartition(".")[2], spec.dtype, spec.shape, *also)
        if key not in outcomes:
            outcomes[key] = dry_run(scheme, target, spec, serving_dtype, added)
        outcome = outcomes[key]
        outputs = tuple(output.of(module) for output in outcome.outputs)
        surveyed = amax_groups.get(siblings.group(module) or module, ())
        if scheme.needs_column_amax:
            surveyed = ((stored, measured.edit_of(stored)),)
        stats = measured.stats_of(module, outcome.stats, rule.where) or NOTHING_MEASURED
        yield Quantize(
            stored,
            module,
            scheme,
            rule.where,
            outcome.engine_dtypes,
            outputs,
            bias if outcome.stats else None,
            stats,
            measured.edit_of(stored),
            measured.edit_of(bias) if outcome.stats and bias else None,
            outcome.row_multiple,
            surveyed,
        )


def _copies(
    checkpoint: Checkpoint,
    assigned: dict[str, Rule | None],
    target: Target,
    serving_dtype: str,
    measured: Measured,
) -> dict[str, Copy | None]:
    """An item for each source tensor that is not quantized, by its name.

    A stack of experts that all stay as they are is copied as it is on disk, with the first of its
    matrices, if the family's engine takes it so; None for the others.
    """
    biases = {
        f"{module}.bias": target.bias_dtype(rule.scheme.numerics)
        for module, rule in assigned.items()
        if rule and rule.scheme and f"{module}.bias" in checkpoint.tensors
    }
    plain = {
        f"{module}.{suffix}"
        for module, rule in assigned.items()
        if rule and rule.keyword == PLAIN
        for suffix in ("weight", "bias")
    }
    copies: dict[str, Copy | None] = {}
    stacks: dict[str, list[ExpertMatrix]] = defaultdict(list)
    for name, stored in checkpoint.tensors.items():
        if isinstance(stored, ExpertMatrix):
            stacks[stored.stack.spec.name].append(stored)
        rule = assigned.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if rule is None or rule.scheme is None:
            dtype = biases.get(name)
            if stored.kind or (name in plain and stored.spec.dtype in FLOATS):
                dtype = serving_dtype
            same = dtype == stored.spec.dtype
            copies[name] = Copy(stored, measured.edit_of(stored), None if same else dtype)
    whole = {
        name: matrices
        for name, matrices in stacks.items()
        if len({_same_copy(copies.get(matrix.spec.name), matrix) for matrix in matrices}) == 1
        and _same_copy(copies.get(matrices[0].spec.name), matrices[0])[0]
    }
    layout = layout_of(checkpoint)
    if layout and (layout.copies == "none" or (layout.copies == "all" and len(whole) < len(stacks))):
        return copies
    for matrices in whole.values():
        copy = copies[matrices[0].spec.name]
        assert copy is not None
        copies |= dict.fromkeys((matrix.spec.name for matrix in matrices), None)
        copies[matrices[0].spec.name] = Copy(matrices[0].stack, None, copy.dtype)
    if layout and layout.copies == "only":
        _must_be_stacks(copies)
    return copies


def _must_be_stacks(copies: Mapping[str, Copy | None]) -> None:
    """InputError for a float expert that would be written by itself."""
    for name, copy in copies.items():
        if copy is not None and isinstance(copy.source, ExpertMatrix):
            raise InputError(
                "a method changes this float expert, or a rule stores it apart from others of its "
                "layer, and the engine takes float experts of this family as stacks alone",
                where=f"`{name}`",
                fix="leave experts out of the recipe's methods, and keep all of a layer alike",
            )


def _same_copy(copy: Copy | None, matrix: ExpertMatrix) -> tuple[bool, str | None]:
    """Whether a matrix is copied without an edit, and the dtype to store it in."""
    return copy is not None and copy.edit is None, copy.dtype if copy else None


def _amax_groups(
    checkpoint: Checkpoint, assigned: dict[str, Rule | None], siblings: Siblings, measured: Measured
) -> dict[str, tuple[tuple[StoredTensor, Edit | None], ...]]:
    """The weights that share a scale, by the name of their group."""
    groups: dict[str, list[tuple[StoredTensor, Edit | None]]] = defaultdict(list)
    for module, rule in assigned.items():
        if rule and rule.scheme and rule.scheme.needs_weight_amax:
            stored = checkpoint.tensors[f"{module}.weight"]
            groups[siblings.group(module) or module].append((stored, measured.edit_of(stored)))
    return {name: tuple(entries) for name, entries in groups.items()}


def _check_bias(bias: TensorSpec, weight: TensorSpec) -> None:
    if bias.dtype not in FLOATS or bias.shape != weight.shape[:1]:
        raise InputError(
            f"bias is {bias}; it must be float, one value for each of {weight.shape[0]} rows",
            where=f"`{bias.name}`",
            fix="put a rule with `scheme: keep` for the module before the others",
        )


def _check_siblings(items: Iterable[Item], siblings: Siblings) -> None:
    """InputError if siblings, of which the engine keeps one input range, were measured differently."""
    first: dict[str, tuple[str, bytes]] = {}
    for item in items:
        if isinstance(item, Quantize) and item.stats and (name := siblings.group(item.module)):
            content = item.measured(shared=True)
            other, expected = first.setdefault(name, (item.module, content))
            if content != expected:
                raise InputError(
                    f"this module and `{other}` share what is measured of their inputs, and it differs",
                    where=f"`{item.module}`",
                    fix="calibrate again; if they still differ, use a scheme that needs no data",
                )


# -- the cache of keys and values ------------------------------------------------------------------


def plan_cache(
    recipe: Recipe, checkpoint: Checkpoint, matched: Matched
) -> tuple[Checkpoint, PlannedCache | None, StoredCache | None, list[str]]:
    """The checkpoint without scales of a cache, the cache of the output, those scales, and notes.

    Scales of the source are taken over if the recipe measures none and the target has a place for them.
    InputError for a cache that the target's engine does not have, or whose scales would be incomplete.
    """
    names = [name for name in checkpoint.on_disk if of_cache(name)]
    if target_of(checkpoint) is None and all(name in checkpoint.tensors for name in names):
        names = []  # of a float model, whatever they are
    source = stored_cache({name: checkpoint.on_disk[name] for name in names})
    if names:
        kept = {name: t for name, t in checkpoint.tensors.items() if name not in names}
        checkpoint = replace(checkpoint, tensors=kept, undecoded=checkpoint.on_disk)
    where = recipe.where("kv_cache")
    if recipe.cache is not None:
        try:
            cache, layers = _cached_layers(recipe.cache, recipe.target, checkpoint, matched)
        except InputError as error:
            raise InputError(error.what, where=error.where or where, fix=error.fix) from None
        notes = [note] if (note := recipe.target.cache_note(cache)) else []
        if "mtp" in matched.roles.values():
            then = "it stays float" if cache == LATENTS else "engines take 1.0 for it"
            notes.append(f"the cache of next-token layers has no scales: {then}")
        if names:
            notes.append(f"scales of the source's cache, such as `{names[0]}`, are measured anew")
        return checkpoint, PlannedCache(cache, layers, measured=True), None, notes
    if not names:
        return checkpoint, None, None, []
    try:
        planned = _taken_over(recipe, checkpoint, matched, source)
    except InputError as error:
        what = (
            f"dropped {count(names, 'scale')} of the cache of keys and values, such as `{names[0]}`: "
        )
        return checkpoint, None, None, [f"{what}{error.what}"]
    note = (
        f"the source's scales of the cache are taken over ({planned.cache}): as they are, not measured"
    )
    notes = [note, *filter(None, [recipe.target.cache_note(planned.cache)])]
    parts = {tensor.part for tensor in recipe.target.cache_tensors(planned.cache)}
    other = [name for name in names if (found := part_of(name)) is None or found[1] not in parts]
    if other:
        notes.append(f"dropped {some(other)}: the target has no place for such tensors of the cache")
    return checkpoint, planned, source, notes


def _cached_layers(
    cache: Cache, target: Target, checkpoint: Checkpoint, matched: Matched
) -> tuple[Cache, dict[str, AttentionLayer]]:
    """The cache, and the layers that have one. InputError for what the engine does not take."""
    target.cache_tensors(cache)
    shapes = {module.name: module.shape for module in matched.modules}
    layers = attention_layers(checkpoint, matched.roles, shapes)
    modules = {module.name: module for module in matched.modules}
    for layer in layers.values():
        if layer.queries:
            if cache.element.family != "int":
                fix = "leave `kv_cache` out: an engine that has such a cache takes 1.0"
                raise InputError(LATENT, where=f"`{layer.name}`", fix=fix)
            cache = LATENTS
        if (fault := target.cache_fault(cache, layer, modules, checkpoint.text_config)) is not None:
            raise InputError(fault.what, where=f"`{layer.name}`", fix=fault.fix)
    return cache, layers


def _taken_over(
    recipe: Recipe, checkpoint: Checkpoint, matched: Matched, source: StoredCache | None
) -> PlannedCache:
    """The cache of the source. InputError, whose text is the reason, if its scales are of no use."""
    fix = "measure them: `kv_cache` in the recipe"
    if source is None or source.cache is None:
        raise InputError("no engine takes scales of this kind", fix=fix)
    if any(method.edited_as for method in recipe.methods):
        raise InputError("methods of the recipe change what is cached", fix=fix)
    cache, layers = _cached_layers(source.cache, recipe.target, checkpoint, matched)
    for layer in layers.values():
        for tensor in recipe.target.cache_tensors(cache):
            stored = source.layers.get(layer.name, {}).get(tensor.part)
            size = math.prod(tensor.shape_of(layer))
            dtypes = {*FLOATS, tensor.dtype}
            if stored is None or stored.spec.numel != size or stored.spec.dtype not in dtypes:
                what = f"`{layer.name}` has no {tensor.part} with {count(size, 'number')}"
                raise InputError(what, fix=fix)
            if tensor.values == "zero" and bool(read_tensor(stored).any()):
                raise InputError(f"`{stored.spec.name}` is not 0", fix=fix)
    return PlannedCache(cache, layers, measured=False)


def cache_items(
    planned: PlannedCache, target: Target, measured: Measured, source: StoredCache | None = None
) -> Iterator[CacheScale]:
    """The tensors of the cache, layer by layer.

    source: the checkpoint's own scales, if they are taken over. Those that are to be measured are not
    ready as long as `measured` has none. InputError for statistics of another shape.
    """
    for layer in planned.layers.values():
        for tensor in target.cache_tensors(planned.cache):
            shape = tensor.shape_of(layer)
            spec = TensorSpec(tensor.name(layer.name), tensor.dtype, shape)
            given: Mapping[Any, StoredTensor] = measured.stats.get(layer.name, {})
            if source is not None:
                given = source.layers[layer.name]
            stored = given.get(tensor.part)
            if stored is None:
                if given:
                    what = f"the statistics of its cache lack {tensor.part}"
                    raise InputError(what, where=f"`{layer.name}`", fix="calibrate again")
                nothing = StoredTensor(spec, Path(), 0)
                yield CacheScale(nothing, layer=layer.name, part=tensor.part, ready=False)
                continue
            if stored.spec.numel != spec.numel:
                what = f"its cache has {stored.spec.numel} numbers as {tensor.part}, not {spec.numel}"
                raise InputError(what, where=f"`{layer.name}`", fix="calibrate again")
            there = StoredTensor(replace(spec, dtype=stored.spec.dtype), stored.file, stored.offset)
            dtype = None if stored.spec.dtype == spec.dtype else spec.dtype
            yield CacheScale(there, None, dtype, layer.name, tensor.part)
