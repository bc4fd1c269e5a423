"""A report as text: untrusted names made harmless, numbers as people read them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from quantcli.core.untrusted.names import printable

NOT_REACHED = {
    "full": "weights were not read (--full)",
    "against": "nothing was compared with the source (--against MODEL)",
    "run": "no text was run through it (--run)",
}
_QUOTED = re.compile(r"`([^`]*)`")
_LAYER = re.compile(r"\b(?:layers|layer|blocks|block|h)\.([0-9]{1,6})\b")


def literal(text: object, limit: int = 2000) -> str:
    """One line of limited length, without control characters, bidirectional marks, lone surrogates."""
    whole = str(text)
    return printable(whole[:limit]) + ("…" if len(whole) > limit else "")


def one_line(text: str) -> str:
    """Text of several lines in one, with a sign for each end of a line."""
    return text.replace("\n", "↵")


def decibels(value: float | None) -> str:
    """`value` as 41.2 dB; `exact` if there is no error, `-` if nothing was measured."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    return "exact" if value >= 200 else f"{value:.1f} dB"  # SQNR is counted up to 200 dB


def number(value: float | None) -> str:
    """Four significant digits; whole numbers with commas."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def span(ends: Sequence[float] | None) -> str:
    """A 95 % interval: 1.0001 to 1.0012; empty for None."""
    return "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"


def ratio_span(ends: Sequence[float] | None) -> str:
    """A 95 % interval of a ratio near 1: 1.0001 to 1.0012; empty for None."""
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def bits(part: dict[str, Any]) -> float | None:
    """Stored bits for each weight of a label, scales included; None if the weights are not counted."""
    return 8 * part["bytes"] / part["weights"] if part.get("weights") else None


def total_bytes(report: dict[str, Any]) -> int:
    """Bytes of all tensors."""
    return sum(part["bytes"] for part in report.get("sizes") or [])


def total_bits(report: dict[str, Any]) -> float | None:
    """Stored bits for each weight of the checkpoint; None if some weights are not counted."""
    weights = [part["weights"] for part in report.get("sizes") or []]
    return 8 * total_bytes(report) / sum(weights) if weights and all(weights) else None


def percent(value: float) -> str:
    """A share as 98.10 %."""
    return f"{100 * value:.2f} %"


def middle(name: str, letters: int) -> str:
    """A name of so many letters at most: the middle of a longer one is cut out."""
    whole, keep = literal(name), letters // 2
    return whole if len(whole) <= letters else f"{whole[:keep]}…{whole[-keep:]}"


def short_names(reports: Sequence[dict[str, Any]]) -> list[str]:
    """The names of several checkpoints: the ends of their paths that tell them apart."""
    paths = [str(report["checkpoint"]).rstrip("/").split("/") for report in reports]
    length = 1
    while length < max(map(len, paths)) and len({tuple(p[-length:]) for p in paths}) < len(paths):
        length += 1
    return ["/".join(path[-length:]) for path in paths]


def levels(report: dict[str, Any]) -> list[float]:
    """SQNR in dB of all modules whose weights are finite, lowest first."""
    found = (module.get("sqnr_db") for module in report.get("modules") or [])
    return sorted(level for level in found if level is not None and math.isfinite(level))


def shape(sizes: list[int] | None) -> str:
    """4096 x 1024."""
    return " x ".join(map(str, sizes)) if sizes else "-"


def rank(value: float | None) -> float:
    """`value` as a number that sorts: NaN first, None, which was not measured, last."""
    if value is None:
        return math.inf
    return -math.inf if math.isnan(value) else value


def badness(module: dict[str, Any]) -> tuple[bool, float, str]:
    """Sorts modules: those that failed first, then by how little is left to their limit."""
    left = rank(module.get("sqnr_db")) - (module.get("limit_db") or 0.0)
    return is_ok(module), left, module["module"]


def is_ok(thing: dict[str, Any]) -> bool:
    """Whether a module or layer is within its limit; also if it has no `ok`."""
    return thing.get("ok") is not False


def is_failed(report: dict[str, Any]) -> bool:
    """Whether the answer is no."""
    return report.get("ok") is not True


def errors(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Findings that make the answer no."""
    return [f for f in report.get("findings") or [] if f["severity"] == "error"]


def place(finding: dict[str, Any]) -> str:
    """The module, layer, tensor or file that a finding is about, without what follows its name."""
    where = str(finding.get("where") or "")
    quoted = _QUOTED.match(where)
    return quoted[1] if quoted else where


def notes(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Findings that change no answer."""
    return [f for f in report.get("findings") or [] if f["severity"] != "error"]


def spread(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Findings of different checks in turn: many of one check do not hide the only one of another."""
    turns: dict[str, int] = {}
    keyed = []
    for place, finding in enumerate(findings):
        turn = turns[finding["check"]] = turns.get(finding["check"], 0) + 1
        keyed.append((turn, place, finding))
    return [finding for *_, finding in sorted(keyed, key=lambda key: key[:2])]


def tally(findings: list[dict[str, Any]]) -> str:
    """58 sqnr, 1 headers."""
    counts = Counter(finding["check"] for finding in findings)
    return ", ".join(f"{count:,} {literal(check, 40)}" for check, count in counts.most_common())


def bad_layers(report: dict[str, Any]) -> list[int]:
    """Numbers of the layers where something is wrong."""
    run = report.get("run") or {}
    places = [f["where"] or "" for f in errors(report)]
    places += [m["module"] for m in report.get("modules") or [] if not is_ok(m)]
    places += [layer["layer"] for layer in run.get("layers") or [] if not is_ok(layer)]
    return sorted({int(index) for place in places for index in _LAYER.findall(place)})


def some(numbers: list[int], limit: int = 12) -> str:
    """1, 2, 3 and 4 more."""
    more = f" and {len(numbers) - limit} more" if len(numbers) > limit else ""
    return ", ".join(map(str, numbers[:limit])) + more


def limits(report: dict[str, Any]) -> list[str]:
    """The limits that were set for the whole checkpoint, as text."""
    texts = {"min_sqnr": "SQNR at least {} dB", "max_ppl_ratio": "perplexity at most {} x",
             "max_kl": "mean KL divergence at most {}"}  # fmt: skip
    values = report.get("limits") or {}
    return [texts.get(key, key + " {}").format(number(v)) for key, v in values.items() if v is not None]


def not_reached(report: dict[str, Any]) -> list[str]:
    """What was not checked: by the depths that did not run, and what one that ran left out."""
    depths = [words for depth, words in NOT_REACHED.items() if depth not in report.get("depths", ())]
    return depths + [literal(words) for words in report.get("not_checked") or ()]


def module_facts(module: dict[str, Any]) -> list[tuple[str, str]]:
    """All facts of a module but its name and histogram: (what, value)."""
    facts = [
        ("type", literal(module.get("label") or "-")),
        ("shape", shape(module.get("shape"))),
        ("SQNR", decibels(module.get("sqnr_db"))),
        ("limit", decibels(module.get("limit_db"))),
        ("cosine", "-" if module.get("cosine") is None else f"{module['cosine']:.6f}"),
        ("largest relative error", number(module.get("max_rel_error"))),
    ]
    ratio = module.get("scale_ratio")
    optional = {
        "edited": literal(module["edited"]) if module.get("edited") else None,
        "codes that differ": None
        if module.get("codes_differ") is None
        else number(module["codes_differ"]),
        "scales": f"{number(ratio[0])} to {number(ratio[1])} x expected" if ratio else None,
        "worst rows": worst_rows(module),
        "outlier channels": outlier_channels(module),
    }
    return facts + [(what, value) for what, value in optional.items() if value]


def layer_facts(layer: dict[str, Any]) -> list[tuple[str, str]]:
    """All facts of a layer that ran but its name: (what, value)."""
    return [
        ("SQNR", decibels(layer.get("sqnr_db"))),
        ("limit", decibels(layer.get("limit_db"))),
        ("after all before it", decibels(layer.get("cumulative_db"))),
    ]


TASK_COLUMNS = {"task": "name", "metric": "", "documents": "right", "reference": "right",
                "checkpoint": "right", "change": "right", "95 % interval": "right",
                "answer": ""}  # fmt: skip


def task_rows(report: dict[str, Any]) -> list[list[str]]:
    """Scores of tasks as cells of `TASK_COLUMNS`."""
    rows = []
    for task in (report.get("run") or {}).get("tasks") or []:
        ends = task["interval"]
        interval = "-" if ends is None else f"{ends[0]:+.4f} to {ends[1]:+.4f}"
        scores = [f"{task[key]:.4f}" for key in ("reference", "checkpoint")]
        answer = "" if ends is None else _BETTER[task["better"]]
        name, metric = literal(task["task"], 80), literal(task["metric"], 80)
        change = f"{task['change']:+.4f}"
        rows.append([name, metric, number(task["documents"]), *scores, change, interval, answer])
    return rows


def trace_facts(trace: dict[str, Any]) -> list[tuple[str, str]]:
    """All facts of a module that was traced but its name: (what, value)."""
    facts = [
        ("type", f"{literal(trace['label'])}: {literal(trace['numerics'])}"),
        ("tokens", number(trace["tokens"])),
        ("input", decibels(trace["input_db"])),
        ("output", decibels(trace["output_db"])),
        ("output on the float input", decibels(trace["alone_db"])),
    ]
    if trace["edited"]:
        facts.append(("edited", literal(trace["edited"])))
    facts += [(f"error of {each['source']}", decibels(each["sqnr_db"])) for each in trace["sources"]]
    for key, what in (("worst_outputs", "output"), ("worst_inputs", "input")):
        worst = [f"{each['number']} ({_of_error(each)})" for each in trace[key][:3]]
        facts += [(f"worst {what} channels", ", ".join(worst))] if worst else []
    tokens = [
        f"{one_line(literal(each['text'], 40))!r} of window {each['window']} ({_of_error(each)})"
        for each in trace["worst_tokens"][:3]
    ]
    return facts + ([("worst tokens", ", ".join(tokens))] if tokens else [])


def _of_error(worst: dict[str, Any]) -> str:
    return f"{decibels(worst['sqnr_db'])}, {percent(worst['share'])} of the error"


def worst_rows(module: dict[str, Any], limit: int = 3) -> str:
    """17 (20.1 dB), 3 (22.0 dB)."""
    rows = module.get("worst_rows") or []
    return ", ".join(f"{row['row']} ({decibels(row['sqnr_db'])})" for row in rows[:limit])


def outlier_channels(module: dict[str, Any], limit: int = 3) -> str:
    """5 (31 x)."""
    channels = module.get("outlier_channels") or []
    return ", ".join(f"{c['channel']} ({number(c['ratio'])} x)" for c in channels[:limit])


def run_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Results of running text through the checkpoint: (what, value)."""
    run = report.get("run") or {}
    figures = figure_texts(run, report.get("limits") or {})
    if run.get("ppl"):
        figures["perplexity"] = f"{number(run['ppl'].get('reference'))} -> " + (
            f"{number(run['ppl'].get('checkpoint'))}, {figures['perplexity']}"
        )
    if run.get("tokens") is not None:
        figures["tokens"] = number(run["tokens"])
    return [*figures.items(), *_served_facts(run.get("served") or {})]


def _served_facts(served: dict[str, Any]) -> list[tuple[str, str]]:
    """Results of asking a server: (what, value)."""
    if not served:
        return []
    facts = [("server", f"{literal(served['model'], 80)} at {literal(served['url'], 200)}")]
    for what, value in figure_texts(served).items():
        bound = "at least: " if what == "KL divergence" else ""
        facts.append((f"server, {what}", bound + value))
    if served["candidates"] is not None:
        covered = f"{percent(served['covered'])} of the reference's probability"
        facts.append(("server, candidates", f"{served['candidates']} for each token, with {covered}"))
    replay = figure_texts(served["replay"])
    return [*facts, *((f"server next to the replay, {what}", value) for what, value in replay.items())]


def figure_texts(run: dict[str, Any], limits_: dict[str, Any] | None = None) -> dict[str, str]:
    """The figures of a run, or of one text of it, by what they are; with intervals, and limits."""
    most = limits_ or {}
    ppl, kl = run.get("ppl") or {}, run.get("kl") or {}
    facts = {}
    if ppl.get("ratio") is not None:
        aside = _aside(ratio_span(ppl.get("interval")), most.get("max_ppl_ratio"), " x")
        facts["perplexity"] = f"{ppl['ratio']:.4f} x{aside}"
    if kl:
        aside = _aside(span(kl.get("interval")), most.get("max_kl"))
        facts["KL divergence"] = f"mean {number(kl.get('mean'))}, max {number(kl.get('max'))}{aside}"
    if run.get("top1_agreement") is not None:
        ends = run.get("top1_interval")
        aside = _aside("" if ends is None else f"{100 * ends[0]:.2f} to {percent(ends[1])}")
        facts["same first choice"] = f"{percent(run['top1_agreement'])} of tokens{aside}"
    if run.get("mean_abs_logprob_change") is not None:
        value = number(run["mean_abs_logprob_change"])
        facts["mean change of a log-probability"] = value + _aside(span(run.get("change_interval")))
    if run.get("outputs_db") is not None:
        ends = run.get("outputs_interval")
        aside = _aside("" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}", unit=" dB")
        facts["SQNR of outputs"] = decibels(run["outputs_db"]) + aside
    if run.get("peir") is not None:
        facts["PEIR of outputs"] = number(run["peir"]) + _aside(span(run.get("peir_interval")))
    return facts


def text_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """The figures of each text, by column; empty if there is one text alone."""
    texts = (report.get("run") or {}).get("texts") or []
    return [
        {"text": literal(text.get("text")), "tokens": number(text.get("tokens"))} | figure_texts(text)
        for text in (texts if len(texts) > 1 else ())
    ]


# columns of a comparison of two runs, and the classes of their cells on a page
COMPARED_COLUMNS = {"figure": "", "before": "right", "now": "right", "change": "right",
                    "95 % interval": "right", "answer": ""}  # fmt: skip
_FORMS: dict[str, Callable[[float], str]] = {
    "ppl": "{:.4f} x".format, "outputs_db": lambda value: decibels(value),
    "top1_agreement": lambda value: percent(value),
}  # fmt: skip
_CHANGES: dict[str, Callable[[float], str]] = {
    "ppl": lambda value: f"{100 * value:+.3f} %", "outputs_db": "{:+.2f} dB".format,
    "top1_agreement": lambda value: f"{100 * value:+.2f} %",
}  # fmt: skip
_BETTER = {True: "better", False: "worse", None: "no difference seen"}


def comparison_rows(figures: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Figures of two runs on the same windows as cells of `COMPARED_COLUMNS`."""
    rows = []
    for figure in figures:
        form = _FORMS.get(figure["key"], number)
        change = _CHANGES.get(figure["key"], "{:+.4g}".format)
        ends = figure["interval"]
        interval = "-" if ends is None else f"{change(ends[0])} to {change(ends[1])}"
        now = form(figure["now"])
        answer = "" if ends is None else _BETTER[figure["better"]]
        rows.append(
            [figure["name"], form(figure["before"]), now, change(figure["change"]), interval, answer]
        )
    return rows


def comparison_texts(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What a checkpoint was compared with window by window, and the comparison: the first of several,
    and an earlier report."""
    found = []
    if (first := report.get("compared")) is not None:
        found.append((str(first["checkpoint"]), first))
    earlier = report.get("baseline") or {}
    if (paired := earlier.get("paired")) is not None:
        found.append((f"the baseline, {literal(earlier['checkpoint'])}", paired))
    return found


def _aside(interval: str, limit: float | None = None, unit: str = "") -> str:
    """What stands in parentheses after a figure: its 95 % interval and its limit."""
    parts = [f"95 % {interval}{unit}"] if interval else []
    parts += [] if limit is None else [f"limit {number(limit)}{unit}"]
    return f" ({'; '.join(parts)})" if parts else ""
