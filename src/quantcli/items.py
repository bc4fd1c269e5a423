"""What each tensor of the source becomes, found by quantizing blocks that have no rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from quantcli.checkpoint import Checkpoint
from quantcli.errors import InputError
from quantcli.measured import Measured
from quantcli.numerics import NO_STATS
from quantcli.plan import NOTHING_MEASURED, Copy, Held, Item, Quantize
from quantcli.recipe import Rule
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target
from quantcli.tensorspec import FLOATS, TensorSpec, safetensors_dtype, torch_dtype


@dataclass(frozen=True)
class Outcome:
    """What a weight becomes: the outcome of a dry run."""

    held: Held
    specs: tuple[TensorSpec, ...]  # named by suffix ("weight", "weight_scale")
    constants: frozenset[str]  # suffixes of those that do not depend on rows
    stats: frozenset[str]  # what must have been measured; empty for schemes that need no data


def dry_run(
    scheme: Scheme,
    target: Target,
    spec: TensorSpec,
    serving_dtype: str,
    bias: TensorSpec | None = None,
) -> Outcome:
    """What a weight becomes, by quantizing and packing it without data: a block of no rows.

    Inputs count as measured by an observer that saw nothing. Raises InputError where the target cannot
    store these numerics, and for a bias that cannot be one. A block of no rows runs the real kernels
    and needs no memory; the meta device would do as well, but in torch 2.13 its binary operations
    import torch._dynamo, which costs every command two seconds and 80 MB.
    """
    held = Held(
        target.held(scheme.numerics, "weight_scale", serving_dtype),
        target.held(scheme.numerics, "input_scale", serving_dtype),
    )
    input_dtype = torch_dtype(held.input_scale)
    observer = scheme.observer(input_dtype)
    stats = observer.stats() if observer else NO_STATS
    no_bias = None
    if observer and bias:
        _check_bias(bias, spec)
        no_bias = torch.empty(0, dtype=torch_dtype(bias.dtype))
    packed = target.pack(
        scheme.numerics,
        scheme.quantize(
            torch.empty((0, *spec.shape[1:]), dtype=torch_dtype(spec.dtype)),
            torch_dtype(held.weight_scale),
            scheme.constants(stats, input_dtype),
            no_bias,
        ),
    )
    constants = frozenset(suffix for suffix, tensor in packed.items() if tensor.shape[0])
    specs = []
    for suffix, tensor in packed.items():
        rows = tensor.shape[0] if suffix in constants else spec.shape[0]
        shape = (rows, *tensor.shape[1:])
        specs.append(TensorSpec(suffix, safetensors_dtype(tensor.dtype), shape))
    return Outcome(held, tuple(specs), constants, frozenset(stats))


def make_items(
    checkpoint: Checkpoint,
    assigned: dict[str, Rule | None],
    target: Target,
    serving_dtype: str,
    measured: Measured,
) -> Iterator[Item]:
    """One item per source tensor, in the order of the source: each is consumed exactly once."""
    # by rule, dtypes and shapes: experts come in tens of thousands of equal ones
    made: dict[tuple[tuple[int, str], str, tuple[int, ...], str, tuple[int, ...]], Outcome] = {}
    biases = {
        f"{module}.bias": target.bias_dtype(rule.scheme.numerics)
        for module, rule in assigned.items()
        if rule and rule.scheme and f"{module}.bias" in checkpoint.tensors
    }
    for name, stored in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        rule = assigned.get(module) if module != name else None
        if rule is None or rule.scheme is None:
            yield Copy(stored, measured.edits.get(name), biases.get(name))
            continue
        scheme, spec = rule.scheme, stored.spec
        bias = checkpoint.tensors.get(f"{module}.bias")
        added = bias.spec if bias else None
        also = (added.dtype, added.shape) if added else ("", ())
        key = (rule.key, spec.dtype, spec.shape, *also)
        if key not in made:
            made[key] = dry_run(scheme, target, spec, serving_dtype, added)
        outcome = made[key]
        outputs = tuple(TensorSpec(f"{module}.{p.name}", p.dtype, p.shape) for p in outcome.specs)
        if not outcome.stats:
            yield Quantize(stored, module, scheme, outcome.held, outputs, edit=measured.edits.get(name))
            continue
        known = measured.stats.get(module, NOTHING_MEASURED)
        if known and (absent := outcome.stats - known.keys()):
            raise InputError(
                f"what was measured of this module's input lacks {', '.join(sorted(absent))}",
                where=f"`{module}` ({rule.where})",
                fix="calibrate again",
            )
        stats = {suffix: known[suffix] for suffix in outcome.stats} if known else NOTHING_MEASURED
        constants = frozenset(f"{module}.{suffix}" for suffix in outcome.constants)
        yield Quantize(
            stored,
            module,
            scheme,
            outcome.held,
            outputs,
            constants,
            bias,
            stats,
            measured.edits.get(name),
            measured.edits.get(f"{module}.bias"),
        )


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
        if isinstance(item, Quantize) and item.stats and (name := target.merged(item.module)):
            content = item.measured()
            other, expected = first.setdefault(name, (item.module, content))
            if content != expected:
                raise InputError(
                    f"the engine merges this module with `{other}`, and their inputs were measured "
                    "as different",
                    where=f"`{item.module}`",
                    fix="calibrate again; if that is what they are, use a scheme that needs no data",
                )
