"""Recipe x headers -> Plan, by quantizing blocks that have no rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from quantcli.checkpoint.checkpoint import BELOW, Checkpoint
from quantcli.checkpoint.detect import must_run_alone
from quantcli.checkpoint.files import RECIPE_FILE
from quantcli.checkpoint.spec import FLOAT_NAMES, FLOATS
from quantcli.core.text import count
from quantcli.planning.card.card import with_card
from quantcli.planning.card.making import conversion
from quantcli.planning.items import cache_items, make_items, plan_cache
from quantcli.planning.matching import match
from quantcli.planning.measured import Measured
from quantcli.planning.plan import (
    CacheScale,
    Item,
    Plan,
    Quantize,
    Shard,
    as_planned,
    make_shards,
)
from quantcli.planning.tables import tables
from quantcli.recipe.recipe import Recipe, compare
from quantcli.sources.decode import decoded
from quantcli.targets.sidecars import declared_dtype
from quantcli.targets.vllm_classes import without_class
from quantcli.targets.vllm_family import EXPERT

# Formats of sources whose weights are e2m1 numbers times powers of two.
_OF_POWERS = re.compile(r"mxfp4(?!_flatquant)|w4a8_mxfp\b", re.IGNORECASE)


def make_plan(recipe: Recipe, checkpoint: Checkpoint, measured: Measured | None = None) -> Plan:
    """Plan the conversion from headers and from the results of calibration.

    Without `measured`, modules whose schemes need it are listed in the plan's `needs_data`. InputError
    for output that the engine could not load, and for a recipe that does not fit the model.
    """
    checkpoint = decoded(checkpoint)
    target = recipe.target
    serving, notes = serving_dtype(checkpoint, target.served_in)
    matched = match(recipe, checkpoint, measured)
    notes += matched.notes
    checkpoint, cache, source_scales, more = plan_cache(recipe, checkpoint, matched)
    notes += more
    items = make_items(checkpoint, matched, target, serving, measured or Measured())
    scales: list[CacheScale] = []
    if cache is not None:
        scales = list(cache_items(cache, target, measured or Measured(), source_scales))
    schemes = {name: rule.scheme for name, rule in matched.rules.items() if rule and rule.scheme}
    with_data = {id(s) for s in {id(s): s for s in schemes.values()}.values() if s.needs_data}
    need = {name for name, scheme in schemes.items() if id(scheme) in with_data}
    shards = _shards([*items, *scales], recipe.file.max_shard)
    output = as_planned(checkpoint, matched.modules, shards, serving, cache.cache if cache else None)
    basis = measured.basis if measured else None
    text = recipe.effective(basis.text if basis else None)
    own = {RECIPE_FILE: text.encode()}
    sidecars = {**checkpoint.plain_config(), **target.sidecars(output), **own}
    calibrates = bool(need or recipe.methods)
    if calibrates:
        must_run_alone(checkpoint)
    if not calibrates and recipe.file.calibration is not None:
        why = "no scheme of this recipe measures data"
        notes.append(f"the recipe's `calibration` block has no effect: {why}")
    block = recipe.file.calibration
    if calibrates and block and block.all_tokens and not any(map(EXPERT.fullmatch, matched.rules)):
        notes.append("calibration.all_tokens has no effect: the model has no experts")
    if calibrates and recipe.calibrates_on_sample():
        notes.append(
            "the calibration text is the sample that comes with quantcli, for a trial only: set "
            "calibration.data to text of the kind that the model will see"
        )
    quantized = any(module.numerics for module in matched.modules)
    if not quantized:
        alone = ", and only the cache of keys and values is quantized" if cache else ""
        notes.append(f"nothing is quantized: every weight stays float{alone}")
    notes += _exact(items)
    left_out = checkpoint.left_out.items()
    notes += [f"dropped `{name}`: {why}" for name, why in left_out if not why.startswith(BELOW)]
    lines, kept, coverage = tables(recipe, checkpoint, items, matched)
    plan = Plan(
        checkpoint=checkpoint,
        target=target,
        recipe=recipe,
        siblings=matched.siblings,
        shards=shards,
        sidecars=sidecars,
        serving_dtype=serving,
        recipe_text=text,
        rules=lines,
        kept=kept,
        coverage=coverage,
        notes=(
            *checkpoint.notes,
            *notes,
            *filter(None, [without_class(checkpoint.config) if quantized else None]),
            *target.advise(matched.modules, checkpoint.config.text("model_type") or ""),
        ),
        params=sum(spec.numel for spec in checkpoint.specs()),
        quantized_params=sum(i.source.spec.numel for i in items if isinstance(i, Quantize)),
        measured=tuple(sorted(need)),
        needs_data=tuple(
            i.module for i in items if isinstance(i, Quantize) and i.module in need and not i.stats
        )
        + tuple(dict.fromkeys(scale.layer for scale in scales if not scale.ready)),
        edited=measured.edited if measured else {},
        taken_from=measured.taken_from if measured else {},
        experts=measured.experts if measured else {},
        basis=basis,
        cache=cache,
    )
    if recipe.file.card is False:
        return plan
    return with_card(plan, conversion(plan), recipe.file.base_model)


def _exact(items: Sequence[Item]) -> Iterator[str]:
    """A note on weights of four-bit floats with powers of two as scales, stored with e4m3 scales."""
    exact = [
        item.module
        for item in items
        if isinstance(item, Quantize)
        and item.scheme.numerics.weight.global_scale
        and item.scheme.searches_scales
        and not item.edit
        and _OF_POWERS.search(item.source.kind)
    ]
    if exact:
        modules = count(exact, "module")
        yield (
            f"{modules} such as `{exact[0]}` {'is' if len(exact) == 1 else 'are'} MXFP4: no value "
            "changes, unless scales of a weight and its siblings differ by more than a factor of 2^17"
        )


def serving_dtype(checkpoint: Checkpoint, only: str | None = None) -> tuple[str, list[str]]:
    """The dtype that the engine will compute in, and notes about it. only: the one that it has.

    Engines take it from config.json. Float32 is not served on the accelerators that this is for, so
    float32 models are served as bfloat16, which has the same range, and config.json says so.
    """
    declared = declared_dtype(checkpoint.config)
    sizes = Counter[str]()
    for tensor in checkpoint.tensors.values():
        spec = tensor.parts[0].spec  # what is decoded or rotated is float32
        if spec.dtype in FLOATS and (not tensor.kind or checkpoint.rotation is not None):
            sizes[spec.dtype] += tensor.nbytes
    stored = max(sizes, key=lambda dtype: sizes[dtype], default="BF16")
    dtype = declared or stored
    if only is not None and dtype != only:
        name = next(name for name, short in FLOAT_NAMES.items() if short == only)
        note = (
            f"the engine serves in {name} alone, and config.json will say so: float weights are rounded"
        )
        return only, [f"{note} to it as they are loaded"]
    if dtype == "F32":
        return "BF16", ["the model is float32; it will be served in bfloat16, and config.json says so"]
    if declared is None:
        return dtype, [f"config.json names no dtype; it will say {dtype}, as the weights are"]
    if stored != declared:
        return dtype, [f"weights are {stored}, config.json says {dtype}: served in {dtype}"]
    return dtype, []


def _shards(items: Iterable[Item], max_shard: int) -> tuple[Shard, ...]:
    """Fill files in source order up to `max_shard` bytes; the tensors of one item stay together."""
    bins: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        nbytes = sum(out.spec.nbytes for out in item.outputs)
        if bins[-1] and filled + nbytes > max_shard:
            bins.append([])
            filled = 0
        bins[-1].append(item)
        filled += nbytes
    return make_shards(
        (f"model-{number:05d}-of-{len(bins):05d}.safetensors", bin_)
        for number, bin_ in enumerate(bins, start=1)
    )


@dataclass(frozen=True)
class Expected:
    """A limit of the recipe's `expect` block, such as `>= 90`, and the plan's value."""

    key: str
    limit: str
    value: float
    ok: bool


def compare_expected(plan: Plan) -> list[Expected]:
    """The plan's values next to the limits of the recipe's `expect` block, in its order."""
    values = {
        "quantized_params_pct": plan.quantized_params_pct,
        "quantizable_pct": plan.coverage.quantizable_pct,
        "quantized_modules": plan.quantized_modules,
        "bits_per_param": 8 * plan.weight_nbytes / plan.params if plan.params else 0.0,
        "output_gib": plan.weight_nbytes / 2**30,
    }
    return [
        Expected(key, limit, values[key], compare(limit, values[key]))
        for key, limit in plan.recipe.file.expect
        if limit is not None
    ]
