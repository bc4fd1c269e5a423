"""Recipe x headers -> Plan, by quantizing blocks that have no rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import torch

from quantcli.checkpoint import Checkpoint
from quantcli.errors import AnswerNo, InputError
from quantcli.formats import quantization
from quantcli.header import layout
from quantcli.inspection import fold
from quantcli.matching import assign
from quantcli.numerics import Module
from quantcli.plan import Copy, Item, Kept, Plan, Quantize, RuleLine, Shard
from quantcli.recipe import Recipe, Rule, compare
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Output, Refusal, Target
from quantcli.targets.sidecars import declared_dtype
from quantcli.tensorspec import FLOATS, TensorSpec, safetensors_dtype, torch_dtype

RECIPE_FILE = "quantcli_recipe.yaml"


def make_plan(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """Plan the conversion from headers alone.

    Raises InputError for whatever the engine could not load or the recipe does not mean.
    """
    _refuse_quantized(checkpoint)
    serving_dtype, notes = _serving_dtype(checkpoint)
    target = recipe.target
    source_specs = {stored.spec.name: stored.spec for stored in checkpoint.tensors.values()}
    _raise_first(list(target.check((), source_specs)), {})  # before rules that would miss them
    assigned = assign(recipe, checkpoint)
    numerics = {rule.number: rule.scheme.numerics for rule in recipe.rules if rule.scheme}
    modules = [
        Module(
            name,
            checkpoint.tensors[f"{name}.weight"].spec.shape,
            numerics.get(rule.number) if rule else None,
        )
        for name, rule in assigned.items()
    ]
    _raise_first(list(target.check(modules, source_specs)), assigned)
    items = list(_items(checkpoint, assigned, target, serving_dtype))
    shards = _shards(items, recipe.file.max_shard)
    output = Output(
        modules=modules,
        tensors={spec.name: spec for shard in shards for spec in shard.tensors},
        files={spec.name: shard.file for shard in shards for spec in shard.tensors},
        config=checkpoint.config,
        serving_dtype=serving_dtype,
    )
    sidecars = {**target.sidecars(output), RECIPE_FILE: recipe.effective().encode()}
    copies = {name: n for name, n in checkpoint.aux.items() if name not in sidecars}
    unused = {
        "calibration": "no scheme of this recipe measures data",
        "verify": "this version does not compare numbers",
    }
    notes += [
        f"the recipe's `{block}` block has no effect: {why}"
        for block, why in unused.items()
        if getattr(recipe.file, block) is not None
    ]
    if not any(module.numerics for module in modules):
        notes.append("nothing is quantized: every weight stays float")
    notes += [f"dropped `{name}`: {why}" for name, why in checkpoint.left_out.items()]
    return Plan(
        checkpoint=checkpoint,
        recipe=recipe,
        shards=shards,
        sidecars=sidecars,
        copies=copies,
        serving_dtype=serving_dtype,
        rules=tuple(_rule_lines(recipe, items, assigned)),
        kept=tuple(_kept(items, assigned)),
        notes=(*checkpoint.notes, *notes, *target.advise(modules)),
        params=sum(spec.numel for spec in checkpoint.specs()),
        quantized_params=sum(i.source.spec.numel for i in items if isinstance(i, Quantize)),
    )


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    found = quantization(checkpoint)
    if found:
        raise InputError(
            f"model is already quantized: {found.format}, {found.modules} modules",
            where=f"{checkpoint.path}, {found.evidence}",
            fix="start from the float checkpoint (bfloat16, float16 or float32)",
        )


def _serving_dtype(checkpoint: Checkpoint) -> tuple[str, list[str]]:
    """The dtype that the engine will compute in, and what there is to say about it.

    Engines take it from config.json. Float32 is not served on the accelerators that this is for, so
    float32 models are served as bfloat16, which has the same range, and config.json says so.
    """
    declared = declared_dtype(checkpoint.config)
    sizes = Counter[str]()
    for spec in checkpoint.specs():
        if spec.dtype in FLOATS:
            sizes[spec.dtype] += spec.nbytes
    stored = max(sizes, key=lambda dtype: sizes[dtype], default="BF16")
    dtype = declared or stored
    if dtype == "F32":
        return "BF16", ["the model is float32; it will be served in bfloat16, and config.json says so"]
    if declared is None:
        return dtype, [f"config.json names no dtype; it will say {dtype}, as the weights are"]
    if stored != declared:
        return dtype, [f"weights are {stored}, config.json says {dtype}: served in {dtype}"]
    return dtype, []


def _raise_first(refusals: list[Refusal], assigned: dict[str, Rule | None]) -> None:
    if refusals:
        first = refusals[0]
        rule = assigned.get(first.module)
        more = f" ({len(refusals) - 1} more like it)" if len(refusals) > 1 else ""
        raise InputError(
            first.what + more,
            where=f"`{first.module}`" + (f" ({rule.where})" if rule else ""),
            fix=first.fix,
        )


def _items(
    checkpoint: Checkpoint, assigned: dict[str, Rule | None], target: Target, serving_dtype: str
) -> Iterator[Item]:
    """One item per source tensor, in the order of the source: each is consumed exactly once."""
    # by rule, dtype and shape: experts come in tens of thousands of equal ones
    made: dict[tuple[int, str, tuple[int, ...]], tuple[str, tuple[TensorSpec, ...]]] = {}
    for name, stored in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        rule = assigned.get(module) if module != name else None
        if rule is None or rule.scheme is None:
            yield Copy(stored)
            continue
        scheme, spec = rule.scheme, stored.spec
        key = (rule.number, spec.dtype, spec.shape)
        if key not in made:
            held = target.held(scheme.numerics, serving_dtype)
            made[key] = held, dry_run(scheme, target, spec, held)
        held, parts = made[key]
        outputs = tuple(TensorSpec(f"{module}.{p.name}", p.dtype, p.shape) for p in parts)
        yield Quantize(stored, module, scheme, held, outputs)


def dry_run(scheme: Scheme, target: Target, spec: TensorSpec, held: str) -> tuple[TensorSpec, ...]:
    """What a weight becomes, by quantizing and packing it without data: a block of no rows.

    Returns specs named by suffix ("weight", "weight_scale"). Raises InputError where the target
    cannot store these numerics. A block of no rows runs the real kernels and needs no memory; the
    meta device would do as well, but in torch 2.13 its binary operations import torch._dynamo, which
    costs every command two seconds and 80 MB.
    """
    rows = torch.empty((0, *spec.shape[1:]), dtype=torch_dtype(spec.dtype))
    packed = target.pack(scheme.numerics, scheme.quantize(rows, torch_dtype(held)))
    specs = []
    for suffix, tensor in packed.items():
        assert tensor.shape[0] == 0, f"{target.name} does not keep the rows of {suffix}"
        shape = (spec.shape[0], *tensor.shape[1:])
        specs.append(TensorSpec(suffix, safetensors_dtype(tensor.dtype), shape))
    return tuple(specs)


def _shards(items: Iterable[Item], max_shard: int) -> tuple[Shard, ...]:
    """Fill files in source order up to `max_shard` bytes; what one weight becomes stays together."""
    bins: list[list[Item]] = [[]]
    filled = 0
    names: set[str] = set()
    for item in items:
        nbytes = sum(spec.nbytes for spec in item.outputs)
        if bins[-1] and filled + nbytes > max_shard:
            bins.append([])
            filled = 0
        bins[-1].append(item)
        filled += nbytes
        for spec in item.outputs:
            if spec.name in names:
                raise InputError("the model already has a tensor of this name", where=f"`{spec.name}`")
            names.add(spec.name)
    return tuple(
        Shard(
            f"model-{number:05d}-of-{len(bins):05d}.safetensors",
            layout(spec for item in bin_ for spec in item.outputs),
            tuple(bin_),
        )
        for number, bin_ in enumerate(bins, start=1)
    )


def _rule_lines(
    recipe: Recipe, items: list[Item], assigned: dict[str, Rule | None]
) -> Iterator[RuleLine]:
    by_rule: dict[int, list[Quantize]] = defaultdict(list)
    for item in items:
        if isinstance(item, Quantize) and (rule := assigned[item.module]):
            by_rule[rule.number].append(item)
    for rule in recipe.rules:
        if rule.scheme is not None:
            mine = by_rule[rule.number]
            label = recipe.target.label(rule.scheme.numerics)
            yield RuleLine(
                number=rule.number,
                scheme=rule.scheme.name,
                label=label,
                modules=len(mine),
                nbytes_before=sum(item.source.spec.nbytes for item in mine),
                nbytes_after=sum(spec.nbytes for item in mine for spec in item.outputs),
                loads_on=recipe.target.loads_on(label),
            )


def _kept(items: list[Item], assigned: dict[str, Rule | None]) -> Iterator[Kept]:
    groups: dict[str, list[TensorSpec]] = defaultdict(list)
    for item in items:
        if isinstance(item, Copy):
            spec = item.source.spec
            module, _, suffix = spec.name.rpartition(".")
            rule = assigned.get(module) if suffix == "weight" else None
            if rule is not None:
                reason = f"rules.{rule.number - 1}: keep"
            else:
                matrix = suffix == "weight" and len(spec.shape) == 2
                reason = "no rule matches" if matrix else "not a matrix"
            groups[reason].append(spec)
    for reason, specs in sorted(groups.items()):
        names = tuple(group.name for group in fold(specs))
        yield Kept(reason, len(specs), sum(spec.nbytes for spec in specs), names)


def check_expectations(plan: Plan) -> None:
    """AnswerNo where the plan misses a limit of the recipe's `expect` block."""
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
