"""Generated files that several targets share: config.json and the index."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG, QUANTIZATION_KEYS
from quantcli.checkpoint.files import INDEX
from quantcli.checkpoint.spec import FLOAT_NAMES
from quantcli.targets.base import PlannedCheckpoint


def to_json(value: object) -> bytes:
    """JSON as Hugging Face writes it: two spaces, a final newline, always the same bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def flat_json(table: Mapping[str, object], indent: int = 2) -> str:
    """A JSON object with one entry a line. Ten times as fast as `indent=`, which is pure Python:
    a mixture of experts has 150,000 entries.
    """
    if not table:
        return "{}"
    space = " " * indent
    text = json.dumps(table, ensure_ascii=False, separators=(f",\n{space}", ": "))
    return f"{{\n{space}{text[1:-1]}\n{space[2:]}}}"


def config(output: PlannedCheckpoint, additions: dict[str, Any]) -> dict[str, bytes]:
    """config.json without the source's quantization, at both levels, and with the serving dtype.

    An engine that finds a stale quantization_config never reads the description. Empty
    where nothing needs to change: the source's file is then copied byte for byte.
    """
    table = copy.deepcopy(dict(output.config))
    for level in [table, *(value for value in table.values() if isinstance(value, dict))]:
        for key in QUANTIZATION_KEYS:
            level.pop(key, None)
    _set_dtype(table, output.serving_dtype)
    table.update(additions)
    return {} if table == output.config else {CONFIG: to_json(table)}


def quantization_block(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that engines read, from where they look for it; empty where there is none."""
    for level in (config, config.get("text_config")):
        for key in QUANTIZATION_KEYS:
            block = level.get(key) if isinstance(level, dict) else None
            if isinstance(block, dict):
                return block
    return {}


def declared_dtype(config: Any) -> str | None:
    """The dtype that config.json gives the language model ("BF16"), as engines look for it."""
    for level in (config, config.get("text_config")):
        if isinstance(level, dict):
            value = level.get("dtype") or level.get("torch_dtype")
            if isinstance(value, str):
                return FLOAT_NAMES.get(value.removeprefix("torch."))
    return None


def _set_dtype(table: dict[str, Any], serving_dtype: str) -> None:
    """Make config.json say the serving dtype where it says float32 or nothing."""
    if declared_dtype(table) == serving_dtype:
        return
    word = next(name for name, dtype in FLOAT_NAMES.items() if dtype == serving_dtype)
    written = False
    for level in (table, table.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(level, dict) and key in level:
                level[key] = word
                written = True
    if not written:
        table["torch_dtype"] = word


def index(output: PlannedCheckpoint) -> dict[str, bytes]:
    """model.safetensors.index.json: the only index name that engines read."""
    total = sum(spec.nbytes for spec in output.tensors.values())
    weight_map = flat_json(dict(sorted(output.files.items())), indent=4)
    text = f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {weight_map}\n}}\n'
    return {INDEX: text.encode()}
