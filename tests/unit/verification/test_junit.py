"""The report for CI: as many cases as things were checked, failures where something is wrong."""

from xml.etree import ElementTree

import pytest

from quantcli.verification.report.junit import junit
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


def test_failures_say_what_where_and_how_to_fix_it():
    report = reports.report(2, bad=["layers.1.mlp.up_proj", "layers.0.mlp.up_proj"])
    check, *modules = cases(report)["against"]
    failure = check.find("failure")
    assert failure.get("message").endswith("the limit is 30 dB and 1 more")
    assert "  --> model.layers.1.mlp.up_proj\n  fix: keep the module in float" in failure.text
    failed = [case for case in modules if case.find("failure") is not None]
    assert [case.get("name") for case in failed] == [
        m["module"] for m in report["modules"] if not m["ok"]
    ]
    assert "worst rows: " in failed[0].find("failure").text


def test_limits_of_the_run_fail_with_their_checks():
    report = reports.report(2, errors=[("kl", "mean KL divergence is 0.2", None)])
    failed = [c.get("name") for c in cases(report)["run"] if c.find("failure") is not None]
    assert failed == ["kl", "max_kl 0.05"]


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
    failures = [c for own in cases(report).values() for c in own if c.find("failure") is not None]
    assert bool(failures) == (not report["ok"])


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
