"""The front matter of a card, which the Hub shows and searches."""

from __future__ import annotations

from typing import Any

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.hub import HUB_ID
from quantcli.core.registry import discover
from quantcli.core.untrusted.yaml_text import write_yaml
from quantcli.planning.card.source import QUANTIZED_BY, SourceCard, kept
from quantcli.targets.base import Target

_LIBRARY = "transformers"  # by whose classes config.json names models


def base_of(named: str | None, source: SourceCard) -> str | None:
    """The Hub id of the model that was quantized; None if it is not known.

    named: by the user. Else that in the card of a quantized source: what is quantized again, or packed,
    is still a quantized version of it. A float source's card names the model that it was trained from.
    """
    if named is not None:
        return named
    base = source.front.get("base_model")
    quantized = source.front.get("base_model_relation") == "quantized"
    given = HUB_ID.fullmatch(base) if isinstance(base, str) else None
    return given["repository"] if quantized and given else None  # the Hub knows no revision here


def front_matter(base: str | None, source: SourceCard, target: Target, config: Settings) -> str:
    """The front matter between its edges, in YAML."""
    own = dict(kept(source.front))
    table: dict[str, Any] = {}
    if base is not None:
        table |= {"base_model": base, "base_model_relation": "quantized"}
    if "library_name" in own or config.text("model_type"):
        table["library_name"] = own.pop("library_name", _LIBRARY)
    tags = own.pop("tags", [])
    of_formats = {tag for cls in discover(Target).values() for tag in cls().tags}
    listed = [tags] if isinstance(tags, str) else tags
    others = [tag for tag in listed if tag not in of_formats and tag != QUANTIZED_BY]
    table |= own
    table["tags"] = [*dict.fromkeys([*others, *target.tags, QUANTIZED_BY])]
    table["quantized_by"] = QUANTIZED_BY
    return f"---\n{write_yaml(table, width=1_000_000)}---"
