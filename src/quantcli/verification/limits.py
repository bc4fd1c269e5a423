"""The limits of a verification: the user's own, and those that came with the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.checkpoint.files import RECIPE_FILE, SOURCE_RECIPE
from quantcli.core.errors import InputError, QuantError
from quantcli.core.findings import Finding, noted
from quantcli.recipe.document import load_document
from quantcli.recipe.fields import Verify
from quantcli.recipe.recipe import load_recipe
from quantcli.verification.options import VerifyOptions


@dataclass(frozen=True)
class Limits:
    """Limits by the keys of a recipe's `verify` block.

    given: by the user, on the command line or in a recipe; they may loosen the defaults.
    own:   in the recipe that came with the checkpoint; they tighten the defaults and never loosen them.
    """

    given: Mapping[str, float] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)

    def least(self, key: str, default: float) -> float:
        """The limit that a value must reach."""
        return self.given.get(key, max(default, self.own.get(key, -math.inf)))

    def most(self, key: str, default: float) -> float:
        """The limit that a value must not exceed."""
        return self.given.get(key, min(default, self.own.get(key, math.inf)))

    def hint(self, key: str, holds: Callable[[float], bool]) -> str:
        """The rest of a fix for a failed check, if the checkpoint's own limit would let it pass."""
        own = self.own.get(key)
        if own is None or key in self.given or not holds(own):
            return ""
        return (
            f"; the checkpoint's own `{key}` is {own:g}, looser than the default, and does not count: "
            "your own recipe may loosen the limit, with --recipe FILE"
        )

    def to_report(self, least_sqnr: float) -> Verify:
        """The limits that were set for the whole checkpoint; None for those that were not.

        least_sqnr: the smallest default of `min_sqnr`, in dB.
        """
        own = {key: limit for key, limit in self.own.items() if math.isfinite(limit)}
        if own.get("min_sqnr", math.inf) <= least_sqnr:
            del own["min_sqnr"]
        return Verify().model_copy(update={**own, **self.given})


def given_limits(options: VerifyOptions) -> dict[str, float]:
    """The limits of the command line, else those of --recipe. InputError if it sets none."""
    limits: dict[str, float] = {}
    if options.recipe is not None:
        block = load_recipe(options.recipe).file.verify
        limits = {} if block is None else block.model_dump(exclude_none=True)
        if not limits:
            what = "the recipe sets no limit: it has no `verify` block, or an empty one"
            fix = "write such as `verify: {min_sqnr: 15}`, or leave out --recipe"
            raise InputError(what, where=f"--recipe {options.recipe}", fix=fix)
    chosen = {key: getattr(options, key) for key in Verify.model_fields}
    return limits | {key: limit for key, limit in chosen.items() if limit is not None}


def own_limits(folder: Path) -> tuple[dict[str, float], list[Finding]]:
    """The limits in the recipe that came with a checkpoint, and notes on those that are not numbers.

    An infinite limit is kept if it is loose: it does not count, and the message says so.
    """
    name = RECIPE_FILE if (folder / RECIPE_FILE).is_file() else SOURCE_RECIPE
    if not (folder / name).is_file():
        return {}, []
    try:
        block = load_document(folder / name).data.get("verify")
    except QuantError as error:
        return {}, [noted("files", f"{error.what}: limits in it do not count", error.where)]
    if block is None:
        return {}, []
    if not isinstance(block, dict):
        return {}, [noted("files", "`verify` is not a mapping: limits in it do not count", name)]
    limits = {key: limit for key in Verify.model_fields if (limit := _number(key, block)) is not None}
    return limits, list(_odd(block, limits, name))


def _number(key: str, block: Mapping[str, Any]) -> float | None:
    """A limit that can be compared with; None for any other value."""
    value = block.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        limit = float(value)
    except OverflowError:
        return None
    loosest = -math.inf if key == "min_sqnr" else math.inf
    return limit if math.isfinite(limit) or limit == loosest else None


def _odd(block: Mapping[str, Any], limits: Mapping[str, float], name: str) -> Iterator[Finding]:
    for key, value in block.items():
        if value is not None and not math.isfinite(limits.get(key, math.nan)):
            yield noted(
                "files", f"`verify.{key}` is {value!r:.40}, not a limit: it does not count", name
            )
