"""`quantization_config` of `quant_method: gptq`: written, and read from any producer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint, read_table
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import LAYER, Draft, of_draft
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import Numerics
from quantcli.core.untrusted.patterns import Budget, Expression
from quantcli.targets.base import AGAIN, PlannedCheckpoint
from quantcli.targets.gptq.kinds import VERSIONS, WHOLE_ROWS, Kind
from quantcli.targets.names import expression_faults, expressions
from quantcli.targets.sidecars import quantization_block
from quantcli.targets.spellings import draft_expressions, draft_name, spellings
from quantcli.targets.vllm_family import EXPERT, float_linears, is_head, looked_up_as

METHOD = "gptq"
FILE = "quantize_config.json"
_WHOLE = 2**31  # above any number of columns


def quantization_config(output: PlannedCheckpoint, kinds: Mapping[Numerics, Kind]) -> dict[str, Any]:
    """The whole object: the kind of most modules, and under `dynamic` those that are not alike.

    The keys of `dynamic` are regular expressions, of which the first that matches the beginning of a
    name counts: `-:` for float modules, `+:` for those of another kind. vLLM looks siblings up by the
    name under which it fuses them, and experts by the name of their layer's.
    Sources: vllm 0.32.0, model_executor/layers/quantization/utils/gptq_utils.py:85-117 and
    auto_gptq.py:69-92; gptqmodel 021b65e2fd, quantization/config.py (dynamic_get).
    """
    members: dict[Kind, list[str]] = defaultdict(list)
    for module in sorted(output.modules, key=lambda module: _in_order(module.name)):
        if module.numerics is not None:
            members[kinds[module.numerics]].append(module.name)
    members = dict(sorted(members.items(), key=lambda entry: entry[0].label))
    usual = max(members, key=lambda kind: len(members[kind]))
    heads = any(is_head(name) for names in members.values() for name in names)
    # `lm_head` is for those; sorted, as packing finds modules in another order
    floats = sorted((name for name in float_linears(output) if not is_head(name)), key=_in_order)
    draft = of_draft(output.tensors)
    rules: dict[str, dict[str, int]] = {
        f"-:{expression}": {} for expression in _expressions(floats, members.values(), draft)
    }
    for kind, names in members.items():
        if kind != usual:
            others = [other for key, other in members.items() if key != kind]
            change = {"bits": kind.bits, "group_size": kind.group}
            rules |= {f"+:{expression}": change for expression in _expressions(names, others, draft)}
    table: dict[str, Any] = {
        "quant_method": METHOD,
        "checkpoint_format": usual.version,
        "bits": usual.bits,
        "group_size": usual.group,
        "desc_act": False,
        "sym": True,
        "lm_head": heads,
    }
    if draft:  # vLLM would look for names of tensors, which are not those of its modules
        table["modules_in_block_to_quantize"] = _parts_of_names(members.values())
    return table | ({"dynamic": rules} if rules else {})


def _parts_of_names(members: Iterable[Sequence[str]]) -> list[str]:
    """Parts of the names of a draft's quantized modules, in the checkpoint and in vLLM."""
    names = (name for modules in members for name in modules)
    both = (name for own in names for name in (own, looked_up_as(own)) if name)
    matches = ((name, LAYER.fullmatch(name)) for name in both)
    parts = {match["rest"] if match else name for name, match in matches}
    return sorted(part.replace("self_attn.qkv_proj", "qkv_proj") for part in parts)


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names by: numbers in them by their value."""
    return [(int(part) if part.isdecimal() else -1, part) for part in name.split(".")]


def _expressions(modules: Sequence[str], others: Iterable[Sequence[str]], draft: bool) -> list[str]:
    """Expressions for all names of these modules, and no other's."""
    if draft:
        return draft_expressions(modules)
    rest = [name for names in others for name in names]
    return expressions(_all_names(modules), _all_names(rest))


def _all_names(modules: Sequence[str]) -> list[str]:
    """Names of modules, of their siblings as one, and of the experts of a layer as one."""
    names: dict[str, None] = {}
    for module in modules:
        names[module] = None
        if name := _engine_name(module):
            names[name] = None
    return list(names)


def _engine_name(module: str) -> str | None:
    """The name under which vLLM looks a module up, if that is not its own."""
    expert = EXPERT.fullmatch(module)
    return expert["experts"] if expert else looked_up_as(module)


def settings_of(checkpoint: Checkpoint) -> Settings | None:
    """The config of a checkpoint that is, or means to be, of this format; None for any other."""
    block = quantization_block(checkpoint.config)
    if not block and (checkpoint.path / FILE).is_file():
        if not any(name.endswith(".qweight") for name in checkpoint.tensors):
            return None
        try:
            block = read_table(checkpoint.path / FILE)
        except InputError:
            return None
        block = block if "quant_method" in block else block.with_values(quant_method=METHOD)
    method = block.text("quant_method")
    return block if method is not None and method.lower() == METHOD else None


def differences(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Notes on what the file of its own says otherwise than config.json; other engines read that file.

    Source: AutoGPTQ 01b8616488, auto_gptq/quantization/config.py; gptqmodel 021b65e2fd, likewise.
    """
    block = quantization_block(checkpoint.config)
    if not block or not (checkpoint.path / FILE).is_file():
        return
    try:
        own = read_table(checkpoint.path / FILE)
    except InputError as error:
        yield noted("config", f"AutoGPTQ and gptqmodel cannot read it: {error.what}", FILE)
        return
    for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic"):
        value, other = own.value(key), block.value(key)
        if key in own and key in block and value != other:
            what = f"`{key}` is {value!r:.40}, and {other!r:.40} in {CONFIG}: AutoGPTQ and "
            yield noted(
                "config", what + "gptqmodel read this one, vLLM and transformers the other", FILE
            )


@dataclass(frozen=True)
class _Rule:
    """An entry of `dynamic`. kind: of the modules that it matches; None if they are float."""

    expression: Expression
    kind: Kind | None


@dataclass
class GptqConfig:
    """The config, read. usual: None if it is too damaged to tell it, or in `unchecked`.

    unchecked: the format that engines load, but whose tensors this version cannot read.
    named:     names, or parts of names, of the quantized modules; None if it does not list them.
    """

    usual: Kind | None = None
    lm_head: bool = False
    desc_act: bool = False
    unchecked: str | None = None
    named: tuple[str, ...] | None = None
    rules: list[_Rule] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def kind_for_engine(self, module: str, draft: Draft | None = None) -> Kind | None:
        """The kind that vLLM gives a module, or one of a draft; None if it builds it as float."""
        if draft:
            return self.kind_of([draft_name(module, draft)])
        return self.kind_of(spellings(_engine_name(module) or module))

    def kind_of(self, names: Iterable[str]) -> Kind | None:
        """The kind of a module by the first rule that matches one of its names; None if it is float."""
        spelled = list(names)
        for rule in self.rules:
            if any(rule.expression.match(name) for name in spelled):
                return rule.kind
        return self.usual


def read_config(block: Settings) -> GptqConfig:
    """The object as vLLM reads it, untrusted. Never raises: faults are findings.

    Source: vllm 0.32.0, model_executor/layers/quantization/auto_gptq.py:104-216.
    """
    config = GptqConfig(findings=list(_faults(block)))
    declared = block.value("checkpoint_format") or "gptq"
    version = declared.lower() if isinstance(declared, str) else repr(declared)
    if version not in VERSIONS or block.value("is_marlin_format"):
        config.unchecked = f"GPTQ in the layout `{'marlin' if version in VERSIONS else version:.20}`"
    elif isinstance(bits := block.value("bits"), int) and bits not in (4, 8):
        config.unchecked = f"GPTQ of {bits} bits"
    if config.unchecked or any(finding.severity == "error" for finding in config.findings):
        return config
    usual = _changed(Kind(0, 0, False, version), block)
    config.usual, config.lm_head = usual, bool(block.value("lm_head"))
    config.desc_act = bool(block.flag("desc_act"))
    named = block.value("modules_in_block_to_quantize")
    if named:
        config.named = tuple(_flat(named))
    budget = Budget()
    for pattern, changes in block.tables("dynamic").items():
        where = f"{CONFIG}: quantization_config.dynamic"
        expression = Expression(_without_sign(pattern), where, pattern=pattern, budget=budget)
        kind = None if pattern.startswith("-:") else _changed(usual, changes)
        config.rules.append(_Rule(expression, kind))
    return config


def _without_sign(pattern: str) -> str:
    return pattern.removeprefix("-:").removeprefix("+:")


def _changed(usual: Kind, changes: Settings) -> Kind:
    bits, group = changes.integer("bits"), changes.integer("group_size")
    symmetric = changes.flag("sym")
    return replace(
        usual,
        bits=usual.bits if bits is None else bits,
        group=usual.group if group is None else group,
        symmetric=usual.symmetric if symmetric is None else symmetric,
    )


def _flat(names: Any) -> Iterator[str]:
    """Names in lists of lists."""
    for name in names:
        if isinstance(name, list):
            yield from _flat(name)
        else:
            yield name


def _faults(block: Settings) -> Iterator[Finding]:
    missing = [key for key in ("bits", "group_size", "desc_act", "sym") if key not in block]
    if missing:
        yield _wrong(f"has no `{missing[0]}`, without which vLLM loads nothing")
    yield from _wrong_numbers("", block)
    if block.value("sym") is False:
        what = "`sym` is false, which vLLM 0.32 refuses; gptqmodel and transformers load it"
        yield noted("config", what, CONFIG)
    if block.value("desc_act") is True and block.value("group_size") != WHOLE_ROWS:
        what = "`desc_act` is true, which vLLM 0.32 refuses; gptqmodel and transformers load it"
        yield noted("config", what, CONFIG)
    names = block.value("modules_in_block_to_quantize")
    if names is not None and not _only_names(names):
        yield _wrong(f"`modules_in_block_to_quantize` is {names!r:.60}, not a list of names")
    rules = block.object_of("dynamic") or Settings({})
    if not isinstance(given := block.value("dynamic"), dict | None):
        yield _wrong(f"`dynamic` is {given!r:.60}, not an object")
    for fault in expression_faults(map(_without_sign, rules)):
        yield _wrong(f"`dynamic`: {fault}")
    for pattern in rules:
        changes = rules.object_of(pattern)
        if changes is None:
            value = f"{rules.value(pattern)!r:.40}"
            yield _wrong(f"`dynamic` has {value} for {pattern!r:.60}, not an object")
        elif not pattern.startswith("-:"):
            yield from _wrong_numbers(f"`dynamic`, {pattern!r:.60}: ", changes)
            if (bits := changes.value("bits")) not in (None, 4, 8):
                yield _wrong(f"`dynamic`, {pattern!r:.60}: {bits!r:.20} bits, which vLLM does not have")


def _wrong_numbers(place: str, table: Settings) -> Iterator[Finding]:
    """Findings for bits, group_size, desc_act and sym of another type than engines take."""
    bits, group = table.value("bits"), table.value("group_size")
    if "bits" in table and (type(bits) is not int or not 0 < bits < 32):
        yield _wrong(f"{place}`bits` is {bits!r:.40}")
    whole = type(group) is int and (group == WHOLE_ROWS or 0 < group < _WHOLE)
    if "group_size" in table and not whole:
        yield _wrong(f"{place}`group_size` is {group!r:.40}")
    for key in ("sym", "desc_act"):
        if key in table and type(table.value(key)) is not bool:
            yield _wrong(f"{place}`{key}` is {table.value(key)!r:.40}, not true or false")


def _only_names(names: Any) -> bool:
    lists = isinstance(names, list) and [one for one in names if isinstance(one, list)]
    words = [one for one in names if not isinstance(one, list)] if isinstance(names, list) else [0]
    words += [name for one in lists or [] for name in one]
    return all(isinstance(word, str) for word in words)


def _wrong(what: str) -> Finding:
    return failed("config", f"quantization_config {what}", CONFIG, AGAIN)
