"""Scales of the cache of keys and values: the layers that have one, and the names of its tensors.

A layer of attention is known by the name of its module, such as `model.layers.0.self_attn`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.head import generates
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.roles import Role
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import LATENTS, Cache
from quantcli.core.text import count
from quantcli.targets.layouts import Values

CachePart: TypeAlias = Literal["k_scale", "v_scale", "q_scale", "k_offset", "v_offset", "q_offset"]
CHECK = "cache"  # of verify
_FIX = "convert the model again, or measure it again with `kv_cache` in the recipe"
# Last parts of the names of modules that give keys, keys and values, or latents of both.
_KEYS = frozenset({"k_proj", "key", "key_proj", "wk", "k_lin", "k"})
_FUSED = frozenset(
    {"qkv_proj", "query_key_value", "Wqkv", "wqkv", "qkv", "c_attn", "W_pack", "att_proj", "kv_proj"}
)
_LATENT = frozenset({"kv_a_proj_with_mqa", "kv_b_proj", "fused_qkv_a_proj_with_mqa"})
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
LATENT = (
    "vLLM 0.32 loads no scale for a cache of latents: it renames `k_scale` twice, to a name that no "
    "parameter has (its base_config.py:217-249 and weight_utils.py:1599-1708), and serves with 1.0"
)


@dataclass(frozen=True)
class AttentionLayer:
    """A module of attention that writes keys and values into the cache, or latents of both.

    heads:   of keys and values; 1 for latents.
    widths:  numbers of the keys of a token, and of its values, in all heads; of its latent, twice.
    queries: heads of queries, if latents are cached; else 0.
    """

    name: str
    heads: int
    widths: tuple[int, int]
    queries: int = 0


@dataclass(frozen=True)
class CacheTensor:
    """A tensor that a target stores for each layer of attention.

    part:   its content: `k_scale`, `v_scale`, that of queries, or an offset, which is 0.
    name:   the name of a layer -> that of the tensor.
    shape:  from the heads, and the width of all of them.
    values: the rule for its numbers.
    dtype:  in which it is stored.
    """

    part: CachePart
    name: Callable[[str], str]
    shape: Callable[[int, int], tuple[int, ...]]
    values: Values = "positive"
    dtype: str = "F32"

    def shape_of(self, layer: AttentionLayer) -> tuple[int, ...]:
        """Its shape for a layer."""
        heads = layer.queries if self.part[0] == "q" else layer.heads
        return self.shape(heads, layer.widths[self.part[0] == "v"])


def plain_name(layer: str, part: str) -> str:
    """`k_scale` of a layer as vLLM finds it: it puts `.attn` before it, unless that is there.

    Source: vllm 0.32.0, model_executor/layers/quantization/base_config.py:217-249.
    """
    return f"{layer}.attn.{part}" if layer.endswith(".attn") else f"{layer}.{part}"


def plain_tensors(shape: Callable[[int, int], tuple[int, ...]]) -> tuple[CacheTensor, ...]:
    """`k_scale` and `v_scale` of a layer, of one shape."""
    return (
        CacheTensor("k_scale", lambda layer: plain_name(layer, "k_scale"), shape),
        CacheTensor("v_scale", lambda layer: plain_name(layer, "v_scale"), shape),
    )


def not_alone() -> InputError:
    """The error of a format that does not describe a model whose cache alone is quantized."""
    what = "this format has no config for a model whose cache alone is quantized"
    return InputError(what, fix="use `target: compressed-tensors`, or quantize some weights, too")


# -- the layers of a model -----------------------------------------------------------------------


def attention_layers(
    checkpoint: Checkpoint, roles: Mapping[str, Role], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, AttentionLayer]:
    """The layers that have a cache of their own, by name. Towers and draft layers are left out.

    shapes: of weights, by module. InputError for a model whose cache this version does not know, with
    the reason: an encoder, sizes that config.json does not give.
    """
    config, where = checkpoint.text_config, str(checkpoint.path)
    if checkpoint.config.flag("is_encoder_decoder") or not generates(checkpoint):
        what = "this model has an encoder, whose attention is not that of a decoder with one cache"
        raise InputError(what, where=where, fix="leave `kv_cache` out")
    found: dict[str, str] = {}
    for module, role in roles.items():
        parent, _, last = module.rpartition(".")
        if role != "attention" or parent.endswith("indexer"):
            continue
        kind = found.get(parent, "").rpartition(".")[2]
        if last in _LATENT or (
            kind not in _LATENT and (last in _KEYS or (last in _FUSED and not kind))
        ):
            found[parent] = module
    owners = [name for name in found if not _shares(name, config)]
    if not owners:
        what = "no layer of attention with keys and values of its own was found"
        raise InputError(what, where=where, fix="leave `kv_cache` out")
    return {name: _layer(name, found[name], shapes, config) for name in owners}


def _shares(name: str, config: Settings) -> bool:
    """Whether a layer reads the cache of an earlier one: the last `num_kv_shared_layers`."""
    shared, layers = config.size("num_kv_shared_layers"), config.size("num_hidden_layers")
    number = _LAYER.search(f"{name}.")
    if shared is None or layers is None or number is None:
        return False
    return int(number[1]) >= layers - shared


def _layer(
    name: str, keys: str, shapes: Mapping[str, tuple[int, ...]], config: Settings
) -> AttentionLayer:
    """The sizes of a layer; keys: the module that gives them."""
    if keys.rpartition(".")[2] in _LATENT:
        return _of_latents(name, shapes.get(f"{name}.kv_b_proj", ()), config)
    rows = shapes[keys][0] if len(shapes.get(keys, ())) == 2 else 0
    if keys.rpartition(".")[2] in _KEYS:
        width, heads = rows, _heads_of(rows, config)
    else:  # some configs count heads that queries share as those of keys
        queries = 0 if keys.endswith(".kv_proj") else _whole(config, *_QUERIES)
        head = _head_size(config)
        heads, rest = divmod(rows - queries * head, 2 * head) if head else (0, 0)
        width = 0 if rest else heads * head
    if width <= 0 or not heads or width % heads:
        what = f"config.json gives no number of heads that divides the {width} numbers of a key"
        raise InputError(what, where=f"`{name}`", fix="leave `kv_cache` out")
    values = keys.rpartition(".")[0] + "." + _VALUES.get(keys.rpartition(".")[2], "")
    shape = shapes.get(values, ())
    return AttentionLayer(name, heads, (width, shape[0] if len(shape) == 2 else width))


def _of_latents(name: str, shape: tuple[int, ...], config: Settings) -> AttentionLayer:
    """The sizes of a layer that caches latents; shape: of the weight that reads them."""
    rank, heads = _whole(config, "kv_lora_rank"), _whole(config, "num_attention_heads")
    keys, values = _whole(config, "qk_nope_head_dim"), _whole(config, "v_head_dim")
    if 0 in (rank, heads, keys, values) or shape != (heads * (keys + values), rank):
        what = (
            f"its cache is of latents, and its kv_b_proj {list(shape)} is not of the sizes in "
            f"config.json: {heads} heads of {keys} + {values}, kv_lora_rank {rank}"
        )
        raise InputError(what, where=f"`{name}`", fix="leave `kv_cache` out")
    return AttentionLayer(name, 1, (rank, rank), heads)


_QUERIES = ("num_attention_heads", "n_head", "num_heads", "n_heads")
# Of layers of another kind, with sliding windows or without them.
_OTHER_HEADS = ("swa_num_key_value_heads", "num_global_key_value_heads")
_OTHER_SIZES = ("swa_head_dim", "global_head_dim")


def _head_size(config: Settings) -> int:
    """Numbers of a query of a head; 0 if config.json does not say."""
    queries, hidden = _whole(config, *_QUERIES), _whole(config, "hidden_size", "n_embd", "d_model")
    return _whole(config, "head_dim") or (hidden // queries if queries else 0)


def _heads_of(width: int, config: Settings) -> int:
    """The heads of keys of `width` numbers in all; 0 if config.json does not say.

    Layers of a model may differ in heads and in their size: those of which the product is the width.
    """
    heads = _whole(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", *_QUERIES)
    table = config.table("attn_config")
    if not heads and table is not None:  # dbrx
        heads = _whole(table, "kv_n_heads")
    sizes = {_head_size(config), *(_whole(config, key) for key in _OTHER_SIZES)}
    for each in (heads, *(_whole(config, key) for key in _OTHER_HEADS)):
        if each and width % each == 0 and width // each in sizes:
            return each
    size = _whole(config, "head_dim")
    return width // size if size and not width % size else heads


_VALUES = {"k_proj": "v_proj", "key": "value", "key_proj": "value_proj", "wk": "wv", "k_lin": "v_lin",
           "k": "v"}  # fmt: skip


def _whole(config: Settings, *keys: str) -> int:
    """The first of some keys that is a number of things; 0 if none is."""
    numbers = (config.size(key) for key in keys)
    return next((n for n in numbers if n and n < 2**20), 0)


# -- scales on disk ------------------------------------------------------------------------------

# Spellings of producers, the layer first. Sources: vllm 0.32.0, as for `plain_name`;
# vllm-ascend 182b75ea84, quantization/modelslim_config.py:624-643.
_SPELLINGS = (
    re.compile(r"(?P<layer>.+?)(?:\.attn)?\.(?P<part>[kv]_(?:scale|zero_point))"),
    re.compile(r"(?P<layer>.+)\.[kv]_proj\.(?P<part>[kv]_scale)"),
    re.compile(r"(?P<layer>.+)\.qkv_proj\.(?P<part>[kv]_scale)"),
    re.compile(r"(?P<layer>.+)\.(?P<side>[kv])_proj\.(?:output_(?P<kind>scale))"),
    re.compile(r"(?P<layer>.+)\.(?P<side>[kv])_cache\.(?P<kind>scale)"),
    re.compile(r"(?P<layer>.+)\.(?P<side>[kv])_proj\.kv_cache_(?P<kind>scale|offset)"),
    re.compile(r"(?P<layer>.+)\.fa_(?P<side>[kvq])\.(?P<kind>scale|offset)"),
)
_PARTS: Mapping[str, CachePart] = {
    "k_scale": "k_scale", "v_scale": "v_scale", "k_offset": "k_offset", "v_offset": "v_offset",
    "k_zero_point": "k_offset", "v_zero_point": "v_offset", "q_scale": "q_scale",
    "q_offset": "q_offset",
}  # fmt: skip


def part_of(name: str) -> tuple[str, CachePart] | None:
    """The layer of a tensor of the cache, and its part; None for any other tensor."""
    for spelling in reversed(_SPELLINGS):
        if match := spelling.fullmatch(name):
            groups = match.groupdict()
            part = groups.get("part") or f"{groups['side']}_{groups['kind']}"
            return groups["layer"], _PARTS[part]
    return None


def is_scale(name: str) -> bool:
    """Whether a tensor of the cache is a scale, of keys, values or queries, and no offset."""
    return name.endswith("scale")


@dataclass(frozen=True)
class StoredCache:
    """The scales of the cache of a checkpoint, of any producer.

    cache:  its numerics; None if their shapes do not tell them.
    layers: parts of each layer.
    served: whether the engine quantizes its cache because the checkpoint says so.
    attention: the layers of the model, if they are known.
    """

    cache: Cache | None
    layers: Mapping[str, Mapping[CachePart, StoredTensor]] = field(default_factory=dict)
    served: bool = False
    attention: Mapping[str, AttentionLayer] = field(default_factory=dict)

    @property
    def tensors(self) -> list[StoredTensor]:
        """All of them."""
        return [stored for parts in self.layers.values() for stored in parts.values()]


def stored_cache(
    tensors: Mapping[str, StoredTensor], served: Cache | None = None
) -> StoredCache | None:
    """The scales among some tensors; None if there are none and none are needed.

    served: what the checkpoint says of its cache.
    """
    layers: dict[str, dict[CachePart, StoredTensor]] = defaultdict(dict)
    for name, stored in tensors.items():
        if (found := part_of(name)) is not None:
            layers[found[0]][found[1]] = stored
    if not layers and served is None:
        return None
    return StoredCache(served or _cache_of(tensors, layers), layers, served is not None)


def _cache_of(
    tensors: Mapping[str, StoredTensor], layers: Mapping[str, Mapping[CachePart, StoredTensor]]
) -> Cache | None:
    """The numerics by the names and shapes of scales."""
    scales = [parts[part] for parts in layers.values() for part in parts if part.endswith("_scale")]
    if any(stored.spec.name.endswith("kv_cache_scale") for stored in scales):
        return Cache("int8", "channel")
    if any(stored.spec.name.endswith(".fa_k.scale") for stored in scales):
        return LATENTS
    if all(stored.spec.numel == 1 for stored in scales):
        return Cache("fp8_e4m3", "tensor")
    heads = {stored.spec.shape[1:] for stored in scales}
    return Cache("fp8_e4m3", "head") if heads == {(1, 1)} else None


def sides_of(cache: Cache | None) -> tuple[CachePart, ...]:
    """The scales that an engine computes with: of latents, keys and values have one."""
    return ("k_scale",) if cache == LATENTS else ("k_scale", "v_scale")


_LATENT_PARTS = frozenset(get_args(CachePart))


def check_cache(
    stored: StoredCache, layers: Mapping[str, AttentionLayer], names: Collection[str]
) -> Iterator[Finding]:
    """Findings of the scales of a cache: those that are missing, too many, or of a wrong shape.

    layers: those of the model. names: of all tensors.
    """
    if stored.cache is None:
        first = stored.tensors[0].spec
        yield failed(
            CHECK, f"is {first}: no engine takes scales of this shape", f"`{first.name}`", _FIX
        )
        return
    if not stored.layers:
        what = f"the cache is declared {stored.cache}, and no file holds a scale: the engine takes 1.0"
        yield failed(CHECK, what, fix=_FIX)
        return
    for name, parts in stored.layers.items():
        if name not in layers:
            name_of_first = next(iter(parts.values())).spec.name
            what = (
                f"`{name}` has no keys and values of its own, so that the engine has no place for this"
            )
            yield failed(CHECK, what, f"`{name_of_first}`", _FIX)
            continue
        for part, tensor in parts.items():
            yield from _shape(stored.cache, part, tensor, layers[name])
        if stored.cache == LATENTS and (lost := _LATENT_PARTS - parts.keys()):
            what = f"{' and '.join(sorted(lost))} of this layer is missing: the engine reads memory"
            yield failed(CHECK, what, f"`{name}`", _FIX)
    for name in layers:
        parts = stored.layers.get(name, {})
        absent = [part for part in ("k_scale", "v_scale") if part not in parts]
        if absent and stored.cache != LATENTS:  # those of a layer without scales stay float
            what = f"{' and '.join(absent)} of this layer is missing: the engine takes 1.0 in silence"
            yield failed(CHECK, what, f"`{name}`", _FIX)
    twice: dict[tuple[str, str], str] = {}
    for name in names:
        if (found := part_of(name)) is not None and (other := twice.setdefault(found, name)) != name:
            what = f"`{other}` is there as well: the engine keeps one of both, whichever it reads last"
            yield failed(CHECK, what, f"`{name}`", _FIX)


def _shape(
    cache: Cache, part: CachePart, tensor: StoredTensor, layer: AttentionLayer
) -> Iterator[Finding]:
    spec, width = tensor.spec, layer.widths[part[0] == "v"]
    sizes = {"tensor": {1}, "head": {layer.heads}, "channel": {1, width}}[cache.per]
    if part[0] == "q":
        sizes = {layer.queries}
    elif cache.per != "channel" and part.endswith("_offset"):
        sizes = {1, layer.heads}
    if cache == LATENTS and part.endswith("_offset"):
        if spec.dtype != "I8":
            yield failed(CHECK, f"is {spec}, and the engine reads I8", f"`{spec.name}`", _FIX)
    elif cache.per != "channel" and part.endswith("_offset"):
        pass
    elif spec.dtype not in FLOATS:
        yield failed(CHECK, f"is {spec}, and the engine reads floats", f"`{spec.name}`", _FIX)
    if spec.numel not in sizes:
        expected = " or ".join(map(str, sorted(sizes)))
        what = f"is {spec}; a cache in {cache} has {expected} here"
        yield failed(CHECK, what, f"`{spec.name}`", _FIX)


def unused(stored: StoredCache) -> Finding:
    """The note on scales that the engine does not use by itself."""
    what = (
        f"{count(stored.tensors, 'scale')} of the cache, which stays float unless the engine is "
        "started with --kv-cache-dtype fp8"
    )
    return noted(CHECK, what, f"`{stored.tensors[0].spec.name}`")
