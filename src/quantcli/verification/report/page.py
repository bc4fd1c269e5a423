"""A report of verification as one HTML page, on which the bad layer is found at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantcli.verification.report import words
from quantcli.verification.report.charts import (
    histogram,
    layer_line,
    overall,
    perplexity_line,
    require_plotly,
)
from quantcli.verification.report.heatmap import (
    Module,
    Quantity,
    heat_map,
    lay_out,
    left_out,
    numbers,
    size,
)
from quantcli.verification.report.markup import Chart, Html, Page, facts, section, table, tag
from quantcli.verification.report.outliers import outlier_section, outliers_page

__all__ = ["outliers_page", "page", "require_plotly"]

_OPEN = 5  # findings that show; the rest is folded, so that the map below is on the first screen
_ROWS = 200  # rows of a table of modules, beside those that failed
_MOST = 2000  # rows and findings of any kind: a browser is to open the page
_HISTOGRAMS = 7  # of single modules
_SQNR = Quantity(
    "SQNR, dB", "SQNR of the weights", lambda module: module.get("sqnr_db"), words.decibels
)


def page(report: dict[str, Any]) -> str:
    """One self-contained page: the verdict, what is wrong, the map, and the evidence.

    The same report gives the same bytes. Raises MachineError where plotly is not installed.
    """
    require_plotly()
    html_page = Page(f"{'FAILED' if words.is_failed(report) else 'passed'}: {report['checkpoint']}")
    modules = sorted(report.get("modules") or [], key=words.badness)
    return html_page.document(
        _banner(report),
        _findings("What is wrong", words.errors(report), "errors"),
        _map(html_page, modules),
        _facts(report),
        _run(html_page, report),
        _findings("Notes", words.notes(report), "notes"),
        _histograms(html_page, modules),
        _modules(modules),
        outlier_section(html_page, report.get("outliers") or []),
        _checks(report),
        tag("p", report.get("tool") or "", class_="muted"),
    )


def _banner(report: dict[str, Any]) -> Html:
    errors, notes, layers = words.errors(report), words.notes(report), words.bad_layers(report)
    bad = words.is_failed(report)
    about = [f"{_counted(errors, 'error')} ({words.tally(errors)})"] if errors else []
    about += [_counted(notes, "note")] if notes else []
    look = ""
    if bad and layers:
        look = tag(
            "p", f"Look at layer{'s' * (len(layers) > 1)} {words.some(layers)}", class_="where-to-look"
        )
    against, limits = report.get("against"), words.limits(report)
    lines = [
        tag("p", tag("code", report["checkpoint"]),
            *([" against ", tag("code", against)] if against else [])),
        tag("p", f"Checked: {', '.join(report.get('depths') or [])}.",
            f" Limits: {', '.join(limits)}." if limits else ""),
    ]  # fmt: skip
    if missing := words.not_reached(report):
        lines.append(tag("p", f"Not checked: {'; '.join(missing)}.", class_="muted"))
    title = " · ".join(["✕ FAILED" if bad else "✓ Passed", *about])
    banner = tag(
        "div", tag("h1", title), look, *lines, class_=f"banner {'failed' if bad else 'passed'}"
    )
    return tag("header", banner)


def _facts(report: dict[str, Any]) -> Html:
    modules = report.get("modules") or []
    failed = sum(not words.is_ok(module) for module in modules)
    tensors = report.get("tensors") or {}
    pairs = [
        ("format", report.get("format") or "-"),
        ("checks passed", _passed(report)),
        *(
            [("modules within limits", f"{len(modules) - failed:,} of {len(modules):,}")]
            if modules
            else []
        ),
        *((f"tensors {what}", words.number(count)) for what, count in tensors.items()),
        *words.run_facts(report),
    ]
    return section("In numbers", facts(pairs))


def _passed(report: dict[str, Any]) -> str:
    checks = report.get("checks") or []
    return f"{sum(not check['failed'] for check in checks)} of {len(checks)}"


def _counted(things: Sequence[object], word: str) -> str:
    return f"{len(things):,} {word}{'s' * (len(things) != 1)}"


def _findings(title: str, findings: list[dict[str, Any]], kind: str) -> Html:
    if not findings:
        return Html("")
    items = [_finding(finding) for finding in words.spread(findings)[:_MOST]]
    limit = _OPEN if kind == "errors" else 3
    content = [tag("ul", *items[:limit], class_=f"findings {kind}")]
    if len(items) > limit:
        more = f"{len(findings) - limit:,} more"
        more += f", the first {_MOST - limit:,} of them" if len(findings) > _MOST else ""
        rest = tag("ul", *items[limit:], class_=f"findings {kind}")
        content.append(tag("details", tag("summary", more), rest, class_="findings"))
    return section(f"{title} ({len(findings):,})", *content)


def _finding(finding: dict[str, Any]) -> Html:
    where, fix = finding.get("where"), finding.get("fix")
    parts = [tag("span", finding["check"], class_="check"), finding["what"]]
    parts += [" — ", tag("code", where)] if where else []
    parts += [tag("span", f"; fix: {fix}", class_="fix")] if fix else []
    return tag("li", *parts)


def _map(page: Page, modules: Sequence[Module]) -> Html:
    if not modules:
        return Html("")
    grid = lay_out(modules, words.badness)
    floor = min((m["limit_db"] for m in modules if m.get("limit_db") is not None), default=None)
    failed = sum(cell.failed for cell in grid.cells.values())
    caption = (
        "SQNR of the weights in dB, of experts the worst. Red is low, blue is high; the colours reach "
        "from the lowest limit or value to the highest value. Framed and crossed: below the limit."
    )
    alt = (
        f"Heat map of {size(grid)}: {failed} modules are beyond their limits, see the table of modules."
    )
    chart = Chart(heat_map(grid, _SQNR, words.module_facts, floor), alt, caption + left_out(grid))
    return section("Layers and projections", page.chart(chart), numbers(grid, _SQNR))


def _run(page: Page, report: dict[str, Any]) -> Html:
    run = report.get("run") or {}
    content = []
    if layers := run.get("layers"):
        failed = sum(not words.is_ok(layer) for layer in layers)
        alt = f"Lines of the SQNR of {len(layers)} layers' outputs, {failed} beyond their limits."
        caption = (
            "SQNR of what each layer puts out on the other model's inputs, which is its own error and "
            "has the limit; and of what it puts out after all the layers before it."
        )
        content.append(page.chart(Chart(layer_line(layers), alt, caption)))
        keys = ("sqnr_db", "limit_db", "cumulative_db")
        rows = [[x["layer"], *(words.decibels(x.get(key)) for key in keys)] for x in layers]
        columns = ("layer", "SQNR", "limit", "after all before it")
        out = [not words.is_ok(layer) for layer in layers]
        listed = table("SQNR of layer outputs", columns, rows, columns[1:], out)
        content.append(tag("details", tag("summary", "the same in numbers"), listed))
    if windows := run.get("windows"):
        alt = f"Lines of the perplexity of {len(windows)} windows of text, reference and checkpoint."
        caption = (
            "Perplexity of each window of text, and how much the checkpoint's is above the reference's."
        )
        content.append(page.chart(Chart(perplexity_line(windows), alt, caption)))
    return section("On text", *content)


def _histograms(page: Page, modules: Sequence[Module]) -> Html:
    having = [m for m in modules if m.get("histogram") and any(m["histogram"]["counts"])]
    together = overall([m["histogram"] for m in having])
    if together is None:
        return Html("")
    title = f"{'all' if len(having) == len(modules) else 'the worst'} {len(having):,} modules"
    charts = [Chart(histogram(title, *together), f"Histogram of the errors of {title}.")]
    for module in having[:_HISTOGRAMS]:
        counts, edges = module["histogram"]["counts"], module["histogram"]["edges"]
        ok = words.is_ok(module)
        name = module["module"].removeprefix("model.")
        name = name if len(name) <= 44 else "…" + name[-43:]
        figure = histogram(f"{'' if ok else '✕ '}{name}", counts, edges, ok=ok)
        charts.append(Chart(figure, f"Histogram of the errors of {module['module']}."))
    caption = tag(
        "p",
        "Share of a sample of the weights by their error, in units of their row's mean error, for all "
        "modules and the worst ones. Rounding to integers gives a flat block from -2 to 2, rounding to "
        "floats slopes; tails beyond that were clipped, edited, or are wrong.",
        class_="muted",
    )
    return section("Errors", caption, tag("div", *map(page.chart, charts), class_="plots"))


def _modules(modules: Sequence[Module]) -> Html:
    if not modules:
        return Html("")
    failed = sum(not words.is_ok(module) for module in modules)
    worst = modules[: min(_MOST, failed + _ROWS)]
    columns = ["module", "type", "shape", "SQNR", "limit", "cosine", "largest relative error",
               "worst rows", "outlier channels", "other"]  # fmt: skip
    taken = ("type", "shape", "SQNR", "limit", "cosine", "largest relative error", "worst rows",
             "outlier channels")  # fmt: skip
    rows = []
    for module in worst:
        facts = dict(words.module_facts(module))
        other = "; ".join(f"{what} {value}" for what, value in facts.items() if what not in taken)
        rows.append([module["module"], *(facts.get(what, "") for what in taken), other])
    caption = f"Those beyond their limits first ({failed:,}), then those nearest to them."
    if len(modules) > len(worst):
        caption += f" {len(worst):,} of {len(modules):,}: the JSON report has them all."
    right = ("shape", "SQNR", "limit", "cosine", "largest relative error")
    out = [not words.is_ok(module) for module in worst]
    return section("Modules, worst first", table(caption, columns, rows, right, out))


def _checks(report: dict[str, Any]) -> Html:
    checks = report.get("checks") or []
    rows = [
        [c["name"], c["depth"], c["about"], f"{c['checked']:,}", f"{c['failed']:,}"] for c in checks
    ]
    columns = ["check", "depth", "what holds where it passes", "checked", "failed"]
    out = [bool(check["failed"]) for check in checks]
    return section("Checks", table("All that ran.", columns, rows, ("checked", "failed"), out))
