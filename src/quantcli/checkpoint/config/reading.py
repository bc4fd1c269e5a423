"""JSON objects that came with a model, from bytes."""

from __future__ import annotations

from typing import Any

from quantcli.checkpoint.config.table import Table
from quantcli.checkpoint.header import parse_json
from quantcli.core.errors import InputError

_DEEPEST = 64  # levels of objects and lists; those of published files are fewer than ten


def parse_object(data: bytes, name: str, where: str, fix: str) -> dict[str, Any]:
    """A JSON object. InputError for what `parse_json` refuses, for other values, and if it is nested
    more deeply than any published file, which no later step must bear.

    name: of the file, for messages.
    """
    value = parse_json(data, where, fix)
    if not isinstance(value, dict):
        raise InputError(f"{name} must hold a JSON object", where=where, fix=fix)
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        children = (c for v in level for c in (v.values() if isinstance(v, dict) else v))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return value
    raise InputError("JSON is nested too deeply", where=where, fix=fix)


def parse_table(data: bytes, where: str, fix: str) -> Table:
    """The same, as a table whose values are read by type."""
    return Table(parse_object(data, where, where, fix), where)
