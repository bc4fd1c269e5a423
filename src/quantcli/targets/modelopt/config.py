"""The two files that describe a ModelOpt checkpoint: written, and read from any producer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint, read_table
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import of_draft
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import CACHES, Cache, Numerics, Operand
from quantcli.targets.base import AGAIN, PlannedCheckpoint
from quantcli.targets.modelopt.kinds import KINDS, MIXED, Kind
from quantcli.targets.modelopt.matching import also_built_as, engine_names, falcon_names
from quantcli.targets.sidecars import quantization_block
from quantcli.targets.spellings import draft_expressions, float_towers, skip_list, spellings
from quantcli.targets.vllm_family import (
    EXPERT,
    expert_set,
    float_linears,
    fused_siblings,
    is_head,
    looked_up_as,
)

METHOD = "modelopt"
FILE = "hf_quant_config.json"
# Published values of quant_method: vllm 0.32.0, model_executor/layers/quantization/__init__.py.
_METHODS = frozenset({METHOD, "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"})
# vLLM takes the file for ModelOpt's by the producer, and knows these algorithms by it alone.
# Source: vllm 0.32.0, transformers_utils/model_arch_config_convertor.py:265-290.
_BY_FILE = frozenset({"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4"})
_PRODUCER = {"name": METHOD}
# Keys that it needs in the file. Source: vllm 0.32.0,
# model_executor/layers/quantization/modelopt.py:811-824 and 1242-1254.
_NEEDED = {
    "NVFP4": ("group_size", "kv_cache_quant_algo", "exclude_modules"),
    "W4A16_NVFP4": ("group_size", "kv_cache_quant_algo", "exclude_modules"),
    "MXFP8": ("kv_cache_quant_algo", "exclude_modules"),
}


def descriptions(
    output: PlannedCheckpoint, kinds: Mapping[Numerics, Kind]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`quantization_config` of config.json, and the object in the file of its own: the same, twice.

    Sources: Model-Optimizer a2fbac7b, modelopt/torch/export/convert_hf_config.py:150-285 and
    quant_utils.py:680-789.
    """
    members: dict[Kind, list[str]] = {}
    for module in output.modules:
        if module.numerics is not None:
            members.setdefault(kinds[module.numerics], []).append(module.name)
    quantized = [name for names in members.values() for name in names]
    floats = float_linears(output)
    excluded = exclude_list(floats, quantized, draft=of_draft(output.tensors))
    excluded += [other for name in floats for other in falcon_names(name, output.config)]
    uniform = len(members) == 1 and (not nameless_head(output.config) or any(map(is_head, quantized)))
    layers: dict[str, Any] = {}
    if uniform:
        (kind,) = members
        entry = _entry(kind)
        groups = {"group_0": _group(kind, ["Linear"])}
    else:
        entry = {"quant_algo": MIXED}
        groups = {
            f"group_{number}": _group(kind, sorted(names))
            for number, (kind, names) in enumerate(members.items())
        }
        for module in output.modules:
            if module.numerics is not None:
                names = [module.name, *also_built_as(module.name)]
                names += falcon_names(module.name, output.config)
                layers |= dict.fromkeys(names, _entry(kinds[module.numerics]))
    by_name = {"quantized_layers": layers} if layers else {}
    block = {
        "quant_method": METHOD,
        **entry,
        "config_groups": groups,
        "ignore": excluded,
        "kv_cache_scheme": CACHE_SCHEME if output.cache else None,
        **by_name,
        "producer": _PRODUCER,
    }
    own = {
        "producer": _PRODUCER,
        "quantization": {
            **entry,
            "kv_cache_quant_algo": CACHE_ALGORITHM if output.cache else None,
            "exclude_modules": excluded,
            **by_name,
        },
    }
    return block, own


# An fp8 cache, in config.json and in the file of its own.
# Source: vllm 0.32.0, utils/torch_utils.py:457-500.
CACHE_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
CACHE_ALGORITHM = "FP8"


def _is_fp8(declared: Any) -> bool:
    """Whether vLLM makes the cache fp8 of a declaration."""
    if isinstance(declared, dict):
        return all(declared.get(key) == value for key, value in CACHE_SCHEME.items())
    return isinstance(declared, str) and declared.upper() == CACHE_ALGORITHM


def _entry(kind: Kind) -> dict[str, Any]:
    entry: dict[str, Any] = {"quant_algo": kind.written or kind.algorithm}
    return entry | ({"group_size": kind.group_size} if kind.group_size else {})


def _group(kind: Kind, targets: Sequence[str]) -> dict[str, Any]:
    """One of `config_groups`."""
    group: dict[str, Any] = {}
    if kind.numerics.input is not None:
        group["input_activations"] = _arguments(kind.numerics.input)
    return {**group, "weights": _arguments(kind.numerics.weight), "targets": list(targets)}


def _arguments(operand: Operand) -> dict[str, Any]:
    # what the engine computes of inputs for each group is not called dynamic there
    dynamic = operand.dynamic and operand.per == "token"
    table = {"dynamic": dynamic, "num_bits": operand.element.bits, "type": operand.element.family}
    return table | ({"group_size": operand.group_size} if operand.group_size else {})


# Classes that give their head no name, so that no list can name it; without an entry in
# `quantized_layers` it is float. Source: vllm 0.32.0, model_executor/models: afmoe.py,
# exaone_moe.py:510, molmo2.py:2390, cohere_asr.py, nemotron_parse.py, qwen3_omni_moe_thinker.py:1151.
_NAMELESS_HEADS = frozenset(
    {
        "AfmoeForCausalLM", "CohereAsrForConditionalGeneration", "ExaoneMoEForCausalLM",
        "ExaoneMoeForCausalLM", "Molmo2ForConditionalGeneration",
        "NemotronParseForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration",
    }
)  # fmt: skip


def nameless_head(config: Settings) -> bool:
    """Whether vLLM's class for a model builds its head without a name."""
    return any(name in _NAMELESS_HEADS for name in config.texts("architectures"))


def exclude_list(floats: Sequence[str], quantized: Sequence[str], *, draft: bool = False) -> list[str]:
    """Entries for all float modules, and for no quantized one, in every engine.

    vLLM takes an entry also for all names that hold it. TensorRT-LLM compares whole names, and those
    of the modules around it. An entry that is a part of a quantized module's name gets its last letter
    in brackets: a wildcard that matches nothing but the name. Experts are named as a set.
    Source: TensorRT-LLM 1a0dc5f7, tensorrt_llm/models/modeling_utils.py,
    is_module_excluded_from_quantization, and _torch/models/modeling_utils.py.
    """
    if draft:
        return [_wildcard(expression) for expression in draft_expressions(floats)]
    taken = "\n".join(dict.fromkeys(n for module in quantized for n in (module, *engine_names(module))))
    sets = dict.fromkeys(expert_set(name) for name in floats if EXPERT.fullmatch(name))
    single = [name for name in floats if not EXPERT.fullmatch(name)]
    if not any(map(is_head, [*floats, *quantized])):
        single.append("lm_head")  # engines call any head so, also one that is tied
    bracketed = {fused_siblings(name) or name for name in single if name in taken}
    exact = [name for name in single if (fused_siblings(name) or name) not in bracketed]
    entries: dict[str, None] = {}
    sets |= dict.fromkeys(other for name in tuple(sets) for other in also_built_as(name))
    own = {*exact, *sets}
    for name in skip_list([*exact, *sets], quantized):
        if name not in taken:
            entries[name] = None
        elif name in own:
            entries |= dict.fromkeys(_bracketed(name))
    for name in single:
        if (fused_siblings(name) or name) in bracketed:
            entries |= dict.fromkeys(_bracketed(name))
            if fused := looked_up_as(name):
                entries |= dict.fromkeys(_bracketed(fused))
    entries |= dict.fromkeys(f"{name}.*" for name in sets)
    towers = float_towers(single, quantized)
    entries |= dict.fromkeys(f"{prefix}{tower}.*" for tower in towers for prefix in ("model.", ""))
    return list(entries)


def _bracketed(module: str) -> Iterator[str]:
    """Wildcards for a name that are a part of no other name. The engine may rename its beginning, and
    so does not know a head by its wildcard."""
    for name in spellings(module) if is_head(module) else (module,):
        yield f"{name[:-1]}[{name[-1]}]"


def _wildcard(expression: str) -> str:
    """A regular expression of `draft_expressions` as a wildcard."""
    plain = expression.replace(r"(?:.*\.)?", "*").removesuffix("$")
    plain = plain.replace(r"(?:midlayer|layers\.[0-9]+)", "*").replace(r"(?:self_attn\.)?", "*")
    return plain.replace("\\", "").replace("**", "*")


@dataclass
class ModelOptConfig:
    """The description, read. algorithm: None if it is too damaged to tell it.

    excluded: entries for float modules.
    layers:   the algorithms of MIXED_PRECISION, in capitals, by name.
    cache:    of keys and values; None if none is declared.
    """

    algorithm: str | None = None
    excluded: tuple[str, ...] = ()
    layers: dict[str, str] = field(default_factory=dict)
    cache: Cache | None = None
    findings: list[Finding] = field(default_factory=list)


def settings_of(checkpoint: Checkpoint) -> tuple[Settings, str] | None:
    """The object that vLLM reads of a checkpoint that means to be of this format, and its file.

    That of config.json; if there is none, the file of its own.
    """
    block = quantization_block(checkpoint.config)
    if not block:
        own = _own_file(checkpoint)
        return None if own is None or own.object_of("quantization") is None else (own, FILE)
    method = block.text("quant_method")
    return (block, CONFIG) if method is not None and method.lower() in _METHODS else None


def _own_file(checkpoint: Checkpoint) -> Settings | None:
    if not (checkpoint.path / FILE).is_file():
        return None
    try:
        return read_table(checkpoint.path / FILE)
    except InputError:
        return None


def read_settings(checkpoint: Checkpoint) -> ModelOptConfig:
    """The description as vLLM reads it, untrusted. Never raises: faults are findings."""
    found = settings_of(checkpoint)
    if found is None:
        what = f"has no quantization_config, and there is no {FILE}: the engine takes codes for weights"
        return ModelOptConfig(findings=[failed("config", what, CONFIG, AGAIN)])
    block, where = found
    if (inner := block.object_of("quantization")) is not None:
        config = _read(inner, where, "exclude_modules", groups=None)
        config.findings += _legacy(block, inner, config.algorithm, where)
    else:
        config = _read(block, where, "ignore", groups=block.value("config_groups"))
        if config.algorithm == MIXED and "quantized_layers" not in block:
            # vLLM takes the file: its model_executor/model_loader/weight_utils.py:264-272
            own = _own_file(checkpoint)
            table = own.object_of("quantization") if own is not None else None
            if table is not None:
                config = _read(table, FILE, "exclude_modules", groups=None)
    return config


def own_settings(checkpoint: Checkpoint) -> ModelOptConfig | None:
    """The file of its own, if config.json has a description, too; else None."""
    found = settings_of(checkpoint)
    own = _own_file(checkpoint)
    inner = None if own is None else own.object_of("quantization")
    if inner is None or found is None or found[1] == FILE:
        return None
    return _read(inner, FILE, "exclude_modules", groups=found[0].value("config_groups"))


def _read(table: Settings, where: str, key: str, *, groups: object) -> ModelOptConfig:
    """One of both forms. key: of its list of float modules."""
    config = ModelOptConfig()

    def wrong(what: str) -> None:
        config.findings.append(failed("config", what, where, AGAIN))

    name = table.value("quant_algo")
    algorithm = name.upper() if isinstance(name, str) else ""
    if algorithm not in {*KINDS, MIXED}:
        names = ", ".join([*KINDS, MIXED])
        wrong(f"`quant_algo` is {name!r:.40}; vLLM 0.32 has {names}")
        return config
    if algorithm == "NVFP4" and _weights_alone(groups):
        algorithm = "W4A16_NVFP4"
    listed = [] if table.value(key) is None else table.value(key)
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        wrong(f"`{key}` is {listed!r:.60}, not a list of names")
        return config
    config.excluded = tuple(listed)
    size = table.value("group_size")
    expected = KINDS[algorithm].group_size if algorithm in KINDS else None
    if expected and size is not None and size != expected:
        wrong(f"`group_size` is {size!r:.40}; {algorithm} has groups of {expected}")
    declared = table.value("kv_cache_scheme") or table.value("kv_cache_quant_algo")
    if _is_fp8(declared):
        config.cache = CACHES["fp8"]
    elif declared:
        what = (
            f"declares a cache of {declared!r:.60}: how the engine rounds it is not verified by this "
            "version"
        )
        config.findings.append(noted("config", what, where))
    if algorithm == MIXED and not _read_layers(table.object_of("quantized_layers"), config, wrong):
        return config
    config.algorithm = algorithm
    return config


Wrong: TypeAlias = Callable[[str], None]  # takes in a finding


def _read_layers(layers: Settings | None, config: ModelOptConfig, wrong: Wrong) -> bool:
    """Take in `quantized_layers`; whether they can be read."""
    if not layers:
        wrong("has no `quantized_layers`, which MIXED_PRECISION needs")
        return False
    for name in layers:
        entry = layers.object_of(name)
        algorithm = entry.value("quant_algo") if entry is not None else None
        if entry is None or not isinstance(algorithm, str):
            value = f"{layers.value(name)!r:.40}"
            wrong(f"`quantized_layers` has {value} for {name!r:.60}, without a quant_algo")
            return False
        config.layers[name] = algorithm.upper()
        kind, size = KINDS.get(algorithm.upper()), entry.value("group_size")
        if kind and kind.group_size and size not in (None, kind.group_size):
            wrong(f"`quantized_layers`: `{name:.80}` has groups of {size!r:.20}, not {kind.group_size}")
            return False
    return True


def _weights_alone(groups: object) -> bool:
    """Whether all groups have float inputs. Source: vllm 0.32.0, modelopt.py:794-807."""
    if not isinstance(groups, dict) or not groups:
        return False
    return all(isinstance(g, dict) and g.get("input_activations") is None for g in groups.values())


def _legacy(block: Settings, inner: Settings, algorithm: str | None, where: str) -> Iterator[Finding]:
    """Findings of a description in the form of the file of its own, which vLLM reads alone."""
    producer = block.object_of("producer")
    name = producer.value("name") if producer is not None else None
    if where == FILE and name != METHOD:
        what = f"`producer` is {name!r:.40}: vLLM knows the format of this file by the name {METHOD}"
        yield failed("config", what, where, "add the quantization_config to config.json")
    if where == FILE and algorithm and algorithm not in _BY_FILE:
        what = f"vLLM does not take {algorithm} from this file alone"
        yield failed("config", what, where, "add the quantization_config to config.json")
    missing = [key for key in _NEEDED.get(algorithm or "", ()) if key not in inner]
    if missing:
        yield failed("config", f"has no `{missing[0]}`, which vLLM needs for {algorithm}", where, AGAIN)
