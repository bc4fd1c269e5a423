"""The page of several checkpoints, and its table on a terminal."""

import pytest

from quantcli.cli.output import Output
from quantcli.cli.verify import failure, show_several
from quantcli.verification.report import words
from quantcli.verification.report.charts import Entry, compared
from quantcli.verification.report.dashboard import COLUMNS, dashboard, rows
from tests import reports


@pytest.fixture(scope="module")
def three():
    """One that passed, one with errors, and one of which only headers were read."""
    good, bad, short = reports.report(2), reports.report(2, bad=["layers.1"]), reports.structure()
    bad["checkpoint"], short["checkpoint"] = "/models/other", "/models/deep/short"
    bad["sizes"][0]["bytes"] = 2_000_000
    bad["run"] |= {"mean_abs_logprob_change": 0.2, "change_interval": [0.15, 0.26]}
    return [good, bad, short]


def test_one_row_each(three):
    cells = [dict(zip(COLUMNS, row, strict=True)) for row in rows(three)]
    assert [row["checkpoint"] for row in cells] == ["qwen3-w8a8", "other", "short"]
    assert [row["answer"] for row in cells] == ["passed", "FAILED, 7 errors", "passed"]
    assert [row["size"] for row in cells] == ["5.1 MB", "3.0 MB", "-"]
    assert [row["change"] for row in cells] == ["0.024 (0.022 to 0.026)", "0.2 (0.15 to 0.26)", "-"]
    assert cells[0]["bits per weight"] == "9.07"
    assert cells[1]["worst SQNR"] == f"{min(m['sqnr_db'] for m in three[1]['modules']):.1f} dB"
    assert cells[2]["median SQNR"] == "-"


def test_the_page(three):
    shown = reports.Elements(dashboard(three))
    assert shown.text.startswith("FAILED: 3 checkpoints ✕ FAILED · 1 of 3 checkpoints")
    assert "✕ other · 7 errors (7 sqnr) · 1 note" in shown.text
    assert shown.charts() == [
        "Size",
        "SQNR of weights in dB: the median, and from the worst to the best module",
        "Mean change of a log-probability in nats, with its 95 % interval",
    ]
    assert "other\n0.2 (0.15 to 0.26)\n✕ FAILED" in shown.tips
    assert shown.labels.count("not measured") == 3
    assert "✓ Passed · 2 checkpoints" in dashboard([three[0], three[2]])


def test_bars_and_intervals_are_to_scale():
    entries = [Entry("a", 2.0, "2", "2", (1.0, 4.0)), Entry("b", 1.0, "1", "1")]
    bars = compared("t", entries, bars=True).marks
    assert [m.attributes["width"] for m in bars if m.tag == "rect"] == ["50%", "25%"]
    (span,) = [m.attributes for m in bars if m.attributes.get("x1") != m.attributes.get("x2")]
    assert (span["x1"], span["x2"]) == ("25%", "100%")
    points = [m.attributes["cx"] for m in compared("t", entries, bars=False).marks if m.tag == "circle"]
    assert points == ["35.12%", "5.36%"]  # of 1 to 4, with 6 % of room at both ends


def test_names_are_as_long_as_needed():
    reports_ = [{"checkpoint": path} for path in ("/a/x/out", "/b/x/out", "/b/y")]
    assert words.short_names(reports_) == ["a/x/out", "b/x/out", "/b/y"]
    assert words.short_names(reports_[1:]) == ["out", "y"]


def test_strangers_add_nothing(three):
    hostile = reports.Elements(dashboard([three[0], reports.hostile()]))
    assert not {"img", "a", "i", "iframe"} & {tag for tag, _ in hostile.elements}
    assert len(hostile.all("script")) == 1


def test_the_terminal_has_the_verdicts_and_the_table(three, capsys):
    show_several(Output(as_json=False), {"ok": False, "checkpoints": three})
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED: /models/other: 7 errors (7 sqnr), 1 note; look at layer 1" in lines
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("checkpoint ")) :]
    assert [line.split()[0] for line in table[1:]] == ["qwen3-w8a8", "other", "short"]


def test_the_terminal_has_tasks_and_traces_of_each(three, capsys):
    task = {"task": "ends", "metric": "acc", "documents": 9, "reference": 0.5, "checkpoint": 0.25,
            "change": -0.25, "interval": None, "better": None}  # fmt: skip
    trace = {"module": "layers.0.q", "label": "W8A8", "numerics": "int8", "tokens": 64, "edited": None,
             "input_db": 30.0, "output_db": 29.0, "alone_db": 31.0, "worst_outputs": [],
             "sources": [], "worst_inputs": [], "worst_tokens": []}  # fmt: skip
    run = {**(three[0]["run"] or {}), "tasks": [task], "traces": [trace]}
    show_several(
        Output(as_json=False), {"ok": False, "checkpoints": [{**three[0], "run": run}, three[1]]}
    )
    printed = capsys.readouterr().out
    assert "ends  acc" in printed
    assert "module       layers.0.q" in printed


def test_the_answer_is_no_if_one_fails(three):
    no = failure(*three)
    assert no.what == "verification failed: 7 errors (7 sqnr)"
    assert no.where == "/models/other"
    assert failure(three[0], three[2]) is None
