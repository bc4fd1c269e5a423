"""The report for CI: as many cases as things were checked, failures where something is wrong."""

from xml.etree import ElementTree

import pytest

from quantcli.cli.verify import verdict
from quantcli.verification.report import words
from quantcli.verification.report.junit import junit, junit_of_several
from quantcli.verification.report.page import page
from tests import reports


def cases(report):
    root = ElementTree.fromstring(junit(report))
    found = {}
    for suite in root:
        own = suite.findall("testcase")
        assert suite.get("tests") == str(len(own))
        assert suite.get("failures") == str(len(suite.findall("testcase/failure")))
        found[suite.get("name")] = own
    assert root.get("tests") == str(sum(map(len, found.values())))
    assert root.get("failures") == str(len(list(root.iter("failure"))))
    return found


def test_a_suite_a_depth_and_a_case_for_each_thing():
    report = reports.report(4, 16)
    found = cases(report)
    assert list(found) == report["depths"]
    assert len(found["structure"]) == 3
    assert len(found["against"]) == 1 + len(report["modules"])
    assert len(found["run"]) == 3 + 4 + 2
    assert not any(case.findall("failure") for own in found.values() for case in own)


def failed(cases):
    return [case for case in cases if case.find("failure") is not None]


def test_failures_say_what_where_and_how_to_fix_it():
    report = reports.report(2, bad=["layers.1.mlp.up_proj", "layers.0.mlp.up_proj"])
    check, *modules = cases(report)["against"]
    assert check.find("failure") is None  # its errors are those of modules
    assert [case.get("name") for case in failed(modules)] == [
        m["module"] for m in report["modules"] if not m["ok"]
    ]
    failure = failed(modules)[1].find("failure")
    assert failure.get("message").endswith("the limit is 30 dB")
    assert "  --> model.layers.1.mlp.up_proj\n  fix: keep the module in float" in failure.text
    assert "worst rows: " in failure.text


def test_there_are_as_many_failures_as_errors():
    wrong = [("headers", "cut off", "a.safetensors"), ("headers", "is empty", "b.safetensors"),
             ("sqnr", "row 3 has 1 dB", "`model.layers.1.mlp.up_proj`, row 3"),
             ("kl", "mean KL divergence is 0.2", None), ("of no list", "wrong", None)]  # fmt: skip
    report = reports.report(2, bad=["layers.1"], errors=wrong)
    report["findings"].append(
        {"check": "layer outputs", "severity": "error", "what": "puts out 5 dB",
         "where": "`model.layers.1`", "fix": None}
    )  # fmt: skip
    found = cases(report)
    names = [case.get("name") for own in found.values() for case in failed(own)]
    assert len(names) == len(set(names)) == len(words.errors(report)) == 7 + 6
    assert ": 13 errors (" in verdict(report)
    assert "13 errors (" in page(report)
    assert {"headers", "headers, 2", "model.layers.1.mlp.up_proj, 2", "kl", "of no list",
            "model.layers.1"} <= {*names}  # fmt: skip


def test_limits_of_the_run_fail_with_their_checks():
    report = reports.report(2, errors=[("kl", "mean KL divergence is 0.2", None)])
    own = cases(report)["run"]
    assert [c.get("name") for c in failed(own)] == ["kl"]
    assert own[-1].get("name") == "max_ppl_ratio 1.01"


def test_several_checkpoints_have_a_suite_each():
    good, bad = reports.report(2), reports.report(2, bad=["layers.1"])
    bad["checkpoint"] = "/models/other"
    root = ElementTree.fromstring(junit_of_several([good, bad]))
    assert [suite.get("name") for suite in root] == ["/models/qwen3-w8a8", "/models/other"]
    assert [suite.get("failures") for suite in root] == ["0", "7"]
    assert root.get("failures") == "7"
    own = [case.get("name") for suite in cases(bad).values() for case in suite]
    assert [case.get("name") for case in root[1]] == own


def test_notes_are_no_failures():
    case = cases(reports.structure())["structure"][2]
    assert case.find("failure") is None
    assert "note: file is not in the manifest\n  --> a.txt" in case.find("system-out").text


@pytest.mark.parametrize(
    "report",
    [reports.report(2), reports.structure(), reports.hostile(), reports.report(2, bad=["layers.1"]),
     reports.report(1, errors=[("of no list", "wrong", None)])],
)  # fmt: skip
def test_it_is_red_where_the_answer_is_no(report):
    failures = [case for own in cases(report).values() for case in failed(own)]
    assert len(failures) == len(words.errors(report))


def test_any_name_is_valid_xml():
    names = [reports.HOSTILE, "\ud800", "\x08\x0b\ufffe\uffff", "]]>", "a" * 100_000, "名前"]
    report = reports.report(2)
    for module, name in zip(report["modules"], names, strict=False):
        module["module"] = name
    shown = [case.get("name") for case in cases(report)["against"][1:]]
    assert shown[1:4] == ["\\ud800", "\\x08\\x0b\\ufffe\\uffff", "]]>"]
    assert shown[5] == "名前"
    assert len(shown[4]) < 3000


def test_the_same_report_gives_the_same_bytes():
    assert junit(reports.hostile()) == junit(reports.hostile())
    assert b"timestamp" not in junit(reports.report(2))
    assert b"hostname" not in junit(reports.report(2))
