"""The change against an earlier report: what is compared, and files that are not reports."""

import copy
import json
import math

import pytest

from quantcli.core.errors import InputError
from quantcli.verification.report.baseline import (
    compare,
    figure_rows,
    module_rows,
    read_baseline,
    summary,
)
from quantcli.verification.report.page import page
from tests import reports


@pytest.fixture
def saved(tmp_path):
    """Writes a document as an earlier run did, and reads it."""

    def save(document):
        file = tmp_path / "old.json"
        file.write_text(document if isinstance(document, str) else json.dumps(document))
        return read_baseline(file)

    return save


def worse():
    """The report of two layers after a change for the worse."""
    report = copy.deepcopy(reports.report(2))
    first, second, third = report["modules"][:3]
    first["sqnr_db"] -= 5.5
    second["sqnr_db"] += 1.0
    third["module"] = "model.layers.0.self_attn.new_proj"
    report["run"]["kl"]["mean"] = 0.003
    report["sizes"][0]["bytes"] -= 1_000_000
    return report


def test_what_changed(saved):
    before, now = reports.report(2), worse()
    change = compare(now, saved(before), "x")
    figures = {figure["name"]: figure for figure in change["figures"]}
    assert figures["mean KL divergence"] == {
        "name": "mean KL divergence", "before": 0.001, "now": 0.003, "change": 0.002, "better": False,
    }  # fmt: skip
    assert (figures["size"]["change"], figures["size"]["better"]) == (-1_000_000, True)
    assert (figures["errors"]["change"], figures["errors"]["better"]) == (0, None)
    lost, *_, gained = change["modules"]
    assert (lost["module"], lost["change_db"]) == (now["modules"][0]["module"], -5.5)
    assert (gained["module"], gained["change_db"]) == (now["modules"][1]["module"], 1.0)
    assert len(change["modules"]) == len(now["modules"]) - 1
    assert change["only_before"] == [before["modules"][2]["module"]]
    assert change["only_now"] == ["model.layers.0.self_attn.new_proj"]
    assert summary(change) == (
        "1 of 14 modules lost SQNR, 1 gained; 1 only in the earlier report; 1 only in this one"
    )
    assert module_rows(change, 5)[0][3] == "-5.50 dB"
    assert (["mean KL divergence", "0.001", "0.003", "+0.002"], False) in figure_rows(change)
    json.dumps(change, allow_nan=False)


def test_the_page_has_it(saved):
    now = worse()
    now["baseline"] = compare(now, saved(reports.report(2)), "x")
    shown = reports.Elements(page(now)).text
    assert "Change against an earlier report" in shown
    assert "mean KL divergence 0.001 0.003 +0.002, worse" in shown
    assert "size 5.1 MB 4.1 MB -1.0 MB, better" in shown


def test_runs_on_another_text_are_not_judged(saved):
    before, now = reports.report(2), worse()
    before["run"]["ppl"]["reference"] = 20.0
    change = compare(now, saved(before), "x")
    better = {figure["name"]: figure["better"] for figure in change["figures"]}
    assert better["mean KL divergence"] is None
    assert better["size"] is True
    assert summary(change).endswith("the runs differ in their text or their reference")


@pytest.mark.parametrize("envelope", [{}, {"schema_version": 1, "error": None, "exit_code": 0}])
def test_documents_of_one_and_of_several(saved, envelope):
    one, other = reports.report(2), {**reports.structure(), "checkpoint": "/elsewhere/second"}
    assert saved(envelope | one).of("anything").checkpoint == one["checkpoint"]
    both = saved({**envelope, "ok": True, "checkpoints": [one, other]})
    assert both.of("/models/qwen3-w8a8").modules
    assert both.of("/now/here/second").checkpoint == "/elsewhere/second"
    with pytest.raises(InputError, match="no report of third"):
        both.of("/models/third")


def test_a_report_without_modules(saved):
    change = compare(reports.structure(), saved(reports.report(2)), "x")
    assert (change["modules"], change["only_before"], change["only_now"]) == ([], [], [])
    assert summary(change) == "no module was measured in both reports"


def test_numbers_that_are_not_finite_do_not_count(saved):
    now = worse()
    now["modules"][0]["sqnr_db"] = math.nan
    change = compare(now, saved(reports.report(2)), "x")
    assert now["modules"][0]["module"] in change["only_before"]
    json.dumps(change, allow_nan=False)


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ("", "not valid JSON"),
        ("[1]", "is not a report"),
        ("{}", "is not a report of `quantcli verify`: `checkpoint`: field required"),
        (json.dumps({**reports.structure(), "schema_version": 2}), "has schema version 2"),
        (json.dumps({**reports.structure(), "schema_version": True}), "has schema version True"),
        (json.dumps({**reports.structure(), "modules": [{"module": "a", "sqnr_db": "b"}]}),
         "`modules.0.sqnr_db`: input should be a valid number"),
        (json.dumps({"ok": True, "plan": {}, "schema_version": 1}), "is not a report"),
        (json.dumps({"ok": False, "error": {"what": "no such\x1b[31m model"}}),
         r"ended with an error, no such\\x1b\[31m model"),
        (json.dumps({"checkpoints": []}), "holds no report"),
        (json.dumps({"checkpoints": 3}), "is not a report"),
    ],
)  # fmt: skip
def test_files_that_are_not_reports(saved, document, what):
    with pytest.raises(InputError, match=what) as caught:
        saved(document)
    assert "--baseline" in caught.value.where
    assert caught.value.fix


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_baseline(tmp_path)
