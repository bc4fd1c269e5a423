"""What each tensor of the source becomes, found by quantizing blocks that have no rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS, TensorSpec, safetensors_dtype, torch_dtype
from quantcli.core.errors import InputError
from quantcli.planning.measured import Edit, Measured
from quantcli.planning.plan import NOTHING_MEASURED, Copy, EngineDtypes, Item, Quantize
from quantcli.recipe.recipe import PLAIN, Rule
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target


@dataclass(frozen=True)
class Outcome:
    """What a weight becomes: the outcome of a dry run."""

    engine_dtypes: EngineDtypes
    specs: tuple[TensorSpec, ...]  # named by suffix ("weight", "weight_scale")
    constants: frozenset[str]  # suffixes of those that do not depend on rows
    stats: frozenset[str]  # what must have been measured; empty for schemes that need no data
    row_multiple: int


def dry_run(
    scheme: Scheme,
    target: Target,
    spec: TensorSpec,
    serving_dtype: str,
    bias: TensorSpec | None = None,
) -> Outcome:
    """What a weight becomes, by quantizing and packing it without data: a block of no rows.

    Inputs count as measured by an observer that saw nothing. Raises InputError where the target cannot
    store these numerics, and for a bias that cannot be one. A block of no rows, or of a few zeros where
    rows share a scale, runs the real kernels and needs no memory; the meta device would do as well, but
    in torch 2.13 its binary operations import torch._dynamo, which costs two seconds and 80 MB.
    """
    engine_dtypes = EngineDtypes(
        target.engine_dtype(scheme.numerics, "weight_scale", serving_dtype),
        target.engine_dtype(scheme.numerics, "input_scale", serving_dtype),
    )
    input_dtype = torch_dtype(engine_dtypes.input_scale)
    n, k = spec.shape
    stats = scheme.blank(k, input_dtype)
    if stats and bias:
        _check_bias(bias, spec)
    shared = {name: tensor for name, tensor in stats.items() if name not in scheme.row_stats}
    constants = scheme.constants(shared, input_dtype)
    if scheme.needs_weight_amax:
        constants["weight_amax"] = torch.zeros(1)

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
        parts["weight_scale"] = parts["weight_scale"].to(torch_dtype(engine_dtypes.weight_scale))
        return target.pack(scheme.numerics, parts, (n, k))

    of_none = packed(0)
    fixed = frozenset(suffix for suffix, tensor in of_none.items() if tensor.shape[0])
    multiple = math.lcm(scheme.row_multiple, target.row_multiple(scheme.numerics))
    of_some = packed(multiple) if multiple > 1 else {}
    specs = []
    for suffix, tensor in of_none.items():
        share = len(of_some[suffix]) if multiple > 1 else 1
        rows = tensor.shape[0] if suffix in fixed else -(-n * share // multiple)
        shape = (rows, *tensor.shape[1:])
        specs.append(TensorSpec(suffix, safetensors_dtype(tensor.dtype), shape))
    return Outcome(engine_dtypes, tuple(specs), fixed, frozenset(stats), multiple)


def make_items(
    checkpoint: Checkpoint,
    assigned: dict[str, Rule | None],
    target: Target,
    serving_dtype: str,
    measured: Measured,
) -> Iterator[Item]:
    """One item per source tensor, in the order of the source: each is consumed exactly once."""
    # by rule, dtypes and shapes: experts come in tens of thousands of equal ones
    outcomes: dict[tuple[tuple[int, str], str, tuple[int, ...], str, tuple[int, ...]], Outcome] = {}
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
    weight_amax = _surveys(checkpoint, assigned, target, measured)
    for name, stored in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        rule = assigned.get(module) if module != name else None
        if rule is None or rule.scheme is None:
            dtype = biases.get(name)
            if stored.kind or (name in plain and stored.spec.dtype in FLOATS):
                dtype = serving_dtype
            same = dtype == stored.spec.dtype
            yield Copy(stored, measured.edits.get(name), None if same else dtype)
            continue
        scheme, spec = rule.scheme, stored.spec
        bias = checkpoint.tensors.get(f"{module}.bias")
        added = bias.spec if bias else None
        also = (added.dtype, added.shape) if added else ("", ())
        key = (rule.key, spec.dtype, spec.shape, *also)
        if key not in outcomes:
            outcomes[key] = dry_run(scheme, target, spec, serving_dtype, added)
        outcome = outcomes[key]
        outputs = tuple(TensorSpec(f"{module}.{p.name}", p.dtype, p.shape) for p in outcome.specs)
        amax_group = weight_amax.get(target.fused_name(module) or module, ())
        constants = frozenset(f"{module}.{suffix}" for suffix in outcome.constants)
        if not outcome.stats:
            yield Quantize(
                stored,
                module,
                scheme,
                outcome.engine_dtypes,
                outputs,
                constants,
                edit=measured.edits.get(name),
                row_multiple=outcome.row_multiple,
                amax_group=amax_group,
            )
            continue
        module_stats = measured.stats.get(module, NOTHING_MEASURED)
        if module_stats and (absent := outcome.stats - module_stats.keys()):
            raise InputError(
                f"what was measured of this module's input lacks {', '.join(sorted(absent))}",
                where=f"`{module}` ({rule.where})",
                fix="calibrate again",
            )
        stats = (
            {suffix: module_stats[suffix] for suffix in outcome.stats}
            if module_stats
            else NOTHING_MEASURED
        )
        yield Quantize(
            stored,
            module,
            scheme,
            outcome.engine_dtypes,
            outputs,
            constants,
            bias,
            stats,
            measured.edits.get(name),
            measured.edits.get(f"{module}.bias"),
            outcome.row_multiple,
            amax_group,
        )


def _surveys(
    checkpoint: Checkpoint, assigned: dict[str, Rule | None], target: Target, measured: Measured
) -> dict[str, tuple[tuple[StoredTensor, Edit | None], ...]]:
    """The weights that share a scale, by the name under which the engine merges them."""
    found: dict[str, list[tuple[StoredTensor, Edit | None]]] = defaultdict(list)
    for module, rule in assigned.items():
        if rule and rule.scheme and rule.scheme.needs_weight_amax:
            name = f"{module}.weight"
            entry = checkpoint.tensors[name], measured.edits.get(name)
            found[target.fused_name(module) or module].append(entry)
    return {name: tuple(entries) for name, entries in found.items()}


def _check_bias(bias: TensorSpec, weight: TensorSpec) -> None:
    if bias.dtype not in FLOATS or bias.shape != weight.shape[:1]:
        raise InputError(
            f"bias is {bias}; it must be float, one value for each of {weight.shape[0]} rows",
            where=f"`{bias.name}`",
            fix="put a rule with `scheme: keep` for the module before the others",
        )


def check_siblings(items: Iterable[Item], target: Target) -> None:
    """The engine keeps one of what is not per row for modules that it merges: it must be the same."""
    first: dict[str, tuple[str, bytes]] = {}
    for item in items:
        if isinstance(item, Quantize) and item.stats and (name := target.fused_name(item.module)):
            content = item.measured()
            other, expected = first.setdefault(name, (item.module, content))
            if content != expected:
                raise InputError(
                    f"the engine merges this module with `{other}`, and their inputs were measured "
                    "as different",
                    where=f"`{item.module}`",
                    fix="calibrate again; if that is what they are, use a scheme that needs no data",
                )
