"""The change of a report against an earlier one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantcli.core.disk import disk_errors
from quantcli.core.errors import SCHEMA_VERSION, InputError
from quantcli.core.text import size as size_text
from quantcli.core.untrusted.tables import parse_json
from quantcli.verification.on_text.paired import compare_runs
from quantcli.verification.report import words

_FIX = "give what `quantcli verify --json` has printed: --baseline OLD.json"
_MOST_ERRORS = 3  # of a document that is not a report


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Finding(_Part):
    severity: str


class _Module(_Part):
    module: str
    sqnr_db: float


class _Size(_Part):
    bytes: int


class _Perplexity(_Part):
    reference: float
    ratio: float


class _Divergence(_Part):
    mean: float


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Window(_Part):
    text: int = 0
    reference: _Positive | None = None
    checkpoint: _Positive | None = None
    kl: _Number | None = None
    top1_agreement: _Number | None = None
    mean_abs_logprob_change: _Number | None = None
    energy: _Number | None = None
    error: _Number | None = None
    peir: _Number | None = None


class _Text(_Part):
    text: str
    sha256: str


class _OnText(_Part):
    ppl: _Perplexity | None
    kl: _Divergence | None
    top1_agreement: float | None
    mean_abs_logprob_change: float | None
    outputs_db: float | None = None
    peir: float | None = None
    tokens: int | None = None
    texts: list[_Text] = []
    windows: list[_Window] = []


class Earlier(_Part):
    """What is compared of an earlier report; of a report of today in the same way."""

    checkpoint: str
    tool: str
    findings: list[_Finding]
    modules: list[_Module]
    sizes: list[_Size] = []
    run: _OnText | None

    @property
    def levels(self) -> dict[str, float]:
        """SQNR in dB by module, of those whose weights are finite."""
        return {m.module: m.sqnr_db for m in self.modules if math.isfinite(m.sqnr_db)}


@dataclass(frozen=True)
class Baseline:
    """The reports of an earlier document."""

    file: Path
    reports: tuple[Earlier, ...]

    def of(self, checkpoint: str) -> Earlier:
        """The report to compare with: the only one, or that of the same checkpoint by path or name.

        InputError if there is none.
        """
        if len(self.reports) == 1:
            return self.reports[0]
        name = Path(checkpoint).name
        for same in (
            [report for report in self.reports if report.checkpoint == checkpoint],
            [report for report in self.reports if Path(report.checkpoint).name == name],
        ):
            if len(same) == 1:
                return same[0]
        what = f"has no report of {name}, or several"
        raise InputError(what, where=f"--baseline {self.file}", fix="give an earlier report of it")


def read_baseline(file: Path) -> Baseline:
    """The reports in a file that `verify --json` wrote, of one checkpoint or of several.

    InputError for any other file, and for one of another schema version.
    """
    where = f"--baseline {file}"
    with disk_errors(file):
        if not file.is_file():
            raise InputError("there is no such file", where=where, fix=_FIX)
        document = parse_json(file.read_bytes(), where, _FIX)
    if not isinstance(document, dict):
        raise InputError("is not a report of `quantcli verify`", where=where, fix=_FIX)
    version = document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        what = f"has schema version {version!r:.20}; this version of quantcli reads {SCHEMA_VERSION}"
        raise InputError(what, where=where, fix="make the report again with this version")
    error = document.get("error")
    if isinstance(error, dict) and "checkpoint" not in document and "checkpoints" not in document:
        what = f"holds no report: that run ended with an error, {words.literal(error.get('what'), 200)}"
        raise InputError(what, where=where, fix=_FIX)
    several = document.get("checkpoints", [document])
    try:
        reports = tuple(Earlier.model_validate(report) for report in several)
    except (ValidationError, TypeError) as problem:
        what = f"is not a report of `quantcli verify`{_why(problem)}"
        raise InputError(what, where=where, fix=_FIX) from None
    if not reports:
        raise InputError("holds no report", where=where, fix=_FIX)
    return Baseline(file, reports)


def _why(problem: ValidationError | TypeError) -> str:
    if not isinstance(problem, ValidationError):
        return ""
    errors = problem.errors()[:_MOST_ERRORS]
    places = (f"`{'.'.join(map(str, e['loc'])) or 'it'}`: {e['msg'].lower()}" for e in errors)
    return words.literal(": " + "; ".join(places), 300)


@dataclass(frozen=True)
class _Figure:
    """One number of a report: its name, its value, whether more of it is better, how it is shown."""

    name: str
    value: Callable[[Earlier], float | None]
    more_is_better: bool | None
    form: Callable[[float], str]
    of_run: bool = False


def _median(report: Earlier) -> float | None:
    return statistics.median(report.levels.values()) if report.levels else None


def _ratio(value: float) -> str:
    return f"{value:.4f} x"


def _bytes(value: float) -> str:
    return size_text(round(value))


def _run(report: Earlier, key: str, within: str = "") -> float | None:
    """A number of `run`, or of a group in it."""
    group = getattr(report.run, within, None) if within else report.run
    value: float | None = getattr(group, key, None)
    return value


_FIGURES = (
    _Figure("errors", lambda r: sum(f.severity == "error" for f in r.findings), False, words.number),
    _Figure("size", lambda r: sum(s.bytes for s in r.sizes) if r.sizes else None, False, _bytes),
    _Figure("worst SQNR", lambda r: min(r.levels.values(), default=None), True, words.decibels),
    _Figure("median SQNR", _median, True, words.decibels),
    _Figure("perplexity of the reference",
            lambda r: _run(r, "reference", "ppl"), None, words.number, True),
    _Figure("perplexity ratio", lambda r: _run(r, "ratio", "ppl"), False, _ratio, True),
    _Figure("mean KL divergence", lambda r: _run(r, "mean", "kl"), False, words.number, True),
    _Figure("same first choice", lambda r: _run(r, "top1_agreement"), True, words.percent, True),
    _Figure("mean change of a log-probability",
            lambda r: _run(r, "mean_abs_logprob_change"), False, words.number, True),
    _Figure("SQNR of outputs", lambda r: _run(r, "outputs_db"), True, words.decibels, True),
    _Figure("PEIR of outputs", lambda r: _run(r, "peir"), False, words.number, True),
)  # fmt: skip


def compare(report: dict[str, Any], baseline: Baseline, checkpoint: str) -> dict[str, Any]:
    """The change of a report against the earlier one, as JSON-able data.

    checkpoint, tool: those of the earlier report.
    figures: {"name", "before", "now", "change", "better"} each; better is None if nothing changed, if
             the figure is of the reference, or of runs that differ in their text. Those that only one
             report has are left out.
    same_text: whether both ran one reference on one text, as far as its perplexity tells.
    paired: the change window by window, see `compare_runs`; None if the windows are not the same.
    modules: {"module", "before_db", "now_db", "change_db"} of each in both, largest loss first.
    only_before, only_now: names of modules that one report has, if both have measured any.
    """
    before, now = baseline.of(checkpoint), Earlier.model_validate(report)
    levels = before.levels, now.levels
    modules = [
        {
            "module": name,
            "before_db": levels[0][name],
            "now_db": level,
            "change_db": round(level - levels[0][name], 3),
        }
        for name, level in levels[1].items()
        if name in levels[0]
    ]
    return {
        "checkpoint": before.checkpoint,
        "tool": before.tool,
        "figures": list(_changes(before, now)),
        "same_text": _same_text(before, now),
        "paired": _paired(before, now),
        "modules": sorted(modules, key=lambda m: (m["change_db"], m["module"])),
        "only_before": sorted(levels[0].keys() - levels[1].keys()) if levels[1] else [],
        "only_now": sorted(levels[1].keys() - levels[0].keys()) if levels[0] else [],
    }


def _changes(before: Earlier, now: Earlier) -> Iterator[dict[str, Any]]:
    alike = _same_text(before, now)
    for figure in _FIGURES:
        old, new = figure.value(before), figure.value(now)
        if old is None or new is None:
            continue
        better = None
        if old != new and figure.more_is_better is not None and (alike or not figure.of_run):
            better = (new > old) == figure.more_is_better
        change = round(new - old, 6)
        yield {"name": figure.name, "before": old, "now": new, "change": change, "better": better}


def _same_text(before: Earlier, now: Earlier) -> bool:
    """Whether both reports ran one reference on one text, as far as its perplexity tells."""
    old, new = (_run(report, "reference", "ppl") for report in (before, now))
    return old is None or new is None or math.isclose(old, new, rel_tol=1e-3)


def _paired(before: Earlier, now: Earlier) -> dict[str, Any] | None:
    """The comparison of both runs, window by window; None if one did not run, or the windows differ."""
    if before.run is None or now.run is None or not before.run.texts:
        return None
    return compare_runs(before.run.model_dump(), now.run.model_dump())


def figure_rows(change: dict[str, Any]) -> list[tuple[list[str], bool | None]]:
    """The figures as cells, name, before, now and change, and whether each is better."""
    forms = {figure.name: figure.form for figure in _FIGURES}
    rows = []
    for figure in change["figures"]:
        form, amount = forms[figure["name"]], figure["change"]
        sign = "" if not amount else "+" if amount > 0 else "-"
        cells = [
            form(figure["before"]),
            form(figure["now"]),
            sign + form(abs(amount)) if sign else "none",
        ]
        rows.append(([figure["name"], *cells], figure["better"]))
    return rows


def module_rows(change: dict[str, Any], most: int) -> list[list[str]]:
    """The modules that lost most as cells: name, before, now, change. A loss is 0.01 dB or more."""
    return [
        [
            m["module"],
            words.decibels(m["before_db"]),
            words.decibels(m["now_db"]),
            f"{m['change_db']:+.2f} dB",
        ]
        for m in change["modules"][:most]
        if m["change_db"] <= -0.01
    ]


def summary(change: dict[str, Any]) -> str:
    """How many modules lost, gained, and are in one report only."""
    amounts = [m["change_db"] for m in change["modules"]]
    lost, gained = (sum(sign * amount >= 0.01 for amount in amounts) for sign in (-1, 1))
    texts = ["no module was measured in both reports"]
    if amounts:
        texts = [f"{lost:,} of {len(amounts):,} modules lost SQNR, {gained:,} gained"]
    for key, text in (("only_before", "only in the earlier report"), ("only_now", "only in this one")):
        texts += [f"{len(change[key]):,} {text}"] if change[key] else []
    texts += [] if change["same_text"] else ["the runs differ in their text or their reference"]
    return "; ".join(texts)
