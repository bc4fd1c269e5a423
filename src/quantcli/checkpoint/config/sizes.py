"""config.json against the shapes of tensors: an engine allocates parameters by the one, and fills them
from the other. What contradicts is an error before anything is built."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from quantcli.checkpoint.config.places import CONFIG, language_model
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import of_draft
from quantcli.checkpoint.spec import FLOATS, TensorSpec
from quantcli.core.errors import InputError

FIX = "take config.json of the model that these tensors belong to"
Shapes = Mapping[str, tuple[int, ...]]  # of weights that are float, or decoded, by module

# Keys for the number of layers, and for those of drafts, stored after the others.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
           "num_decoder_layers", "num_transformer_layers")  # fmt: skip
_DRAFTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_SHARED_LAYERS = frozenset({"num_hidden_groups"})  # ALBERT: one stored layer is run several times
# Lists of layers by the last part of their names; others are lists of heads, of experts and so on.
_LISTED = re.compile(r"(?P<list>(?:.+?\.)?(?:layers?|h|blocks?))\.(?P<index>\d+)\.(?P<rest>.+)")
_TOWER = re.compile(r"(^|[._])(vision|visual|image|vit|audio|speech|encoder|talker|mtp)([._]|$)")
# Embeddings have a width of their own if config.json has one of these.
_OTHER_WIDTH = re.compile(r"word_embed_proj_dim|emb(ed|edding)?_(size|dim)")
_NORMS = frozenset({"input_layernorm", "post_attention_layernorm", "ln_1", "attention_norm"})
_EXPERTS = re.compile(r"(?P<set>.+\.experts)\.(?P<index>\d+)\..+")
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
# Attention whose heads have other widths than head_dim, or not all layers the same.
_OTHER_HEADS = frozenset(
    {
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "global_head_dim", "attention_head_dim", "attention_hidden_size", "attention_other_setting",
    }
)  # fmt: skip
_GATED = ("qwen3_next", "qwen3_5")  # model types: a gate of each head's width next to its query
# Sizes that a library allocates, at any level, and the largest that is built whatever is stored.
_ALLOCATED = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "d_model", "d_ff",
    "n_embd", "ffn_dim", "num_labels",
)  # fmt: skip
# What is otherwise read only when all weights are written.
_LATE_FLAGS = ("tie_word_embeddings", "is_encoder_decoder")
_LATE_SIZES = ("num_attention_heads", "num_key_value_heads", "num_kv_shared_layers")
_HARMLESS, _FEW_LAYERS = 2**20, 1000
_PACKED = 16  # numbers of four bits in eight bytes, the widest word of codes


class Contradiction(InputError):
    """A size in config.json that is not that of the tensors."""


def contradictions(config: Settings, tensors: Iterable[TensorSpec]) -> Iterator[Contradiction]:
    """What config.json says otherwise than the headers. InputError for a value of a wrong type.

    Codes of quantized weights are packed, so that only float weights are compared.
    """
    specs = list(tensors)
    text = language_model(config)
    for level in (config, text):
        for key in _LATE_FLAGS:
            level.flag(key)
        for key in _LATE_SIZES:
            level.size(key)
    for what in _too_large(config, specs):
        yield _error(config, what)
    shapes = {
        spec.name.removesuffix(".weight"): spec.shape
        for spec in specs
        if spec.name.endswith(".weight") and spec.dtype in FLOATS
    }
    found = [*layer_faults(text, [spec.name for spec in specs]), *size_faults(text, shapes)]
    for what in found:
        yield _error(config, what)


def _error(config: Settings, what: str) -> Contradiction:
    return Contradiction(f"{CONFIG} contradicts the tensors: {what}", where=config.path, fix=FIX)


def _too_large(config: Settings, specs: list[TensorSpec]) -> Iterator[str]:
    """Sizes, at any level, that no stored tensor can have."""
    largest = max((side for spec in specs for side in spec.shape), default=0) * _PACKED
    for key in _ALLOCATED:
        value = config.size(key)
        if value and value > max(_HARMLESS, largest):
            yield f"`{config.key_path(key)}` is {value}; no tensor has a side of more than {largest}"
    for key in _LAYERS:
        value = config.size(key)
        if value and value > max(_FEW_LAYERS, len(specs)):
            yield f"`{config.key_path(key)}` is {value}; there are {len(specs)} tensors in all"
    for _, inner in config.inner():
        yield from _too_large(inner, specs)


# -- layers --------------------------------------------------------------------------------------


def layer_faults(config: Settings, names: Iterable[str]) -> Iterator[str]:
    """The number of layers, if no list of modules has as many. Drafts borrow config.json from another
    model. config: of the language model."""
    names = list(names)
    counts = {n for key in _LAYERS if (n := config.size(key))}
    if not counts or of_draft(names) or any(key in config for key in _SHARED_LAYERS):
        return
    lists: dict[str, int] = defaultdict(int)
    for name in names:
        if match := _LISTED.fullmatch(name):
            lists[match["list"]] = max(lists[match["list"]], int(match["index"]) + 1)
    drafts = sum(config.size(key) or 0 for key in _DRAFTS)
    allowed = counts | {count + drafts for count in counts}
    own = {name: n for name, n in lists.items() if not _TOWER.search(name)} or lists
    if own and not allowed & {*lists.values()}:
        longest = max(own, key=lambda name: own[name])
        if own[longest] > max(counts) and not _goes_on(names, longest, max(counts)):
            return
        number = " or ".join(map(str, sorted(counts)))
        yield f"it says {number} layers; `{longest}` has {own[longest]}"


def _goes_on(names: list[str], listed: str, count: int) -> bool:
    """Whether a list has, behind `count` layers, another one that is made of nothing else. Drafts have
    modules of their own."""
    within: set[str] = set()
    behind: dict[int, set[str]] = defaultdict(set)
    for name in names:
        match = _LISTED.fullmatch(name)
        if match and match["list"] == listed:
            index = int(match["index"])
            (within if index < count else behind[index]).add(match["rest"])
    return any(parts <= within for parts in behind.values())


# -- sides of weights ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sides:
    """The shapes of the language model's weights by the ends of their names; towers and experts are
    left out."""

    by_end: Mapping[str, Mapping[str, tuple[int, ...]]]

    @classmethod
    def of(cls, shapes: Shapes) -> _Sides:
        found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for module, shape in shapes.items():
            last = module.rpartition(".")[2]
            if last in _ENDS and ".experts." not in module and not _TOWER.search(module):
                found[last][module] = shape
        return cls(found)

    def common(self, end: str, dims: int) -> tuple[str, tuple[int, ...]] | None:
        """A module whose name ends so, and its shape; None if they differ, or if there is none."""
        shapes = {
            module: shape
            for module, shape in self.by_end.get(end.rpartition(".")[2], {}).items()
            if module.endswith(f".{end}")
        }
        if len(set(shapes.values())) != 1:
            return None
        module, shape = next(iter(shapes.items()))
        return (module, shape) if len(shape) == dims else None

    def width(self, end: str, side: int, expected: Set[int]) -> Iterator[str]:
        """One side (0 rows, 1 columns) of all modules whose names end in `end`, if they have it in
        common. expected: the allowed sizes, the usual one the smallest."""
        found = self.common(end, 2)
        if found is not None and found[1][side] not in expected:
            sides = ("rows", "columns")[side]
            yield f"it makes `{found[0]}` {min(expected)} {sides}; it has {found[1][side]}"


_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
_ENDS = frozenset({*_EMBEDDINGS, *_PROJECTIONS, *_NORMS})


def size_faults(config: Settings, shapes: Shapes, *, served: bool = False) -> Iterator[str]:
    """Sizes of the language model's config that are not those of its weights.

    served: also what fits some family, but not what engines build of these keys: embeddings of more
    rows than words, keys with as many heads as queries, gates next to queries, other widths of an MLP.
    """
    sides = _Sides.of(shapes)
    yield from _embedding(config, sides, served=served)
    if hidden := config.size("hidden_size"):
        for norm in sorted(_NORMS):
            found = sides.common(norm, 1)
            if found is not None and found[1] != (hidden,):
                yield f"`hidden_size` is {hidden}; `{found[0]}` has {found[1][0]} numbers"
                break
    if inner := config.size("intermediate_size"):
        others = {n for key in config if "intermediate_size" in key and (n := config.size(key))}
        yield from sides.width("mlp.down_proj", 1, {inner} if served else others)
    if all(config.value(key) is None for key in _OTHER_HEADS):
        yield from _heads(config, sides, served=served)
    yield from _experts(config, shapes)


def _heads(config: Settings, sides: _Sides, *, served: bool) -> Iterator[str]:
    """The projections of attention: the number of heads times one width."""
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    head = config.size("head_dim") or (hidden // heads if heads and hidden else None)
    if not head:
        return
    if heads:
        gated = (config.text("model_type") or "").startswith(_GATED) or any(
            "gate" in key and "attn" in key and config.value(key) for key in config
        )
        queries = {heads * head, 2 * heads * head} if gated or not served else {heads * head}
        yield from sides.width("self_attn.q_proj", 0, queries)
        yield from sides.width("self_attn.o_proj", 1, {heads * head})
    if kv := config.size("num_key_value_heads"):
        keys = {kv * head} if served else {kv * head, (heads or kv) * head}
        yield from sides.width("self_attn.k_proj", 0, keys)
        yield from sides.width("self_attn.v_proj", 0, keys)


def _embedding(config: Settings, sides: _Sides, *, served: bool) -> Iterator[str]:
    """[vocab_size, hidden_size]; not checked if config.json gives embeddings a width of their own."""
    tables = {m: s for end in _EMBEDDINGS for m, s in sides.by_end.get(end, {}).items()}
    if len(tables) != 1 or any(_OTHER_WIDTH.fullmatch(key) for key in config):
        return
    module, shape = next(iter(tables.items()))
    if len(shape) != 2:
        return
    words, hidden = config.size("vocab_size"), config.size("hidden_size")
    if words and (shape[0] < words or (served and shape[0] != words)):
        yield f"`vocab_size` is {words}; `{module}.weight` is {list(shape)}"
    if hidden and shape[1] != hidden:
        yield f"`hidden_size` is {hidden}; `{module}.weight` is {list(shape)}"


def _experts(config: Settings, shapes: Shapes) -> Iterator[str]:
    """The number of experts of a layer, if it is the same in all, and other than each number given."""
    counts = {n for key in _COUNTS if (n := config.size(key))}
    sets: dict[str, set[int]] = defaultdict(set)
    for module in shapes if counts else ():
        if match := _EXPERTS.fullmatch(module):
            sets[match["set"]].add(int(match["index"]))
    sizes = {len(members) for members in sets.values()}
    if len(sizes) != 1 or any(max(members) >= len(members) for members in sets.values()):
        return  # some are missing, which is another fault
    experts = sizes.pop()
    if experts > 1 and experts not in counts | {2 * n for n in counts}:  # twice: also for vision
        yield f"it says {min(counts)} experts; `{next(iter(sets))}` has {experts}"
