"""Generated files that several targets share: config.json and the index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.config.places import QUANTIZATION_KEYS, TEXT, quantization_blocks
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.files import INDEX
from quantcli.checkpoint.spec import FLOAT_NAMES
from quantcli.targets.base import PlannedCheckpoint


def to_json(value: object) -> bytes:
    """JSON in the style of Hugging Face: two spaces, a final newline, always the same bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def flat_json(table: Mapping[str, object], indent: int = 2) -> str:
    """A JSON object with one entry on each line.

    Ten times as fast as `indent=`, which is pure Python: a mixture of experts has 150,000 entries.
    """
    if not table:
        return "{}"
    space = " " * indent
    text = json.dumps(table, ensure_ascii=False, separators=(f",\n{space}", ": "))
    return f"{{\n{space}{text[1:-1]}\n{space[2:]}}}"


def config(output: PlannedCheckpoint, additions: dict[str, Any]) -> dict[str, bytes]:
    """config.json without the source's quantization, at both levels, and with the serving dtype.

    An engine that reads a stale quantization_config never opens the description of the Ascend format.
    Empty if nothing needs to change: the source's file is then copied byte for byte.
    """
    table = output.config.plain()
    for level in [table, *(value for value in table.values() if isinstance(value, dict))]:
        for key in QUANTIZATION_KEYS:
            level.pop(key, None)
    _set_dtype(table, output.serving_dtype)
    table.update(additions)
    return {} if table == output.config.plain() else {CONFIG: to_json(table)}


def quantization_block(config: Settings) -> Settings:
    """The object in config.json that engines read, at either level; empty if there is none.

    InputError for a value that is not an object.
    """
    blocks = quantization_blocks(config, config.object_of(TEXT))
    return next(blocks, Settings({}, config.file, config.path))


def named_dtype(value: object) -> str | None:
    """The dtype of a name in config.json: "BF16" of "bfloat16"; None for any other value."""
    return FLOAT_NAMES.get(value.removeprefix("torch.")) if isinstance(value, str) else None


def declared_dtype(config: Settings) -> str | None:
    """The dtype of the language model in config.json, such as "BF16", by the keys that engines read.

    InputError for a value that is not a text.
    """
    for level in (config, config.table(TEXT)):
        value = (level.text("dtype") or level.text("torch_dtype")) if level is not None else None
        if value is not None:
            return named_dtype(value)
    return None


def _set_dtype(table: dict[str, Any], serving_dtype: str) -> None:
    """Replace every dtype in config.json that is not the serving dtype, or add it.

    At both levels and by both keys: versions of the engines differ in the one that they read.
    """
    declared = declared_dtype(Settings(table))
    dtype_name = next(name for name, dtype in FLOAT_NAMES.items() if dtype == serving_dtype)
    replaced = declared == serving_dtype
    for level in (table, table.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if not isinstance(level, dict) or key not in level:
                continue
            if declared != serving_dtype or named_dtype(level[key]) not in {None, serving_dtype}:
                level[key] = dtype_name
                replaced = True
    if not replaced:
        table["torch_dtype"] = dtype_name


def index(output: PlannedCheckpoint) -> dict[str, bytes]:
    """model.safetensors.index.json: the only index name that engines read."""
    total = sum(spec.nbytes for spec in output.tensors.values())
    weight_map = flat_json(dict(sorted(output.files.items())), indent=4)
    text = f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {weight_map}\n}}\n'
    return {INDEX: text.encode()}
