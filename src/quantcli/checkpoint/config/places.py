"""Where config.json has the language model, and the quantization of weights."""

from __future__ import annotations

from collections.abc import Iterator

from quantcli.checkpoint.config.settings import Settings

CONFIG = "config.json"
# Keys of config.json, at any level. Source: vllm 0.32.0,
# model_executor/model_loader/weight_utils.py:235-242.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
TEXT = "text_config"
# Places of the language model in config.json, next to towers.
# Sources: transformers 5.23.0, models/*/configuration_*.py, such as qwen3_omni_moe; remote code of
# InternVL and of DeepSeek-VL; for drafts, vllm 0.32.0,
# transformers_utils/configs/speculators/base.py:59-93.
_TEXT = (
    (TEXT,), ("thinker_config", TEXT), ("llm_config",), ("language_config",),
    ("transformer_layer_config",),
)  # fmt: skip


def language_model(config: Settings) -> Settings:
    """The part of config.json that describes the language model."""
    for path in _TEXT:
        nested: Settings | None = config
        for key in path:
            nested = nested.table(key) if nested is not None else None
        if nested is not None:
            return nested
    return config


def quantization_blocks(*levels: Settings | None) -> Iterator[Settings]:
    """The quantization configs in some parts of config.json, the first of which engines read."""
    for level in levels:
        for key in QUANTIZATION_KEYS:
            if level is not None and (block := level.table(key)) is not None:
                yield block
