"""A report of verification as JUnit XML, which CI systems show as tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from quantcli.verification.report import words

_LIMITS = {"max_ppl_ratio": "perplexity", "max_kl": "kl"}  # the check that fails beyond each


def junit(report: dict[str, Any]) -> bytes:
    """One suite for each depth; one case for each check, compared module, layer and limit of the run.

    The same report gives the same bytes: no times, no host. Characters of untrusted names that XML
    cannot hold are escaped as Python escapes them.
    """
    checks = report.get("checks") or []
    # a finding of a check that is not listed is a failure all the same
    listed = {check["name"] for check in checks}
    strays = [f["check"] for f in report.get("findings") or [] if f["check"] not in listed]
    unlisted = [{"name": name, "depth": "structure"} for name in dict.fromkeys(strays)]
    depths = dict.fromkeys([*(report.get("depths") or []), *(c["depth"] for c in [*checks, *unlisted])])
    root = ElementTree.Element("testsuites", name="quantcli verify")
    for depth in depths:
        suite = ElementTree.SubElement(root, "testsuite", name=depth)
        own = [check for check in [*checks, *unlisted] if check["depth"] == depth]
        cases = [_check(report, check) for check in own]
        cases += _modules(report) if depth == "against" else []
        cases += [*_layers(report), *_limits(report)] if depth == "run" else []
        for case in cases:
            case.set("classname", f"quantcli.verify.{words.literal(depth).replace(' ', '_')}")
        suite.extend(cases)
        _count(suite, suite)
    _count(root, root)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _count(element: ElementTree.Element, of: ElementTree.Element) -> None:
    element.set("tests", str(sum(1 for _ in of.iter("testcase"))))
    element.set("failures", str(sum(1 for _ in of.iter("failure"))))
    element.set("errors", "0")
    element.set("skipped", "0")


def _case(name: str, failure: tuple[str, str] | None = None, output: str = "") -> ElementTree.Element:
    """A test case; `failure` is its message and its details."""
    case = ElementTree.Element("testcase", name=words.literal(name))
    if failure is not None:
        message, details = failure
        element = ElementTree.SubElement(case, "failure", type="verify", message=words.literal(message))
        element.text = details
    if output:
        ElementTree.SubElement(case, "system-out").text = output
    return case


def _check(report: dict[str, Any], check: dict[str, Any]) -> ElementTree.Element:
    name = check["name"]
    errors = [f for f in words.errors(report) if f["check"] == name]
    notes = [f for f in words.notes(report) if f["check"] == name]
    failure = None
    if errors:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        failure = (f"{errors[0]['what']}{more}", "\n".join(map(_text, errors)))
    return _case(name, failure, "\n".join(f"note: {_text(note)}" for note in notes))


def _text(finding: dict[str, Any]) -> str:
    text = words.literal(finding["what"])
    text += f"\n  --> {words.literal(finding['where'])}" if finding.get("where") else ""
    return text + (f"\n  fix: {words.literal(finding['fix'])}" if finding.get("fix") else "")


def _modules(report: dict[str, Any]) -> Iterator[ElementTree.Element]:
    for module in report.get("modules") or []:
        facts = "\n".join(f"{what}: {value}" for what, value in words.module_facts(module))
        failure = None if words.is_ok(module) else (_beyond(module), facts)
        yield _case(module["module"], failure, facts if failure is None else "")


def _layers(report: dict[str, Any]) -> Iterator[ElementTree.Element]:
    for layer in (report.get("run") or {}).get("layers") or []:
        message = _beyond(layer)
        yield _case(layer["layer"], None if words.is_ok(layer) else (message, message))


def _beyond(thing: dict[str, Any]) -> str:
    return f"SQNR {words.decibels(thing.get('sqnr_db'))}, limit {words.decibels(thing.get('limit_db'))}"


def _limits(report: dict[str, Any]) -> Iterator[ElementTree.Element]:
    failed = {finding["check"] for finding in words.errors(report)}
    facts = "\n".join(f"{what}: {value}" for what, value in words.run_facts(report))
    for limit, check in _LIMITS.items():
        value = (report.get("limits") or {}).get(limit)
        if value is not None:
            message = f"beyond {limit} {words.number(value)}"
            name = f"{limit} {words.number(value)}"
            yield _case(name, (message, facts) if check in failed else None, facts)
