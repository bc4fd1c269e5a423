"""config.json against the shapes of tensors: an engine makes its parameters from the one and fills them
from the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quantcli.checkpoint import CONFIG, Checkpoint
from quantcli.findings import Finding, failed

_DRAFTS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
)  # stored behind the rest
_WHOLE = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
)
_FIX = "take config.json of the model that was converted"


def check_sizes(checkpoint: Checkpoint, stacks: Sequence[int]) -> Iterator[Finding]:
    """Findings; stacks: how many layers each numbered list of modules has."""
    config = checkpoint.text_config
    for key in _WHOLE:
        value = config.get(key)
        if key in config and value is not None and (type(value) is not int or value < 1):
            yield failed("sizes", f"`{key}` is {value!r:.40}, no number of things", CONFIG, _FIX)
    wanted = _whole(config, "num_hidden_layers")
    drafts = sum(_whole(config, key) or 0 for key in _DRAFTS)
    if wanted and stacks and not {wanted, wanted + drafts} & {*stacks}:
        what = f"config.json says {wanted} layers; there are {max(stacks)}"
        yield failed("sizes", what, str(checkpoint.path), _FIX)
    yield from _embedding(checkpoint, config)
    yield from _width(checkpoint, "mlp.down_proj", 1, _whole(config, "intermediate_size"))
    heads, hidden = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    head = _whole(config, "head_dim") or (hidden // heads if heads and hidden else None)
    kv = _whole(config, "num_key_value_heads")
    if kv and head:
        yield from _width(checkpoint, "self_attn.k_proj", 0, kv * head)


def _embedding(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[Finding]:
    """[vocab_size, hidden_size]; left alone in models whose embeddings have a width of their own."""
    names = [name for name in checkpoint.tensors if name.endswith(".embed_tokens.weight")]
    if len(names) != 1 or "word_embed_proj_dim" in config or "embedding_size" in config:
        return
    shape = checkpoint.tensors[names[0]].spec.shape
    for place, key in enumerate(("vocab_size", "hidden_size")):
        value = _whole(config, key)
        if value and len(shape) == 2 and shape[place] != value:
            what = f"`{key}` is {value}; `{names[0]}` is {list(shape)}"
            yield failed("sizes", what, CONFIG, _FIX)


def _width(checkpoint: Checkpoint, suffix: str, side: int, wanted: int | None) -> Iterator[Finding]:
    """A side that all modules of this name have in common, against what config.json makes it."""
    shapes = {
        stored.spec.shape
        for name, stored in checkpoint.tensors.items()
        if name.endswith(f".{suffix}.weight") and ".experts." not in name
    }
    sides = {shape[side] for shape in shapes if len(shape) == 2}
    if wanted and len(shapes) == 1 and len(sides) == 1 and wanted not in sides:
        packed = side == 0 and wanted == 2 * min(sides)  # two rows of codes in one
        if not packed:
            what = f"makes `{suffix}` {wanted} {('rows', 'columns')[side]}; it has {min(sides)}"
            yield failed("sizes", what, CONFIG, _FIX)


def _whole(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None
