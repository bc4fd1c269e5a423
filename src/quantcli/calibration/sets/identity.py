"""What the statistics of a calibration depend on: not the recipe and its target, but what they ask.

Statistics of a module depend on the model, the text, the inputs of its layer, the edits of weights
before it is measured, and on what is measured of it. A calibration serves each recipe that asks for no
more than it holds.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcli.calibration.methods.base import methods_of
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.tensors import read_bytes
from quantcli.core.text import count
from quantcli.core.untrusted.tables import Table
from quantcli.planning.plan import Plan, Quantize, quantized_items
from quantcli.recipe.fields import Calibration

_SAMPLED = 4096  # tensors of which some bytes are looked at, and how many bytes of each
_QUANTIZED = "the modules that are quantized"
_CONTEXT = {"siblings", "layer", "serving_dtype", "sizes"}  # on what else that depends


@dataclass(frozen=True)
class Key:
    """The identity of a calibration; all of it is JSON-able.

    model, data: sha256.
    inputs:      what else decides what layers are given, by name: options of the text and the replay;
                 with `inputs: quantized` or `running` all of the recipe.
    edits:       what decides how weights are edited before they are measured, by name.
    options:     other options that statistics may depend on, by name.
    modules:     sha256 of what is measured of a module, by its name; layers of attention among them.
    measured:    what that is, by its sha256.
    """

    model: str
    data: str
    inputs: Mapping[str, Any]
    edits: Mapping[str, Any]
    options: Mapping[str, Any]
    modules: Mapping[str, str]
    measured: Mapping[str, Any] = field(compare=False, default_factory=dict)

    @classmethod
    def parse(cls, table: Table) -> Key:
        """The key that a file holds. InputError for a value of another type."""
        modules = table.table("modules")
        return cls(
            model=table.text("model"),
            data=table.text("data"),
            inputs=table.table("inputs").value,
            edits=table.table("edits").value,
            options=table.table("options").value,
            modules={name: modules.text(name) for name in modules},
            measured={name: what.value for name, what in table.tables("measured").items()},
        )

    @property
    def digest(self) -> str:
        """sha256 of all of it."""
        return digest_of([self.model, self.data, self.inputs, self.edits, self.options, self.modules])

    @property
    def float_inputs(self) -> bool:
        """Whether layers are given outputs of float layers, the same for all recipes."""
        return self.inputs.get("calibration.inputs") == "float"

    def serves(self, other: Key) -> bool:
        """Whether a calibration of this key holds all that `other` asks for, to the last bit."""
        return self.made_from(other) and other.modules.items() <= self.modules.items()

    def made_from(self, other: Key) -> bool:
        """Whether statistics of the same observer would be the same."""
        return self.difference(other) is None and self.options == other.options

    def difference(self, other: Key) -> str | None:
        """What keeps statistics of this key from serving `other`, as text; None if nothing does but
        options, and what is measured."""
        if self.model != other.model:
            return "another model"
        if (name := first_other(self.inputs, other.inputs)) is not None:
            return f"other inputs: {_change(name, self.inputs, other.inputs)}"
        if self.data != other.data:
            return "other data, or of another tokenizer"
        if (name := first_other(self.edits, other.edits)) is not None:
            return f"other edits: {_change(name, self.edits, other.edits)}"
        return None

    def missing(self, other: Key) -> str:
        """What `other` asks for and this key has not, as text; empty if there is nothing."""
        lacking = [m for m, digest in other.modules.items() if self.modules.get(m) != digest]
        if not self.made_from(other) or not lacking:
            return ""
        here, asked = (key.measured.get(key.modules.get(lacking[0], ""), {}) for key in (self, other))
        names = [name for name, options in asked.items() if here.get(name) != options]
        what = [name for name in names if name not in _CONTEXT] or ["statistics"]
        more = f" and {count(len(lacking) - 1, 'other module')}" if len(lacking) > 1 else ""
        return f"{' and '.join(what)} of `{lacking[0]}`{more}"


def first_other(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first name whose value differs; None if none does."""
    names = [*now, *sorted(before.keys() - now.keys())]
    return next((name for name in names if before.get(name) != now.get(name)), None)


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    method = name.partition(".")[0]
    with_it = [any(key.partition(".")[0] == method for key in table) for table in (before, now)]
    if "." in name and method != "calibration" and with_it[0] != with_it[1]:
        value = f"{name} {before.get(name, now.get(name))}"
        if with_it[1]:
            return f"made without `{method}`; this recipe has it ({value})"
        return f"made with `{method}` ({value}); this recipe does without"
    values = [table.get(name, "not there") for table in (before, now)]
    if name.startswith("the ") or not all(isinstance(value, str | int | float) for value in values):
        return f"{name} differ"
    return f"{name} was {values[0]}, is {values[1]}"


def key_of(plan: Plan, block: Calibration, dtype: str, *, data: str, batch: int) -> Key:
    """The key of a plan's calibration. The plan was made without statistics.

    block: the recipe's `calibration`. dtype: to compute in. data: sha256 of the text and how it is cut.
    batch: samples of a batch.
    """
    names = ("samples", "length", "seed", "pack", "inputs", "all_tokens")
    inputs: dict[str, Any] = {f"calibration.{name}": getattr(block, name) for name in names}
    inputs["calibration.dtype"] = dtype
    inputs["samples of a batch"] = batch
    if block.inputs != "float":
        inputs |= _all_of(plan)
    modules, measured = _measured(plan, block)
    return Key(
        model=content_digest(plan.checkpoint),
        data=data,
        inputs=plain(inputs),
        edits=edits_of(plan),
        options=plain(_options(plan, block)),
        modules=modules,
        measured=measured,
    )


def _all_of(plan: Plan) -> dict[str, Any]:
    """All of a recipe that decides the outputs of quantized layers."""
    target = plan.recipe.target
    found: dict[str, Any] = {"target": [target.name, target.model_dump(mode="json")]}
    if plan.recipe.file.siblings:
        found["siblings"] = plan.recipe.file.siblings
    found["the serving dtype"] = plan.serving_dtype
    found |= _methods(plan, editing=False)
    found[f"{_QUANTIZED}, and how"] = _schemes(plan)
    return found


def edits_of(plan: Plan) -> dict[str, Any]:
    """What decides how a plan's methods edit weights, by name; empty if none edits."""
    if not any(method.edits for method in methods_of(plan)):
        return {}
    found = _methods(plan, editing=True)
    by_schemes = any(method.edits and method.by_schemes for method in methods_of(plan))
    names = [item.module for item in quantized_items(plan)]
    # a float module may read channels that are scaled
    found[_QUANTIZED] = _schemes(plan) if by_schemes else digest_of(dict.fromkeys(names))
    values: dict[str, Any] = plain(found)
    return values


def _methods(plan: Plan, *, editing: bool) -> dict[str, Any]:
    """The options of the recipe's methods that edit, or do not, by name."""
    methods = [method for method in methods_of(plan) if method.edits == editing and not method.cache]
    named = {
        method.name: method.model_dump(mode="json") for method in methods if not method.for_schemes
    }
    found: dict[str, Any] = {}
    if len(named) > 1 or not all(named.values()):  # options name a method, and order is to be named
        found["methods"] = list(named)
    for name, values in named.items():
        found |= {f"{name}.{key}": value for key, value in values.items()}
    return found


def _options(plan: Plan, block: Calibration) -> dict[str, Any]:
    found = {"calibration.uncalibrated": block.uncalibrated, **_methods(plan, editing=False)}
    if block.uncalibrated in {"nearest", "group"}:  # what a module takes depends on who else has it
        found["the modules that are measured"] = _schemes(plan)
    return found


def _measured(plan: Plan, block: Calibration) -> tuple[dict[str, str], dict[str, Any]]:
    """What is measured of each module, as sha256, and what that is."""
    groups: dict[str, list[str]] = defaultdict(list)
    items = {item.module: item for item in quantized_items(plan)}
    for module in items:
        if (name := plan.siblings.group(module)) is not None:
            groups[name].append(module)
    modules, measured = dict[str, str](), dict[str, Any]()
    digests: dict[Any, str] = {}  # experts come in tens of thousands
    methods = methods_of(plan)
    whole = _schemes(plan) if any(method.by_layer for method in methods) else ""
    for module, item in items.items():
        if not item.scheme.methods:
            continue
        by_layer = any(m.by_layer and m.name in item.scheme.methods for m in methods)
        group = groups.get(plan.siblings.group(module) or "", [])
        joined = item.scheme.needs_weight_amax and item.scheme.rounded_by_data
        joined |= plan.siblings.given_to(module)
        shared = tuple(group) if joined and len(group) > 1 else ()
        place = item.scheme, item.engine_dtypes, by_layer, shared
        if place not in digests:
            what: dict[str, Any] = {
                method.name: plain(method.measured(item.scheme, *item.engine_dtypes))
                for method in methods
                if method.name in item.scheme.methods
            }
            what |= {"siblings": digest_of(shared)} if shared else {}
            what |= {"layer": [whole, block.seed]} if by_layer else {}
            digests[place] = digest_of(what)
            measured[digests[place]] = what
        modules[module] = digests[place]
    if plan.cache is not None and plan.cache.measured:
        named = {m.name: m.model_dump(mode="json") for m in methods if m.cache}
        for name, layer in plan.cache.layers.items():
            sizes = [layer.heads, list(layer.widths), layer.queries]
            what = plain({**named, "serving_dtype": plan.serving_dtype, "sizes": sizes})
            modules[name] = digest_of(what)
            measured[modules[name]] = what
    return modules, measured


def _schemes(plan: Plan) -> str:
    """sha256 of which modules are quantized, and how."""
    return digest_of({item.module: _scheme(item) for item in quantized_items(plan)})


def _scheme(item: Quantize) -> Any:
    return [item.scheme.name, item.scheme.model_dump(mode="json"), list(item.engine_dtypes)]


def plain(value: Any) -> Any:
    """The same as it is after it was written as JSON and read."""
    return json.loads(json.dumps(value))


def digest_of(value: Any) -> str:
    """sha256 of JSON-able data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_digest(checkpoint: Checkpoint) -> str:
    """sha256 of the headers, of the rotation, and of some bytes of many tensors: tells a model from one
    tuned from it."""
    digest = hashlib.sha256(checkpoint.fingerprint.encode())
    if checkpoint.rotation is not None:
        digest.update(checkpoint.rotation["digest"].encode())
    tensors = list(checkpoint.on_disk.values())
    step = -(-len(tensors) // _SAMPLED)
    for stored in tensors[:: max(1, step)]:
        size = min(_SAMPLED, stored.spec.nbytes)
        digest.update(read_bytes(stored, (stored.spec.nbytes - size) // 2, size))
    return digest.hexdigest()
