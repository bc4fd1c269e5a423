"""The card of a source: what its front matter says, and the text to quote."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.files import CARD, MANIFEST
from quantcli.core.disk import disk_errors
from quantcli.core.errors import InputError, QuantError
from quantcli.core.untrusted.tables import read_table
from quantcli.core.untrusted.yaml_text import read_yaml
from quantcli.planning.card.markdown import lines_of, unquote

QUANTIZED_BY = "quantcli"
SOURCE_CARD = "<!-- quantcli: the source's card -->"  # a line before the quotation
_MOST_BYTES = 2**18
_MOST_FRONT = 2**16  # characters
_EDGE = "---"


@dataclass(frozen=True)
class SourceCard:
    """What a source's README.md gives to the card of its output.

    front: its front matter, untrusted; empty if it has none. text: to quote; None if there is none.
    notes: for the plan.
    """

    front: Mapping[str, Any]
    text: str | None
    notes: tuple[str, ...] = ()


def read_source_card(checkpoint: Checkpoint) -> SourceCard:
    """The card of a checkpoint. Of one that quantcli wrote, the text is that of the first source."""
    if CARD not in checkpoint.aux:
        return SourceCard({}, None)
    path, notes = checkpoint.path / CARD, []
    with disk_errors(path), path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    ours = _is_unchanged(checkpoint, content)
    if len(content) > _MOST_BYTES:
        content = content[:_MOST_BYTES].rpartition(b"\n")[0]
        notes.append(f"the model's {CARD} is over {_MOST_BYTES:,} bytes: the new card quotes its begin")
    text = content.decode("utf-8-sig", errors="replace")
    front, body, fault = split(text)
    if fault is not None:
        notes.append(
            f"the front matter of the model's {CARD} cannot be read ({fault}): the new card has no "
            "license or tags of it, and quotes it as it is"
        )
    if ours and is_ours(front):
        body = unquote(body.partition(f"\n{SOURCE_CARD}\n")[2])
    return SourceCard(front, body if body.strip() else None, tuple(notes))


def split(text: str) -> tuple[dict[str, Any], str, str | None]:
    """Front matter and the text after it; all of the text and the fault, if the first is broken.

    No front matter is empty front matter.
    """
    lines = lines_of(text.lstrip())
    if lines[0].rstrip() != _EDGE:
        return {}, text, None
    end = next((i for i, line in enumerate(lines[1:], start=1) if line.rstrip() == _EDGE), None)
    if end is None:
        return {}, text, "it has no end"
    front = "\n".join(lines[1:end])
    if len(front) > _MOST_FRONT:
        return {}, text, f"it is over {_MOST_FRONT:,} characters"
    try:
        table = read_yaml(front, CARD, unprintable=True).data or {}
    except InputError as error:
        return {}, text, error.what
    if not isinstance(table, dict):
        return {}, text, "it is not a mapping"
    return table, "\n".join(lines[end + 1 :]), None


def is_ours(front: Mapping[str, Any]) -> bool:
    """Whether front matter is that of a card that quantcli wrote."""
    return front.get("quantized_by") == QUANTIZED_BY


def is_card(file: Path) -> bool:
    """Whether a file is a card that quantcli wrote."""
    with disk_errors(file), file.open("rb") as stream:
        text = stream.read(_MOST_FRONT).decode("utf-8-sig", errors="replace")
    return is_ours(split(text)[0])


def _is_unchanged(checkpoint: Checkpoint, content: bytes) -> bool:
    """Whether a card is the one in the manifest; yes if no manifest has its hash."""
    try:
        table = read_table(checkpoint.path / MANIFEST)
        sha256 = table.table("files").table(CARD).text("sha256", None)
    except QuantError:
        return True
    return sha256 is None or sha256 == hashlib.sha256(content).hexdigest()


def kept(front: Mapping[str, Any]) -> Iterator[tuple[str, str | list[str]]]:
    """The entries of a source's front matter that are true of its output, too: text, or lists of it."""
    for key in _KEPT:
        if (value := _text_of(key, front.get(key))) is not None:
            yield key, value


def not_kept(front: Mapping[str, Any]) -> list[str]:
    """The keys of such entries that are not text."""
    return [key for key in _KEPT if front.get(key) is not None and _text_of(key, front[key]) is None]


_KEPT = (
    "library_name", "license", "license_name", "license_link", "language", "pipeline_tag", "tags"
)  # fmt: skip
_LISTS = frozenset({"language", "tags"})
_LONGEST = 500  # characters


def _text_of(key: str, value: Any) -> str | list[str] | None:
    """A value as text, or as a list of it if the key may have one; None for all else."""
    if value is False and key == "language":
        return "no"  # Norwegian, which YAML takes for a truth value
    if type(value) is int:
        return str(value)
    if isinstance(value, str):
        return value if value.isprintable() and 0 < len(value) <= _LONGEST else None
    if isinstance(value, list) and key in _LISTS:
        texts = [_text_of(key, item) for item in value if not isinstance(item, list)]
        found = [text for text in texts if isinstance(text, str)]
        return found if len(found) == len(value) else None
    return None
