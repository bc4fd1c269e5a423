"""Bytes of the cache of keys and values on each device, and of the states of recurrent layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.roles import Role
from quantcli.core.errors import InputError
from quantcli.targets.kv_cache import AttentionLayer, attention_layers

_LAYER = re.compile(r"\.(\d+)\.")
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_SCALE = 4  # bytes next to the numbers of an indexer. Source: vllm 0.32.0, models/deepseek_v2.py
# Keys of config.json that give the state of a recurrent layer, in numbers: of each sequence, its matrix
# heads x width x depth, and (kernel - 1) columns of its convolution.
# Sources: vllm 0.32.0, model_executor/layers/mamba/mamba_utils.py (mamba2_state_shape,
# gated_delta_net_state_shape); transformers 5.23.0, configurations of the families.
_MAMBA = (
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv"),
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
)
_DELTA = ("linear_num_value_heads", "linear_value_head_dim", "linear_num_key_heads",
          "linear_key_head_dim", "linear_conv_kernel_dim")  # fmt: skip
_STATE_BYTES = 4  # of a number: float32


@dataclass(frozen=True)
class _Layer:
    """Numbers that a layer keeps of a token, and how they are shared.

    heads:  of keys and values, which devices share; 0: each device has all.
    plain:  bytes of a token that do not follow the dtype of the cache.
    window: tokens that are kept; None: all.
    """

    numbers: int
    heads: int
    plain: int = 0
    window: int | None = None


@dataclass(frozen=True)
class CacheSizes:
    """What a model keeps of each sequence while it is served.

    state:  bytes of recurrent layers, whatever the length.
    notes:  on what is not counted.
    """

    layers: tuple[_Layer, ...]
    state: int
    notes: tuple[str, ...]

    def nbytes(self, context: int, concurrency: int, devices: int, element: int) -> int:
        """Bytes on one of some devices for sequences of `context` tokens; element: bytes of a cached
        number."""
        total = 0
        for layer in self.layers:
            tokens = context if layer.window is None else min(context, layer.window)
            of_heads = layer.numbers * element
            if layer.heads:  # a device has a head at least
                of_heads = of_heads * max(1, -(-layer.heads // devices)) // layer.heads
            total += tokens * (of_heads + layer.plain)
        return concurrency * (total + -(-self.state // devices))

    def longest(self, room: int, concurrency: int, devices: int, element: int, most: int) -> int:
        """The most tokens of each sequence that `room` bytes on a device hold; at most `most`."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.nbytes(middle, concurrency, devices, element) <= room:
                low = middle
            else:
                high = middle - 1
        return low


def cache_sizes(checkpoint: Checkpoint, roles: Mapping[str, Role]) -> CacheSizes:
    """What a decoded checkpoint keeps of each sequence, from config.json and the shapes of weights."""
    config = checkpoint.text_config
    shapes = {
        name.removesuffix(".weight"): stored.spec.shape
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight")
    }
    state, notes = _state(config, roles)
    try:
        found = attention_layers(checkpoint, roles, shapes)
    except InputError as error:
        return CacheSizes((), state, (*notes, f"no cache is counted: {error.what}"))
    indexers = {module.split(".indexer.")[0] for module in roles if ".indexer." in module}
    layers = [_layer(layer, config, layer.name in indexers) for layer in found.values()]
    return CacheSizes(tuple(layers), state, tuple(notes))


def _layer(layer: AttentionLayer, config: Settings, indexed: bool) -> _Layer:
    number = _LAYER.search(f"{layer.name}.")
    window = _window(config, int(number[1])) if number else None
    index = _whole(config, "index_head_dim")
    plain = index + _SCALE if indexed and index else 0
    if layer.queries:  # latents, and the keys that turn with the position
        return _Layer(layer.widths[0] + _whole(config, "qk_rope_head_dim"), 0, plain, window)
    return _Layer(sum(layer.widths), layer.heads, plain, window)


def _window(config: Settings, layer: int) -> int | None:
    """Tokens that a layer looks back at; None: all, also if config.json does not say which layers."""
    kinds, pattern = config.texts("layer_types"), _whole(config, "sliding_window_pattern")
    if layer < len(kinds):
        key = _WINDOWS.get(kinds[layer])
    else:
        key = "sliding_window" if pattern > 1 and (layer + 1) % pattern else None
    return (_whole(config, key) or None) if key else None


def _state(config: Settings, roles: Mapping[str, Role]) -> tuple[int, list[str]]:
    """Bytes that recurrent layers keep of a sequence, and a note if they are not known."""
    names = (module for module, role in roles.items() if role == "ssm")
    layers = {match[1] for name in names if (match := _LAYER.search(f"{name}."))}
    if not layers:
        return 0, []
    numbers = 0
    for keys in _MAMBA:
        heads, width, depth, groups, kernel = (_whole(config, key) for key in keys)
        if heads and width and depth:
            numbers = heads * width * depth + (kernel - 1) * (
                heads * width + 2 * max(1, groups) * depth
            )
    heads, width, key_heads, key_width, kernel = (_whole(config, key) for key in _DELTA)
    if heads and width and key_width:
        numbers = heads * width * key_width
        numbers += (kernel - 1) * (heads * width + 2 * key_heads * key_width)
    if not numbers:
        return 0, [f"the states of {len(layers)} recurrent layers are not counted: sizes are not known"]
    return len(layers) * numbers * _STATE_BYTES, []


def _whole(config: Settings, key: str) -> int:
    """A number of things in config.json; 0 if it does not say, or counts none."""
    value = config.size(key)
    return value if value and value < 2**31 else 0
