"""Which modules to keep float, from how much quantization costs each."""

from __future__ import annotations

import glob
import json
import statistics
from collections import defaultdict
from typing import Any

from quantcli.targets.vllm_family import EXPERT, merged_name

RANKED_BY = "int8 per channel"  # fp8 has a scale in every code, and hardly sees outliers
MARGIN_DB = 6.0  # an error of twice the size: one bit


def rank(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Modules of `outliers.inspect_outliers`, those with NaN or Inf first, then by lowest SQNR."""
    return sorted(modules, key=lambda m: (m["not_finite"] is None, m["sqnr_db"][RANKED_BY] or 0.0))


def keep_advice(modules: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A rule that keeps float what int8 costs far more than others of its kind; None for nobody.

    A kind is modules whose names differ only in numbers. Far is MARGIN_DB below the kind's median.
    What the engine merges with such a module must have one scheme, and so must the experts of a layer:
    the rule takes them along.

    margin_db: MARGIN_DB.
    far_below: {"module", "sqnr_db", "kind", "median_db"} each, worst first.
    modules:   names of all that the rule keeps.
    match:     its patterns.
    yaml:      the rule as lines of a recipe, to stand before the others.
    """
    kinds: dict[str, list[float]] = defaultdict(list)
    for module in modules:
        if module["not_finite"] is None:
            kinds[_kind(module["module"])].append(module["sqnr_db"][RANKED_BY])
    medians = {kind: statistics.median(values) for kind, values in kinds.items()}
    far = []
    for module in modules:
        name, sqnr = module["module"], module["sqnr_db"][RANKED_BY]
        kind = _kind(name)
        if sqnr is not None and sqnr < medians[kind] - MARGIN_DB:
            median = medians[kind]
            far.append({"module": name, "sqnr_db": sqnr, "kind": kind, "median_db": median})
    if not far:
        return None
    together: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        together[_unit(module["module"])].append(module["module"])
    units = dict.fromkeys(_unit(entry["module"]) for entry in far)
    match = [pattern for unit in units for pattern in _patterns(together[unit])]
    quoted = (json.dumps(pattern, ensure_ascii=False) for pattern in match)
    lines = ["- match:", *(f"    - {pattern}" for pattern in quoted), "  scheme: keep"]
    return {
        "margin_db": MARGIN_DB,
        "far_below": far,
        "modules": sorted(name for unit in units for name in together[unit]),
        "match": match,
        "yaml": "".join(f"  {line}\n" for line in lines),
    }


def _kind(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _unit(module: str) -> str:
    """What must have one scheme with a module, by a name for all of it."""
    expert = EXPERT.fullmatch(module)
    return expert["experts"] if expert else merged_name(module) or module


def _patterns(modules: list[str]) -> list[str]:
    expert = EXPERT.fullmatch(modules[0])
    return [f"{glob.escape(expert['experts'])}.*"] if expert else sorted(map(glob.escape, modules))
