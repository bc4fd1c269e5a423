"""The page that compares several checkpoints: one table, and a chart of size, SQNR and change."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from quantcli.core.text import count
from quantcli.core.text import size as size_text
from quantcli.verification.report import words
from quantcli.verification.report.charts import Chart, Entry, compared
from quantcli.verification.report.document import render

COLUMNS = ("checkpoint", "answer", "format", "size", "bits per weight", "worst SQNR", "median SQNR",
           "perplexity ratio", "KL divergence", "change")  # fmt: skip
_FINDINGS, _FEWEST = 800, 20  # of a kind: on the page, and of each checkpoint at least
RIGHT = frozenset(COLUMNS[3:])


def dashboard(reports: Sequence[dict[str, Any]]) -> str:
    """The page of reports of `verify`, see docs/verify.md. The same reports give the same bytes."""
    return render(
        "dashboard.html.jinja",
        reports=list(zip(words.short_names(reports), reports, strict=True)),
        failed=[report for report in reports if words.is_failed(report)],
        columns={name: "name" if name == "checkpoint" else "figure" if name in RIGHT else ""
                 for name in COLUMNS},
        rows=[(cells, not words.is_failed(report))
              for cells, report in zip(rows(reports), reports, strict=True)],
        charts=list(_charts(reports)),
        most=max(_FEWEST, _FINDINGS // len(reports)),
    )  # fmt: skip


def rows(reports: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row of the table for each checkpoint; cells of what was not measured are `-`."""
    return [
        _row(name, report) for name, report in zip(words.short_names(reports), reports, strict=True)
    ]


def _row(name: str, report: dict[str, Any]) -> list[str]:
    errors, levels = words.errors(report), words.levels(report)
    run = report.get("run") or {}
    ppl, kl = run.get("ppl") or {}, run.get("kl") or {}
    bits = words.total_bits(report)
    change = run.get("mean_abs_logprob_change")
    return [
        words.literal(name),
        f"FAILED, {count(errors, 'error')}" if words.is_failed(report) else "passed",
        words.literal(report.get("format") or "-"),
        size_text(words.total_bytes(report)) if report.get("sizes") else "-",
        "-" if bits is None else f"{bits:.2f}",
        words.decibels(min(levels, default=None)),
        words.decibels(statistics.median(levels) if levels else None),
        _with(f"{ppl['ratio']:.4f}" if ppl else "-", words.ratio_span(ppl.get("interval"))),
        _with(words.number(kl.get("mean")), words.span(kl.get("interval"))),
        _with(words.number(change), words.span(run.get("change_interval"))),
    ]


def _with(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def _charts(reports: Sequence[dict[str, Any]]) -> Iterator[Chart]:
    """Size, SQNR, change; those that at least one report has."""
    named = list(zip(words.short_names(reports), reports, strict=True))
    sizes, levels, changes = [], [], []
    for name, report in named:
        ok, run = not words.is_failed(report), report.get("run") or {}
        size = words.total_bytes(report) if report.get("sizes") else None
        text = "-" if size is None else size_text(size)
        sizes.append(Entry(name, size, text, text, ok=ok))
        own = words.levels(report)
        ends, median = ((own[0], own[-1]), statistics.median(own)) if own else (None, None)
        text = words.decibels(median)
        about = f"median {text}, {words.decibels(own[0])} to {words.decibels(own[-1])}" if own else text
        levels.append(Entry(name, median, text, about, ends, ok))
        change, ends = run.get("mean_abs_logprob_change"), run.get("change_interval")
        text = words.number(change)
        changes.append(Entry(name, change, text, _with(text, words.span(ends)), ends, ok))
    for title, entries, bars in (
        ("Size", sizes, True),
        ("SQNR of weights in dB: the median, and from the worst to the best module", levels, False),
        ("Mean change of a log-probability in nats, with its 95 % interval", changes, True),
    ):
        if any(entry.value is not None for entry in entries):
            yield compared(title, entries, bars=bars)
