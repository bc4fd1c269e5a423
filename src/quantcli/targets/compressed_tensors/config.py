"""`quantization_config` of compressed-tensors: written, and read from any producer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import of_draft
from quantcli.checkpoint.spec import DTYPES, FLOATS
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.number_types import ELEMENTS, SCALES
from quantcli.core.numerics import CACHES, Cache, Numerics, Operand
from quantcli.targets.base import AGAIN, PlannedCheckpoint
from quantcli.targets.compressed_tensors.kinds import FORMATS, Kind, arguments, as_served, kind_of
from quantcli.targets.names import expression_faults, fold, ignored
from quantcli.targets.spellings import draft_expressions
from quantcli.targets.vllm_family import float_linears, is_head

_ANY = "naive-quantized"  # of codes that are not packed


@dataclass(frozen=True)
class ConfigGroup:
    """One of `config_groups`. kind is None if this version does not know how engines load it."""

    name: str
    targets: tuple[str, ...]
    numerics: Numerics | None
    kind: Kind | None


@dataclass
class ConfigGroups:
    """All groups, with the findings of their faults."""

    groups: list[ConfigGroup] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def patterns(self) -> dict[str, str]:
        """The targets of all groups, each with the name of its group."""
        return {target: group.name for group in self.groups for target in group.targets}


def read_groups(block: Settings) -> ConfigGroups:
    """The groups of an untrusted `quantization_config`. Never raises: faults are findings."""
    config = ConfigGroups()
    top = block.value("format")
    tables = block.object_of("config_groups") or Settings({})
    cache_alone = block.value("config_groups") == {} and block.value("kv_cache_scheme")
    if not tables and not cache_alone:
        config.findings.append(_wrong("has no `config_groups`: the engine takes all weights for float"))
    for name in tables:
        place = f"config_groups.{name}"
        table = tables.object_of(name)
        targets = table.value("targets") if table is not None else None
        if table is None or not _strings(targets):
            config.findings.append(_wrong(f"`{place}` has no list of `targets`"))
            continue
        if len(targets) == 1 and targets[0].endswith("Attention"):
            config.findings.append(noted("config", f"the engine skips `{place}`, of attention", CONFIG))
            continue
        numerics = kind = None
        try:
            numerics, kind = _group(table, top)
            if (other := table.value("format") or top) not in (kind.format, _ANY):
                named = f"`{place}` has the format {other}; vLLM goes by its weights, of {kind.format}"
                config.findings.append(noted("config", named, CONFIG))
        except _Unknown as reason:
            config.findings.append(_wrong(f"`{place}` {reason}"))
        config.groups.append(ConfigGroup(name, tuple(targets), numerics, kind))
    ignore = block.value("ignore")
    if ignore not in (None, []) and not _strings(ignore):
        config.findings.append(_wrong("`ignore` is not a list of names"))
    elif _strings(ignore):
        config.ignore = list(ignore)
    config.findings += _other_keys(block)
    for entries in (config.patterns(), config.ignore):
        regexes = (entry.removeprefix("re:") for entry in entries if entry.startswith("re:"))
        config.findings += map(_wrong, expression_faults(regexes))
    return config


def _other_keys(block: Settings) -> Iterator[Finding]:
    """Findings of keys other than groups, `format` and `ignore`."""
    sparse = block.object_of("sparsity_config")
    if sparse is not None and sparse.value("targets"):
        yield _wrong("has a `sparsity_config` with targets, which engines refuse")
    if block.value("transform_config"):
        yield _wrong("has a `transform_config`, which this version cannot verify")


class _Unknown(Exception):
    """Raised for a group that this version cannot read; the text says why."""


def _group(table: Settings, top: object) -> tuple[Numerics, Kind]:
    """The numerics of a group and their kind; top: the `format` of all groups. Raises _Unknown."""
    form = top if table.value("format") is None else table.value("format")
    if not isinstance(form, str) or form not in (*FORMATS, _ANY):
        raise _Unknown(f"has the format {form!r:.40}, which this version does not know")
    weights = table.object_of("weights")
    if weights is None:
        raise _Unknown("says nothing of `weights`")
    if table.value("output_activations"):
        raise _Unknown("quantizes outputs, which this version cannot verify")
    actorder = weights.value("actorder")
    if actorder is True or str(actorder).lower() in {"group", "dynamic"}:
        raise _Unknown(
            f"orders columns by activations (actorder {actorder!r:.20}), which engines refuse"
        )
    inputs = table.object_of("input_activations")
    if inputs is None and (given := table.value("input_activations")) is not None:
        raise _Unknown(f"describes numbers with {given!r:.40}")
    numerics = as_served(Numerics(_operand(weights), None if inputs is None else _operand(inputs)))
    kind = kind_of(numerics, form == "pack-quantized")
    if kind is None or not (kind.any_format or form in {kind.format, _ANY}):
        more = _near_miss(numerics.weight)
        raise _Unknown(f"is a combination that the engine has no scheme for, in {form}{more}")
    return numerics, kind


def _near_miss(weight: Operand) -> str:
    """What the engine knows one of the formats with small scales by, if that alone is missing."""
    if weight.dtype == "fp4_e2m1" and weight.group_size == 16 and not weight.global_scale:
        return "; it knows NVFP4 by the strategy tensor_group"
    if weight.dtype == "fp8_e4m3" and weight.group_size == 32 and not weight.scale:
        return "; it knows MXFP8 by the scale_dtype torch.uint8"
    return ""


_NAMES: dict[tuple[str, int], str] = {
    (element.family, element.bits): element.name for element in ELEMENTS.values()
}
# Types of scales by the torch dtype in which they are stored; floats are of the engine's choice.
_SCALES = {None: None} | {
    f"torch.{DTYPES[scale.stored][1]}": None if scale.stored in FLOATS else scale.name
    for scale in SCALES.values()
}


def _operand(table: Settings) -> Operand:
    """QuantizationArgs as compressed-tensors reads them: keys left out follow from the others.

    Sources: compressed-tensors 0.17.0, quantization/quant_args.py:169-345; compressed-tensors 0.20.0,
    compressors/nvfp4/base.py:49-54 and compressors/mxfp4/base.py:45-50, for the scales of fp4.
    """
    bits, kind = _given(table, "num_bits", 8), _given(table, "type", "int")
    group = table.value("group_size")
    dtype = _NAMES.get((kind, bits) if isinstance(kind, str) and type(bits) is int else ("", 0))
    if dtype is None:
        raise _Unknown(
            f"has {kind!r:.20} numbers of {bits!r:.20} bits, which this version does not know"
        )
    scales = table.value("scale_dtype")
    if not isinstance(scales, str | None) or scales not in _SCALES:
        raise _Unknown(f"has scales of {scales!r:.40}, which this version does not know")
    scale: str | None = _SCALES[scales]
    if group is not None and (type(group) is not int or group < -1 or group == 0):
        raise _Unknown(f"has a group_size of {group!r:.20}")
    per = table.value("strategy") or (
        "tensor" if group is None else "channel" if group == -1 else "group"
    )
    block = None
    global_scale = per == "tensor_group"
    if global_scale:
        per = "group"
    if dtype == "fp4_e2m1" and scales is None:
        scale = "e4m3" if global_scale else "e8m0"
    if per == "group":
        if group is None or group < 1:
            raise _Unknown("has groups without a size")
        block = (1, group)
    elif per == "block":
        sides = table.value("block_structure")
        if not (
            isinstance(sides, list) and len(sides) == 2 and all(type(s) is int and s > 0 for s in sides)
        ):
            raise _Unknown(f"has blocks of {sides!r:.40}")
        block = (sides[0], sides[1])
    elif per not in ("tensor", "channel", "token"):
        raise _Unknown(f"has the strategy {per!r:.40}, which this version does not know")
    symmetric, dynamic = _given(table, "symmetric", True), _given(table, "dynamic", False)
    if dynamic == "local" and global_scale:
        dynamic = True  # the scales of groups; the global one is measured, as engines always take it
    if type(symmetric) is not bool or type(dynamic) is not bool:
        raise _Unknown(f"says symmetric {symmetric!r:.20}, dynamic {dynamic!r:.20}")
    return Operand(dtype, per, symmetric, dynamic, block, scale, global_scale)


def _given(table: Settings, key: str, default: object) -> object:
    """A value as it is, or the default of an absent key; null is a value here, as for the engine."""
    return table.value(key) if key in table else default


def _strings(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _wrong(what: str) -> Finding:
    return failed("config", f"quantization_config {what}", CONFIG, AGAIN)


def quantization_config(output: PlannedCheckpoint, kinds: dict[Numerics, Kind]) -> dict[str, Any]:
    """The whole object. `kinds` has every numerics of the output."""
    groups: dict[Numerics, list[str]] = defaultdict(list)
    for module in output.modules:
        if module.numerics is not None:
            groups[module.numerics].append(module.name)
    floats = float_linears(output)
    draft = of_draft(output.tensors)
    formats = {kinds[numerics].format for numerics in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": (formats.pop() if len(formats) == 1 else "mixed-precision") if formats else "dense",
        "quantization_status": "compressed",
        "kv_cache_scheme": cache_scheme(output.cache) if output.cache else None,
        "config_groups": {
            f"group_{number}": {
                "targets": _targets(names, [n for other in groups.values() for n in other], draft),
                "format": kinds[numerics].format,
                "weights": arguments(numerics.weight),
                "input_activations": arguments(numerics.input) if numerics.input else None,
                "output_activations": None,
            }
            for number, (numerics, names) in enumerate(groups.items())
        },
        "ignore": []
        if not groups
        else _of_draft(floats)
        if draft
        else ignored(floats, [n for names in groups.values() for n in names]),
    }


_STRATEGIES: Mapping[str, str] = {"tensor": "tensor", "head": "attn_head"}


def cache_scheme(cache: Cache) -> dict[str, Any]:
    """`kv_cache_scheme`: with it, vLLM quantizes its cache, unless an option overrides it."""
    return {
        "num_bits": cache.element.bits,
        "type": cache.element.family,
        "strategy": _STRATEGIES[cache.per],
        "symmetric": True,
        "dynamic": False,
    }


def declared_cache(block: Settings) -> tuple[Cache | None, Iterator[Finding]]:
    """The cache of `kv_cache_scheme`, and the findings of its faults.

    Source: vllm 0.32.0, model_executor/layers/quantization/compressed_tensors/
    compressed_tensors.py:1103-1145.
    """
    scheme = block.value("kv_cache_scheme")
    if scheme is None:
        return None, iter(())
    if not isinstance(scheme, dict):
        return None, iter([_wrong(f"has a `kv_cache_scheme` that is {scheme!r:.40}, not an object")])
    given = {"dynamic": False, **scheme}
    caches = (cache for cache in CACHES.values() if cache.per in _STRATEGIES)
    found = next((c for c in caches if cache_scheme(c).items() <= given.items()), None)
    if found is not None:
        return found, iter(())
    words = ", ".join(f"{key} {scheme.get(key)!r:.20}" for key in cache_scheme(CACHES["fp8"]))
    what = f"has a `kv_cache_scheme` ({words}) that the engine refuses or serves with other scales"
    return None, iter([_wrong(what)])


def _targets(modules: Sequence[str], quantized: Sequence[str], draft: bool) -> list[str]:
    """`Linear` if no other group is quantized; otherwise names, as engines match those first."""
    if len(modules) == len(quantized):
        return ["Linear", *filter(is_head, modules)]
    if draft:
        return _of_draft(modules)
    members = set(modules)
    return fold(modules, [name for name in quantized if name not in members])


def _of_draft(modules: Iterable[str]) -> list[str]:
    """Entries for modules of a draft."""
    return [f"re:{expression}" for expression in draft_expressions(modules)]
