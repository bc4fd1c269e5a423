"""Recipe x headers -> Plan, by quantizing blocks that have no rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from quantcli.checkpoint.checkpoint import BELOW, Checkpoint
from quantcli.checkpoint.files import RECIPE_FILE
from quantcli.checkpoint.inspection import fold
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.errors import AnswerNo, InputError
from quantcli.core.numerics import Module, Numerics
from quantcli.planning.items import check_siblings, make_items
from quantcli.planning.matching import assign, served, without_data
from quantcli.planning.measured import Measured
from quantcli.planning.plan import (
    Copy,
    Item,
    Kept,
    Plan,
    Quantize,
    RuleLine,
    Shard,
    as_planned,
    make_shards,
)
from quantcli.planning.siblings import siblings_of
from quantcli.recipe.methods import methods_for
from quantcli.recipe.recipe import Recipe, Rule, compare
from quantcli.sources.decode import decoded
from quantcli.sources.stacked import ExpertMatrix, layout_of
from quantcli.targets.base import Refusal, Target, others_that_store
from quantcli.targets.sidecars import declared_dtype
from quantcli.targets.vllm_family import EXPERT


def make_plan(recipe: Recipe, checkpoint: Checkpoint, measured: Measured | None = None) -> Plan:
    """Plan the conversion from headers and from the results of calibration.

    Without `measured`, modules whose schemes need it are listed in the plan's `needs_data`. InputError
    for output that the engine could not load, and for a recipe that does not fit the model.
    """
    checkpoint = decoded(checkpoint)
    serving, notes = serving_dtype(checkpoint)
    target = recipe.target
    source_specs = {stored.spec.name: stored.spec for stored in checkpoint.tensors.values()}
    raise_first(list(target.check((), source_specs)), {})  # before rules that would miss them
    must_take_experts(checkpoint, target)
    assigned = assign(recipe, checkpoint)
    _must_be_stored(assigned, target)
    assigned, instead = served(checkpoint, assigned, target)
    notes += instead
    if measured is not None:
        assigned, more = without_data(recipe, assigned, measured)
        notes += [*more, *_unseen(recipe, assigned, measured)]
    modules = list(_modules(checkpoint, assigned))
    siblings = siblings_of(recipe, assigned)
    raise_first(list(target.check(modules, source_specs)), assigned)
    found = measured or Measured()
    items = list(make_items(checkpoint, assigned, target, serving, found, siblings))
    check_siblings(items, siblings)
    need = {name for name, rule in assigned.items() if rule and rule.scheme and rule.scheme.needs_data}
    shards = _shards(items, recipe.file.max_shard)
    output = as_planned(checkpoint, modules, shards, serving)
    own = {RECIPE_FILE: recipe.effective().encode()}
    sidecars = {**checkpoint.plain_config(), **target.sidecars(output), **own}
    calibrates = bool(need or recipe.methods)
    if not calibrates and recipe.file.calibration is not None:
        why = "no scheme of this recipe measures data"
        notes.append(f"the recipe's `calibration` block has no effect: {why}")
    if calibrates and recipe.calibrates_on_sample():
        notes.append(
            "the calibration text is the sample that comes with quantcli, for a trial only: set "
            "calibration.data to text of the kind that the model will see"
        )
    if recipe.siblings and not siblings.have_effect(assigned):
        notes.append("`siblings` has no effect: the schemes of these modules share nothing")
    if not any(module.numerics for module in modules):
        notes.append("nothing is quantized: every weight stays float")
    left_out = checkpoint.left_out.items()
    notes += [f"dropped `{name}`: {why}" for name, why in left_out if not why.startswith(BELOW)]
    return Plan(
        checkpoint=checkpoint,
        target=target,
        recipe=recipe,
        siblings=siblings,
        shards=shards,
        sidecars=sidecars,
        serving_dtype=serving,
        recipe_text=recipe.effective(),
        rules=tuple(_rule_lines(recipe, items, assigned)),
        kept=tuple(_kept(checkpoint, items, assigned, recipe)),
        notes=(*checkpoint.notes, *notes, *target.advise(modules)),
        params=sum(spec.numel for spec in checkpoint.specs()),
        quantized_params=sum(i.source.spec.numel for i in items if isinstance(i, Quantize)),
        measured=tuple(sorted(need)),
        needs_data=tuple(
            i.module for i in items if isinstance(i, Quantize) and i.module in need and not i.stats
        ),
        edited=measured.edited if measured else {},
    )


def _unseen(recipe: Recipe, assigned: dict[str, Rule | None], measured: Measured) -> Iterator[str]:
    """A note on quantized modules that no token reached: it shows whether the samples are any good."""
    quantized = [rule for rule in recipe.rules if rule.scheme]
    names = [name for name in measured.no_tokens if assigned.get(name) in quantized]
    if names:
        few = ", ".join(f"`{name}`" for name in names[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        yield f"no token of the calibration text reached {few}{more}"


def _modules(checkpoint: Checkpoint, assigned: dict[str, Rule | None]) -> Iterator[Module]:
    """Every module with a weight, as the target sees it."""
    cache: dict[tuple[int, str], tuple[Numerics, str]] = {}  # few are different, and slow to make
    for name, rule in assigned.items():
        shape = checkpoint.tensors[f"{name}.weight"].spec.shape
        if rule is None or rule.scheme is None:
            yield Module(name, shape, None)
            continue
        scheme = rule.scheme
        if rule.key not in cache:
            options = ", ".join(f"{key}: {value}" for key, value in scheme.model_dump().items())
            cache[rule.key] = scheme.numerics, options if scheme.shares_data else ""
        yield Module(name, shape, *cache[rule.key])


def serving_dtype(checkpoint: Checkpoint) -> tuple[str, list[str]]:
    """The dtype that the engine will compute in, and notes about it.

    Engines take it from config.json. Float32 is not served on the accelerators that this is for, so
    float32 models are served as bfloat16, which has the same range, and config.json says so.
    """
    declared = declared_dtype(checkpoint.config)
    sizes = Counter[str]()
    for tensor in checkpoint.tensors.values():
        if tensor.spec.dtype in FLOATS and not tensor.kind:
            sizes[tensor.spec.dtype] += tensor.nbytes
    stored = max(sizes, key=lambda dtype: sizes[dtype], default="BF16")
    dtype = declared or stored
    if dtype == "F32":
        return "BF16", ["the model is float32; it will be served in bfloat16, and config.json says so"]
    if declared is None:
        return dtype, [f"config.json names no dtype; it will say {dtype}, as the weights are"]
    if stored != declared:
        return dtype, [f"weights are {stored}, config.json says {dtype}: served in {dtype}"]
    return dtype, []


def must_take_experts(checkpoint: Checkpoint, target: Target) -> None:
    """InputError for experts of a family that stores them together, if the engine takes no single ones.

    checkpoint: with the experts one by one, whoever has split them.
    """
    kind = checkpoint.config.get("model_type")
    if layout_of(checkpoint) is None or target.takes_split_experts(str(kind)):
        return
    for name in checkpoint.tensors:
        if EXPERT.fullmatch(name):
            raise InputError(
                f"the engine of target `{target.name}` does not list `{kind!s:.40}` among the families "
                "with quantized experts",
                where=f"`{name}`",
                fix="use `target: compressed-tensors` or `target: fp8`",
            )


def _must_be_stored(assigned: Mapping[str, Rule | None], target: Target) -> None:
    """InputError for a rule whose numerics `target` has no label for."""
    for rule in {rule.key: rule for rule in assigned.values() if rule}.values():
        if rule.scheme is not None:
            numerics = rule.scheme.numerics
            try:
                target.label(numerics)
            except InputError as error:
                raise InputError(
                    error.what,
                    where=f"{rule.where}, scheme `{rule.scheme.name}`",
                    fix=others_that_store(numerics),
                ) from None


def raise_first(refusals: list[Refusal], assigned: Mapping[str, Rule | None]) -> None:
    """InputError for the first refusal of a target, if there is one."""
    if refusals:
        first = refusals[0]
        rule = assigned.get(first.module)
        others = len({refusal.module for refusal in refusals}) - 1
        more = f" ({others} more like it)" if others else ""
        raise InputError(
            first.what + more,
            where=f"`{first.module}`" + (f" ({rule.where})" if rule else ""),
            fix=first.fix,
        )


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


def _rule_lines(
    recipe: Recipe, items: list[Item], assigned: dict[str, Rule | None]
) -> Iterator[RuleLine]:
    by_rule: dict[tuple[int, str], list[Quantize]] = defaultdict(list)
    for item in items:
        if isinstance(item, Quantize) and (rule := assigned[item.module]):
            by_rule[rule.key].append(item)
    instead = {rule.key: rule for rule in assigned.values() if rule and rule not in recipe.rules}
    for rule in sorted([*recipe.rules, *instead.values()], key=lambda rule: rule.number):
        if rule.scheme is not None:
            rule_items = by_rule[rule.key]
            label = recipe.target.label(rule.scheme.numerics)
            yield RuleLine(
                number=rule.number,
                scheme=rule.scheme.name,
                label=label,
                modules=len(rule_items),
                nbytes_before=sum(item.source.nbytes for item in rule_items),
                nbytes_after=sum(out.spec.nbytes for item in rule_items for out in item.outputs),
                loads_on=recipe.target.loads_on(label),
            )


def _kept(
    checkpoint: Checkpoint, items: list[Item], assigned: dict[str, Rule | None], recipe: Recipe
) -> Iterator[Kept]:
    schemes = {item.scheme: None for item in items if isinstance(item, Quantize)}
    edited = dict.fromkeys(method.edited_as for method in methods_for(recipe.methods, schemes))
    matrices = {  # in each stack of experts
        stored.stack.spec.name: name
        for name, stored in checkpoint.tensors.items()
        if isinstance(stored, ExpertMatrix)
    }
    groups: dict[str, list[Copy]] = defaultdict(list)
    for item in items:
        if isinstance(item, Copy):
            spec = item.outputs[0].spec
            module, _, suffix = matrices.get(spec.name, spec.name).rpartition(".")
            rule = assigned.get(module) if suffix == "weight" else None
            if rule is not None and rule.scheme is None:
                reason = f"rules.{rule.number - 1}: {rule.keyword}"
            else:
                matrix = spec.name in matrices or (suffix == "weight" and len(spec.shape) == 2)
                reason = "no rule matches" if matrix else "not a matrix"
            if item.edit is not None:
                reason = f"{' or '.join(filter(None, edited))}; else as it is"
            if item.source.kind:
                reason += ", decoded"
            groups[reason].append(item)
    for reason, copies in sorted(groups.items()):
        specs = [out.spec for copy in copies for out in copy.outputs]
        names = tuple(group.name for group in fold(specs))
        before = sum(copy.source.nbytes for copy in copies)
        yield Kept(reason, len(specs), before, sum(spec.nbytes for spec in specs), names)


def check_expectations(plan: Plan) -> None:
    """AnswerNo if the plan misses a limit of the recipe's `expect` block."""
    values = {
        "quantized_params_pct": plan.quantized_params_pct,
        "quantized_modules": plan.quantized_modules,
        "bits_per_param": 8 * plan.weight_nbytes / plan.params if plan.params else 0.0,
        "output_gib": plan.weight_nbytes / 2**30,
    }
    for key, limit in plan.recipe.file.expect:
        if limit is not None and not compare(limit, values[key]):
            raise AnswerNo(
                f"expected {key} {limit}; the plan has {values[key]:.4g}",
                where=plan.recipe.where("expect", key),
                fix="see the plan's table for what stays float and why",
            )
