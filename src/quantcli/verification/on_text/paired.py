"""Two checkpoints on the same windows of text: whether one is better, by differences of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from quantcli.core.findings import Finding, failed
from quantcli.verification.on_text import metrics
from quantcli.verification.on_text.metrics import Columns, Metric
from quantcli.verification.options import LEAST_WINDOWS

CHECK = "not worse"
_AGAIN = "run both on the same texts, with the same --samples and --length, against the same MODEL"


def compare_runs(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any] | None:
    """How one run differs from another, window by window; None if they are not of the same windows.

    before, now: `run` of reports, as `RunReport` has it.

    figures: "name", "key", "before", "now", "change", "interval", "better" of each metric. The change
             of perplexity is relative, others are differences. better: whether `now` is nearer to the
             reference; None if the interval holds zero, if there is none, or if windows are too few.
    texts:   "text", "figures" and "verdict" of each text, if there are several.
    verdict: one sentence.
    """
    windows = before.get("windows") or [], now.get("windows") or []
    if not _same(before, now):
        return None
    columns = metrics.columns_of(windows[0]), metrics.columns_of(windows[1])
    owners = [window["text"] for window in windows[0]]
    figures = _figures(*columns, owners)
    names = [text["text"] for text in now.get("texts") or []]
    texts = []
    for number, name in enumerate(names if len(names) > 1 else ()):
        places = [place for place, owner in enumerate(owners) if owner == number]
        old, new = ({key: column[places] for key, column in each.items()} for each in columns)
        own = _figures(old, new, [number] * len(places))
        texts.append({"text": name, "figures": own, "verdict": verdict(own, len(places))})
    return {"figures": figures, "texts": texts, "verdict": verdict(figures, len(owners))}


def _same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two runs are of the same windows of text, and of one reference."""
    hashes = [[text["sha256"] for text in run.get("texts") or []] for run in (before, now)]
    windows = before.get("windows") or [], now.get("windows") or []
    return (
        hashes[0] == hashes[1]
        and 0 < len(windows[0]) == len(windows[1])
        and before.get("tokens") == now.get("tokens")
        and all(
            old["text"] == new["text"] and _near(old, new, "energy") and _near(old, new, "reference")
            for old, new in zip(*windows, strict=True)
        )
    )


def _near(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> bool:
    """Whether two windows have the same reference. Some types are compared in another dtype."""
    first, second = old.get(key), new.get(key)
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=1e-2)


def _figures(before: Columns, now: Columns, texts: Sequence[int]) -> list[dict[str, Any]]:
    return [
        _figure(metric, before, now, texts)
        for metric in metrics.METRICS
        if all(key in columns for key in metric.needs for columns in (before, now))
    ]


def _figure(metric: Metric, before: Columns, now: Columns, texts: Sequence[int]) -> dict[str, Any]:
    both = {f"{name} {key}": column for name, columns in (("before", before), ("now", now))
            for key, column in columns.items()}  # fmt: skip
    change = partial(_change, metric.change)
    ends = metrics.interval(change, both, texts)
    return {
        "name": metric.name,
        "key": metric.key,
        "before": round(float(metric.value(before)), 6),
        "now": round(float(metric.value(now)), 6),
        "change": round(float(change(both)), 8),
        "interval": None if ends is None else [round(end, 8) for end in ends],
        "better": metrics.better(ends, len(texts), more_is_better=metric.more_is_better),
    }


def _change(change: Callable[[Columns, Columns], metrics.Array], both: Columns) -> metrics.Array:
    """The change of a metric, from the numbers of both runs, which were drawn together."""
    old, new = (
        {key.removeprefix(f"{name} "): column for key, column in both.items() if key.startswith(name)}
        for name in ("before", "now")
    )
    return change(old, new)


def verdict(figures: Sequence[Mapping[str, Any]], windows: int) -> str:
    """One sentence: in what a checkpoint is better, in what worse, and where no difference is seen.

    windows: how many the figures are of.
    """
    if all(figure["interval"] is None for figure in figures):
        return "no interval: each text needs two windows or more"
    if windows < LEAST_WINDOWS:
        return f"{windows} windows decide nothing: {LEAST_WINDOWS} or more are needed"
    parts = []
    for better, text in ((True, "better in"), (False, "worse in"), (None, "no difference is seen in")):
        names = [figure["name"] for figure in figures if figure["better"] is better]
        parts += [f"{text} {', '.join(names)}"] if names else []
    return "; ".join(parts)


def deciding(comparison: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figure that decides which run is better: KL divergence, as it takes in each prediction whole;
    for models that predict no text the SQNR of outputs."""
    figures: dict[str, Mapping[str, Any]] = {each["key"]: each for each in comparison["figures"]}
    return figures.get(metrics.KL.key) or figures[metrics.SQNR.key]


def check_not_worse(comparison: Mapping[str, Any] | None, other: str) -> list[Finding]:
    """An error if a run is worse than another one, or cannot be compared with it. other: its name."""
    if comparison is None:
        what = "the runs differ in their texts or their reference: nothing can be compared"
        return [failed(CHECK, what, other, _AGAIN)]
    parts = [(None, comparison), *((text["text"], text) for text in comparison["texts"])]
    findings = []
    for text, part in parts:
        figure = deciding(part)
        if figure["better"] is False:
            low, high = figure["interval"]
            what = f"{figure['name']} is {figure['now']:.4g}, and was {figure['before']:.4g}: "
            what += f"the change of {figure['change']:+.4g} has the interval {low:+.4g} to {high:+.4g}"
            what += "" if text is None else f", on `{text}`"
            fix = "take the other checkpoint, or leave out --not-worse if the change is wanted"
            findings.append(failed(CHECK, what, other, fix))
    return findings
