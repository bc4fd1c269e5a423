"""A next-token layer as one more layer of the model's own class, behind two norms and a projection.

The library leaves such layers out. Here the model is built with one decoder layer more, which gets what
stands before it in the engine: x = projection([norm(embedding of the next token), norm(states)])
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.planning.reach import NextTokenLayer

_NAMES = ("enorm.weight", "hnorm.weight", "eh_proj.weight")  # within the layer that is built


def add_layer(config: Any) -> None:
    """Give a config of the library one decoder layer more: with full attention, else like the last."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == layers:
            more = "full_attention" if "full_attention" in value else value[-1]
            setattr(text, name, [*value, more])
    text.num_hidden_layers = layers + 1


def attach(layer: Any, dtype: torch.dtype) -> None:
    """Put the norms and the projection into a decoder layer; it takes [..., 2 hidden] from then on."""
    norm: Any = layer.input_layernorm
    hidden = norm.weight.shape[0]
    layer.enorm, layer.hnorm = copy.deepcopy(norm), copy.deepcopy(norm)
    layer.eh_proj = nn.Linear(2 * hidden, hidden, bias=False, dtype=dtype, device="meta")
    base = type(layer)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        pair: Tensor = args[0] if args else kwargs["hidden_states"]
        embedding, before = pair.chunk(2, -1)
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(before)], -1))
        if args:
            return base.forward(self, x, *args[1:], **kwargs)
        return base.forward(self, **{**kwargs, "hidden_states": x})

    layer.__class__ = type(base.__name__, (base,), {"forward": forward})


def library_names(
    checkpoint: Checkpoint, next_token: NextTokenLayer, names: Iterable[str], number: int
) -> dict[str, str]:
    """The names of tensors as the library would know them, by stored name, if those of the next-token
    layer were in decoder layer `number`."""
    beginning = next(
        name.partition(f".layers.{number - 1}.")[0]
        for name in checkpoint.tensors
        if f".layers.{number - 1}." in f".{name}" and not name.startswith(next_token.prefix)
    )
    prefix = f"{beginning}.layers.{number}."
    special = {old: prefix + new for old, new in zip(next_token.names, _NAMES, strict=True)}
    return {
        name: special.get(name) or prefix + name.removeprefix(next_token.prefix)
        for name in names
        if name in special or name.startswith(next_token.prefix)
    }
