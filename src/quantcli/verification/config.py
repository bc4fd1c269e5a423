"""config.json: its dtypes, tied embeddings, and its keys one by one against another model's.

Engines build the model from it: sizes, positions, activations and dtypes all come from these keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint
from quantcli.checkpoint.config.places import QUANTIZATION_KEYS, TEXT
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.head import head_weight
from quantcli.checkpoint.spec import FLOAT_NAMES, FLOATS
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.text import count
from quantcli.targets.base import StoredCheckpoint
from quantcli.targets.layouts import own_names
from quantcli.targets.sidecars import declared_dtype, named_dtype, quantization_block

_DTYPE_KEYS = ("dtype", "torch_dtype")  # of new and of old versions of transformers
_SERVED = frozenset({"BF16", "F16"})
# A recipe for an engine that serves in float16 alone: the ascend target's option.
_FLOAT16_ALONE = re.compile(r"\bdevice\b\W+310P\b")
_ABSENT = object()
# Keys that tell of the program that saved a file.
OF_PRODUCER = frozenset({"transformers_version", "_name_or_path"})
_ROPE = "rope_parameters"
_OLD_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def check_dtypes(stored: StoredCheckpoint, manifest: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Dtypes of config.json against each other, the manifest's serving dtype and the stored floats.

    Errors if the manifest says otherwise, else notes. A dtype in which nothing is served is an error of
    the format's own checks.
    """
    config = stored.checkpoint.config
    declared = declared_dtype(config)
    serving = next((d for d in _SERVED if manifest and manifest.get("serving_dtype") == d), None)
    expected = serving or declared
    for level in _text_levels(config):
        for key in _DTYPE_KEYS:
            dtype = named_dtype(level.value(key))
            if dtype in {None, expected} or dtype == declared not in _SERVED:
                continue
            what = f"`{level.key_path(key)}` is {level.value(key)!r:.40}; "
            if serving:
                what += f"the manifest says that the model is served in {serving}"
                yield failed("config", what, CONFIG, f"set it to {_name(serving)}")
            else:
                what += f"another key says {expected}: engines differ in the one that they read"
                yield noted("config", what, CONFIG)
    yield from _rounded(stored, declared)


def _rounded(stored: StoredCheckpoint, serving: str | None) -> Iterator[Finding]:
    """A note on float tensors that the engine rounds when it loads them."""
    if serving not in _SERVED:
        return
    tensors = stored.checkpoint.tensors
    quantized = {f"{module}.weight" for module in [*stored.modules, *stored.unchecked]}
    names = own_names(tensors, stored.modules, stored.unchecked) - quantized
    dtypes = FLOATS - {serving, "F32"}
    rounded = [name for name, t in tensors.items() if t.spec.dtype in dtypes and name in names]
    if rounded:
        dtype, rest = tensors[rounded[0]].spec.dtype, len(rounded) - 1
        more = f", like {count(rest, 'other tensor')}" if rest else ""
        what = f"is {dtype}{more}; the model is served in {serving}, to which it is rounded"
        yield noted("config", what, f"`{rounded[0]}`")


def check_tied(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A note for a head that is stored though config.json says, at either level, that it is tied."""
    head = head_weight(stored.spec for stored in checkpoint.tensors.values())
    for level in _text_levels(checkpoint.config):
        if head and level.flag("tie_word_embeddings"):
            what = (
                f"`{level.key_path('tie_word_embeddings')}` is true, and `{head}` is stored: engines "
            )
            what += "that read this key leave it out, and take the embeddings for a head"
            yield noted("config", what, CONFIG)


def compare_config(
    ours: Checkpoint, reference: Checkpoint, manifest: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Findings for each key that is not the other model's, but for those that a conversion sets.

    They are the quantization that engines read, and the dtype if the other model's is not served.
    manifest: of the checkpoint, if it has one: its recipe may be for an engine of one dtype.
    """
    try:
        return list(_compare_config(ours, reference, manifest))
    except RecursionError:
        what = f"{CONFIG} is nested too deeply to be compared"
        return [failed("source", what, str(ours.path), "take the other model's file")]


def _compare_config(
    ours: Checkpoint, reference: Checkpoint, manifest: Mapping[str, Any] | None
) -> Iterator[Finding]:
    config, others = ours.config.plain(), reference.config.plain()
    first, second = config, others
    if manifest is None:  # saved by another producer
        first, second = ({k: v for k, v in c.items() if k not in OF_PRODUCER} for c in (first, second))
        if len({any(_ROPE in part for part in _text_levels(c.config)) for c in (ours, reference)}) > 1:
            first, second = _with_rope(first), _with_rope(second)
    yield from _differences(first, second)
    yield from _added_quantization(ours.config, others)
    serving = _serving(reference, manifest)
    places = {part.key_path("") for part in _text_levels(ours.config)}
    levels = dict(_levels(others))
    for place, level in _levels(config):
        of_text = place.removesuffix(".") in places
        yield from _dtypes(place, level, levels.get(place, {}), serving if of_text else None)


def _dtypes(
    place: str, level: Mapping[str, Any], other: Mapping[str, Any], serving: Collection[str] | None
) -> Iterator[Finding]:
    """Findings for the dtypes of one level; serving: those that the language model may have."""
    values = [other[key] for key in _DTYPE_KEYS if isinstance(other.get(key), str)]
    dtypes = {value.removeprefix("torch.") for value in values}
    for key in _DTYPE_KEYS:
        if key not in level:
            continue
        value = level[key]
        if serving is not None and named_dtype(value) is not None:
            same = named_dtype(value) in serving
        elif isinstance(value, str):
            same = value.removeprefix("torch.") in dtypes
        else:
            same = _same(value, other.get(key, _ABSENT))
        if not same:
            right = " or ".join(map(_name, sorted(serving))) if serving else _text(dtypes)
            what = f"`{place}{key}` is {value!r:.40} in {CONFIG}; by the other model it is {right}"
            yield failed("source", what, CONFIG, "set it to that" if right != "absent" else "remove it")
    if dtypes and not any(key in level for key in _DTYPE_KEYS):
        what = f"`{place}{_DTYPE_KEYS[0]}` is missing in {CONFIG}; in the other model it is "
        yield failed("source", what + _text(dtypes), CONFIG, "set it to that")


def _differences(ours: Any, reference: Any, place: str = "") -> Iterator[Finding]:
    """Findings for keys that differ, at any level, without dtypes and quantization."""
    for key in sorted({*ours, *reference} - {*_DTYPE_KEYS, *QUANTIZATION_KEYS}):
        value, other = ours.get(key, _ABSENT), reference.get(key, _ABSENT)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(value, other, f"{place}{key}.")
        elif other is _ABSENT:
            what = f"`{place}{key}` is {value!r:.60} in {CONFIG}; the other model has no such key"
            yield failed("source", what, CONFIG, "remove it")
        elif value is _ABSENT:
            what = f"`{place}{key}` is missing in {CONFIG}; in the other model it is {other!r:.60}"
            yield failed("source", what, CONFIG, "take the other model's value")
        elif not _same(value, other):
            what = (
                f"`{place}{key}` is {value!r:.60} in {CONFIG}, not {other!r:.60} as in the other model"
            )
            yield failed("source", what, CONFIG, "take the other model's value")


def _with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `rope_parameters`, at each level, in place of three keys of older versions.

    Source: transformers 5.23, modeling_rope_utils.py, standardize_rope_params.
    """
    own = {*_OLD_ROPE, _ROPE}
    table = {k: _with_rope(v) if isinstance(v, dict) and k not in own else v for k, v in config.items()}
    rope: dict[str, Any] = {}
    for block in (table.get("rope_scaling"), table.get(_ROPE)):
        rope |= block if isinstance(block, dict) else {}
    if any(isinstance(value, dict) for value in rope.values()):  # one for each type of layer
        return table
    numbers = {key: table.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope |= {key: value for key, value in numbers.items() if value is not None}
    if not rope:
        return table
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    return {k: v for k, v in table.items() if k not in _OLD_ROPE} | {_ROPE: rope}


def _added_quantization(ours: Settings, reference: dict[str, Any]) -> Iterator[Finding]:
    """Findings for quantization that is neither the one that engines read nor the other model's."""
    block, others = quantization_block(ours).place, dict(_levels(reference))
    for place, level in _levels(ours.plain()):
        for key in QUANTIZATION_KEYS:
            added = key in level and f"{place}{key}" != block
            if added and not _same(level[key], others.get(place, {}).get(key, _ABSENT)):
                what = f"`{place}{key}` is not in the other model, and engines read another block"
                yield failed("source", what, CONFIG, "remove it")


def _serving(reference: Checkpoint, manifest: Mapping[str, Any] | None) -> frozenset[str]:
    """The dtypes in which a conversion of a model may be served."""
    declared = declared_dtype(reference.config)
    if manifest is not None and _FLOAT16_ALONE.search(str(manifest.get("recipe"))):
        return frozenset({"F16"})
    if declared in _SERVED:
        return frozenset({declared})
    return frozenset({"BF16"}) if manifest is not None and declared == "F32" else _SERVED


def _levels(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object of config.json with its place, such as `text_config.`; at the top it is empty."""
    yield place, config
    for key, value in config.items():
        if isinstance(value, dict) and key not in QUANTIZATION_KEYS:
            yield from _levels(value, f"{place}{key}.")


def _text_levels(config: Settings) -> Iterator[Settings]:
    """The two levels at which engines look for the language model."""
    yield config
    if (nested := config.table(TEXT)) is not None:
        yield nested


def _same(value: Any, other: Any) -> bool:
    """Whether two JSON values are the same: NaN is itself, true is not 1, 1 is 1.0."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return bool(value == other or (value != value and other != other))


def _name(dtype: str) -> str:
    """`bfloat16` of BF16."""
    return next(name for name, short in FLOAT_NAMES.items() if short == dtype)


def _text(dtypes: Collection[str]) -> str:
    return " or ".join(sorted(dtypes)) if dtypes else "absent"
