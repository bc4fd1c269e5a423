"""`quantcli verify`, and its report on a terminal: errors first, the verdict last."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any

import typer

from quantcli.cli import next as following
from quantcli.cli import options
from quantcli.cli.output import FAILED, OK, WARNING, Output
from quantcli.core.errors import AnswerNo
from quantcli.core.text import count
from quantcli.core.text import size as size_text
from quantcli.verification.options import VerifyOptions
from quantcli.verification.report import words

_FINDINGS = 10  # findings to show; more if more checks have errors: one of each
_MODULES = 10
_LOST = 5  # modules that lost SQNR against an earlier report
_BETTER = {True: "better", False: "worse", None: ""}


def show_verification(out: Output, report: dict[str, Any], modules: int = _MODULES) -> None:
    """Print a report: errors, the worst `modules`, the run, notes, checks, and last the verdict."""
    show_errors(out, words.errors(report))
    _modules(out, report.get("modules") or [], modules)
    if sizes := report.get("sizes"):
        out.line(f"size         {size_text(words.total_bytes(report))}: {_sizes(sizes)}")
    for what, value in words.run_facts(report):
        out.line(f"{what:<13}{value}" if len(what) < 13 else f"{what} {value}")
    if texts := words.text_rows(report):
        out.line()
        for text in texts:
            out.line(f"text         {text.pop('text')}")
            for what, value in text.items():
                out.line(f"  {what:<34}{value}")
        out.line()
    _layers(out, (report.get("run") or {}).get("layers") or [])
    _extras(out, report)
    _change(out, report.get("baseline"))
    _compared(out, report)
    notes = words.spread(words.notes(report))
    for note in notes[:_FINDINGS]:
        where = f" ({note['where']})" if note.get("where") else ""
        out.line(f"note         {note['what']}{where}", WARNING)
    if len(notes) > _FINDINGS:
        out.line(f"note         and {len(notes) - _FINDINGS} more, with --json")
    _checks(out, report)
    if (written := report.get("card_written")) is not None:
        out.line(f"card         {'README.md has the figures' if written else 'not changed'}")
    if missing := words.not_reached(report):
        out.line(f"not checked  {'; '.join(missing)}")
    out.line(verdict(report), FAILED if words.is_failed(report) else OK)


def show_several(out: Output, document: dict[str, Any]) -> None:
    """Print the reports on several checkpoints: errors and verdict of each, then all in a table."""
    from quantcli.verification.report.dashboard import COLUMNS, RIGHT, rows

    reports = document["checkpoints"]
    for report in reports:
        show_errors(out, words.errors(report))
        _change(out, report.get("baseline"))
        out.line(verdict(report), FAILED if words.is_failed(report) else OK)
    out.line()
    out.table([*COLUMNS], rows(reports), RIGHT)
    for name, report in zip(words.short_names(reports), reports, strict=True):
        run = report.get("run") or {}
        if report.get("compared") is not None or run.get("tasks") or run.get("traces"):
            out.line()
            out.line(f"{words.literal(name)}:")
            _extras(out, report)
            _compared(out, report)


def verdict(report: dict[str, Any]) -> str:
    """One line: passed or not, the depths that ran, and the layers to look at."""
    depths = ", ".join(report.get("depths") or [])
    notes = count(words.notes(report), "note")
    if not words.is_failed(report):
        checks = count(report.get("checks") or [], "check")
        return f"passed: {report['checkpoint']}: {depths}; {checks}, {notes}"
    errors, layers = words.errors(report), words.bad_layers(report)
    look = f"; look at layer{'s' * (len(layers) > 1)} {words.some(layers)}" if layers else ""
    counted = f"{count(errors, 'error')} ({words.tally(errors)})"
    return f"FAILED: {report['checkpoint']}: {counted}, {notes}{look}"


def failure(*reports: dict[str, Any]) -> AnswerNo | None:
    """The answer no, with the number of errors; None if all checkpoints passed."""
    failed = [report for report in reports if words.is_failed(report)]
    if not failed:
        return None
    errors = [error for report in failed for error in words.errors(report)]
    what = f"verification failed: {count(errors, 'error')} ({words.tally(errors)})"
    where = ", ".join(report["checkpoint"] for report in failed)
    return AnswerNo(what, where=where, fix="`findings` has each error with its fix")


def show_errors(out: Output, errors: list[dict[str, Any]]) -> None:
    """Each check is shown once before any is shown twice; a fix for several errors is printed once."""
    limit = max(_FINDINGS, len({error["check"] for error in errors}))
    spread = words.spread(errors)
    fixes: set[str] = set()
    for error in spread[:limit]:
        out.line(f"FAILED       {error['check']}: {error['what']}", FAILED)
        if error.get("where"):
            out.line(f"  --> {error['where']}")
        fix = error.get("fix")
        if fix and fix not in fixes:
            out.line(f"  fix: {fix}")
            fixes.add(fix)
    if rest := spread[limit:]:
        out.line(f"FAILED       and {len(rest)} more ({words.tally(rest)}), with --json")
    if errors:
        out.line()


def _modules(out: Output, modules: list[dict[str, Any]], limit: int) -> None:
    worst = sorted(modules, key=words.badness)
    rows = []
    for module in worst[:limit]:
        facts = dict(words.module_facts(module))
        cells = [facts.get(what, "") for what in ("type", "SQNR", "limit", "cosine", "worst rows")]
        mark = "ok" if words.is_ok(module) else "FAILED"
        rows.append([mark, words.literal(module["module"]), *cells])
    columns = ["", "worst modules", "type", "SQNR", "limit", "cosine", "worst rows"]
    styles = {"ok": OK, "FAILED": FAILED}
    out.table(columns, rows, {"SQNR", "limit", "cosine"}, {""}, styles)
    if rest := worst[limit:]:
        failed = sum(not words.is_ok(module) for module in rest)
        out.line(f"and {count(rest, 'module')} more" + (f", {failed} of them FAILED" if failed else ""))
    if differ := [m["codes_differ"] for m in modules if m.get("codes_differ") is not None]:
        ratios = [end for m in modules for end in m.get("scale_ratio") or ()]
        span = f"; scales {min(ratios):.4g} to {max(ratios):.4g} times the other's" if ratios else ""
        out.line(f"codes        differ in {sum(map(bool, differ))} of {len(differ)} modules{span}")
    if modules:
        out.line()


def _change(out: Output, change: dict[str, Any] | None) -> None:
    """The change against an earlier report."""
    if change is None:
        return
    from quantcli.verification.report import baseline

    earlier = f"{words.literal(change['checkpoint'])}, {words.literal(change['tool'])}"
    out.line(f"baseline     {earlier}: {baseline.summary(change)}")
    rows = [[*cells, _BETTER[better]] for cells, better in baseline.figure_rows(change)]
    out.table(["figure", "before", "now", "change", ""], rows, {"before", "now", "change"})
    lost = baseline.module_rows(change, _LOST)
    out.table(["lost most", "before", "now", "change"], lost, {"before", "now", "change"})
    out.line()


def _compared(out: Output, report: dict[str, Any]) -> None:
    """The comparison window by window with another checkpoint."""
    columns = [*words.COMPARED_COLUMNS]
    for other, comparison in words.comparison_texts(report):
        out.line(f"next to {words.literal(other)}: {comparison['verdict']}")
        out.table(columns, words.comparison_rows(comparison["figures"]), {*columns[1:-1]})
        for text in comparison["texts"]:
            out.line(f"on {words.literal(text['text'])}: {text['verdict']}")
        out.line()


def _sizes(sizes: list[dict[str, Any]]) -> str:
    """W8A8_DYNAMIC 4.8 MB (8.2 bits per weight), FLOAT 4.2 MB."""
    texts = []
    for size in sizes:
        bits = words.bits(size)
        aside = "" if bits is None else f" ({bits:.3g} bits per weight)"
        texts.append(f"{words.literal(size['label'])} {size_text(size['bytes'])}{aside}")
    return ", ".join(texts)


def _layers(out: Output, layers: list[dict[str, Any]]) -> None:
    if not layers:
        return
    worst = min(layers, key=lambda layer: (words.is_ok(layer), words.rank(layer.get("sqnr_db"))))
    failed = sum(not words.is_ok(layer) for layer in layers)
    counted = f"; {failed} of {count(layers, 'layer')} FAILED" if failed else ""
    out.line(f"layer output {words.decibels(worst.get('sqnr_db'))} at worst, {worst['layer']}{counted}")


def _extras(out: Output, report: dict[str, Any]) -> None:
    """What a run did next to the comparison: scores of tasks, and single modules."""
    if tasks := words.task_rows(report):
        columns = [*words.TASK_COLUMNS]
        out.line()
        out.table(columns, tasks, {*columns[2:-1]})
        out.line()
    for trace in (report.get("run") or {}).get("traces") or []:
        _trace(out, trace)


def _trace(out: Output, trace: dict[str, Any]) -> None:
    """One module: what comes in, what goes out, and the sources of its error."""
    out.line()
    out.line(f"module       {words.literal(trace['module'])}")
    for what, value in words.trace_facts(trace):
        out.line(f"  {what:<34}{value}")
    out.line()


def _checks(out: Output, report: dict[str, Any]) -> None:
    """One line a depth."""
    depths: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for check in report.get("checks") or []:
        depths[check["depth"]].append(check)
    for depth, checks in depths.items():
        failed = [f"{check['name']} FAILED" for check in checks if check["failed"]]
        fine = [f"{check['name']} {check['checked']:,}" for check in checks if not check["failed"]]
        out.line(f"{depth:<13}{', '.join([*failed, *fine])}")


Others = Annotated[list[str] | None, typer.Argument(help="More checkpoints, to be compared with it.")]


@options.on_screen
@options.fields_of(
    VerifyOptions,
    checkpoint=str,
    others=Others,
    page=options.Report,
    workers=options.Workers,
    executor=options.Executor,
    trust_remote_code=options.Trust,
)
def verify(chosen: VerifyOptions, output: Output) -> None:
    """Prove that a checkpoint is whole, loadable and faithful.

    Exits with 1 if it is not. Without options only headers are read; --full, --against and --run go
    deeper. Several checkpoints are compared in a table; all options apply to each.
    """
    from quantcli.cli.progress import watch
    from quantcli.commands import verify as commands

    with watch(output) as progress:
        report = commands.run(chosen, progress)
    for file in filter(None, (chosen.page, chosen.junit)):
        output.message(f"written: {file}")
    if len(chosen.checkpoints) > 1:
        steps = following.after_several(output, report["checkpoints"], chosen.page)
        with following.after(output, *steps):
            output.result(report, show_several, failure(*report["checkpoints"]))
        return
    steps = following.after_verify(output, str(chosen.checkpoint), report, chosen.page)
    with following.after(output, *steps):
        output.result(report, show_verification, failure(report))
