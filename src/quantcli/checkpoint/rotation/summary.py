"""What a rotation does, for people: of a plan, or as a manifest has it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.checkpoint.files import MANIFEST
from quantcli.checkpoint.manifest import read_manifest
from quantcli.core.errors import InputError
from quantcli.core.text import count
from quantcli.core.untrusted.tables import Table


def recorded(folder: Path) -> str | None:
    """What the manifest in a folder says of a rotation; None if it says nothing, or is not sound, which
    `verify` reports."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        found = Table(read_manifest(folder), MANIFEST).table("rotation", None)
        if found is None:
            return None
        texts = {key: found.text(key, None) for key in ("residual", "heads", "learning")}
        numbers = {key: found.integer(key) for key in ("seed", "norms", "pairs", "untied_bytes")}
    except InputError:
        return None
    text = sentence({**texts, **numbers})
    return text if text.isprintable() else None


def sentence(summary: Mapping[str, Any]) -> str:
    """What a rotation does, for people."""
    parts = []
    if summary["residual"]:
        norms = count(summary["norms"], "norm")
        parts.append(f"residual stream by {summary['residual']}, {norms} folded into what reads them")
    if summary.get("learning"):
        parts = [f"{part}, from where it is learned ({summary['learning']})" for part in parts]
    if summary["heads"]:
        pairs = count(summary["pairs"], "attention")
        parts.append(f"values of heads in {pairs} by {summary['heads']}")
    text = f"rotated: {'; '.join(parts)}; seed {summary['seed']}"
    if summary["untied_bytes"]:
        text += f"; an output matrix of its own adds {summary['untied_bytes']:,} bytes"
    return text
