"""config.json against the shapes of tensors: an engine allocates parameters by the one, and fills them
from the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Protocol

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.findings import Finding, failed
from quantcli.targets.layouts import StoredModule

# layers of drafts, stored after the others
_DRAFTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_WHOLE = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
# Attention whose heads have other widths than head_dim, or not all layers the same.
_OTHER_HEADS = frozenset(
    {
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "global_head_dim", "attention_head_dim", "attention_hidden_size", "attention_other_setting",
    }
)  # fmt: skip
_GATED = ("qwen3_next", "qwen3_5")  # model types: a gate of each head's width next to its query
_TOWER = re.compile(r"(^|[._])(vision|visual|image|vit|audio|speech|encoder|talker)([._]|$)")
_FIX = "take config.json of the model that was converted"


class Model(Protocol):
    """A checkpoint, and its quantized modules by name."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint."""

    @property
    def modules(self) -> Mapping[str, StoredModule]:
        """The quantized modules by name."""

    @property
    def unchecked(self) -> Mapping[str, str]:
        """The formats of quantized modules that this version cannot read, by name."""


def check_sizes(stored: Model, stacks: Sequence[int]) -> Iterator[Finding]:
    """Findings for sizes in config.json. stacks: number of layers of each numbered list of modules."""
    checkpoint = stored.checkpoint
    config = checkpoint.text_config
    for key in _WHOLE:
        value = config.get(key)
        if key in config and value is not None and (type(value) is not int or value < 1):
            what = f"`{key}` is {value!r:.40}, not a positive whole number"
            yield failed("sizes", what, CONFIG, _FIX)
    layers = _whole(config, "num_hidden_layers")
    drafts = sum(_whole(config, key) or 0 for key in _DRAFTS)
    if layers and stacks and not {layers, layers + drafts} & {*stacks}:
        what = f"config.json says {layers} layers; there are {max(stacks)}"
        yield failed("sizes", what, str(checkpoint.path), _FIX)
    yield from _embedding(checkpoint, config)
    yield from _width(stored, "mlp.down_proj", 1, {_whole(config, "intermediate_size")})
    if not any(config.get(key) is not None for key in _OTHER_HEADS):
        yield from _heads(stored, config)


def _heads(stored: Model, config: dict[str, Any]) -> Iterator[Finding]:
    """The projections of attention: the number of heads times one width."""
    heads, hidden = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    head = _whole(config, "head_dim") or (hidden // heads if heads and hidden else None)
    if head is None:
        return
    if heads:
        gated = str(config.get("model_type")).startswith(_GATED) or any(
            "gate" in key and "attn" in key and value for key, value in config.items()
        )
        queries = {heads * head, 2 * heads * head} if gated else {heads * head}
        yield from _width(stored, "self_attn.q_proj", 0, queries)
        yield from _width(stored, "self_attn.o_proj", 1, {heads * head})
    if kv := _whole(config, "num_key_value_heads"):
        yield from _width(stored, "self_attn.k_proj", 0, {kv * head})
        yield from _width(stored, "self_attn.v_proj", 0, {kv * head})


def _embedding(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[Finding]:
    """[vocab_size, hidden_size]; not checked if config.json gives embeddings a width of their own."""
    names = [name for name in checkpoint.tensors if name.endswith(".embed_tokens.weight")]
    if len(names) != 1 or "word_embed_proj_dim" in config or "embedding_size" in config:
        return
    shape = checkpoint.tensors[names[0]].spec.shape
    for place, key in enumerate(("vocab_size", "hidden_size")):
        value = _whole(config, key)
        if value and len(shape) == 2 and shape[place] != value:
            what = f"`{key}` is {value}; `{names[0]}` is {list(shape)}"
            yield failed("sizes", what, CONFIG, _FIX)


def _width(stored: Model, suffix: str, side: int, expected: Set[int | None]) -> Iterator[Finding]:
    """One side (0 rows, 1 columns) of all modules whose names end in `suffix`, against config.json.

    Checked if they have it in common. expected: the allowed sizes, the usual one the smallest; None in
    it allows any.
    """
    if None in expected:
        return
    shapes = set()
    for name, tensor in stored.checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module in stored.unchecked:
            continue
        if module in stored.modules:
            shape: tuple[int, ...] = stored.modules[module].shape
        elif name.endswith(".weight") and tensor.spec.dtype in FLOATS:
            shape = tensor.spec.shape
        else:
            continue
        if module.endswith(f".{suffix}") and ".experts." not in name and not _TOWER.search(name):
            shapes.add(shape)
    if len(shapes) == 1 and len(shape := shapes.pop()) == 2 and shape[side] not in expected:
        usual = min(value for value in expected if value)
        what = f"makes `{suffix}` {usual} {('rows', 'columns')[side]}; it has {shape[side]}"
        yield failed("sizes", what, CONFIG, _FIX)


def _whole(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None
