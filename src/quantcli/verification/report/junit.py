"""A report of verification as JUnit XML, which CI systems show as tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

from quantcli.verification.report import words

_LIMITS = {"max_ppl_ratio": "perplexity", "max_kl": "kl"}  # the check that fails beyond each


def junit(report: dict[str, Any]) -> bytes:
    """One suite for each depth; one case for each check, compared module, layer and limit of the run.

    There are as many failures as errors in the report: an error of a module or layer fails its case,
    any other the case of its check. What has several errors has a case for each.

    The same report gives the same bytes: no times, no host. Characters of untrusted names that XML
    cannot hold are escaped as Python escapes them.
    """
    root = ElementTree.Element("testsuites", name="quantcli verify")
    for depth, cases in _depths(report):
        suite = ElementTree.SubElement(root, "testsuite", name=depth)
        suite.extend(cases)
        _count(suite, suite)
    return _document(root)


def junit_of_several(reports: Sequence[dict[str, Any]]) -> bytes:
    """The same for several checkpoints: one suite for each, with the cases of all depths."""
    root = ElementTree.Element("testsuites", name="quantcli verify")
    for report in reports:
        suite = ElementTree.SubElement(root, "testsuite", name=words.literal(report["checkpoint"]))
        for _, cases in _depths(report):
            suite.extend(cases)
        _count(suite, suite)
    return _document(root)


def _document(root: ElementTree.Element) -> bytes:
    _count(root, root)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _depths(report: dict[str, Any]) -> Iterator[tuple[str, list[ElementTree.Element]]]:
    """Each depth and its cases."""
    checks = report.get("checks") or []
    # a finding of a check that is not listed is a failure all the same
    listed = {check["name"] for check in checks}
    strays = [f["check"] for f in report.get("findings") or [] if f["check"] not in listed]
    unlisted = [{"name": name, "depth": "structure"} for name in dict.fromkeys(strays)]
    depths = dict.fromkeys([*(report.get("depths") or []), *(c["depth"] for c in [*checks, *unlisted])])
    for depth in depths:
        own = [check for check in [*checks, *unlisted] if check["depth"] == depth]
        things = (report.get("modules") or []) if depth == "against" else []
        things = things or ((report.get("run") or {}).get("layers") or [] if depth == "run" else [])
        errors = _by_thing(report, own, [_name(thing) for thing in things])
        cases = [case for check in own for case in _check(report, check, errors.pop(check["name"], []))]
        cases += [case for thing in things for case in _thing(thing, errors.pop(_name(thing), []))]
        cases += list(_limits(report)) if depth == "run" else []
        for case in cases:
            case.set("classname", f"quantcli.verify.{words.literal(depth).replace(' ', '_')}")
        yield depth, cases


def _by_thing(
    report: dict[str, Any], checks: list[dict[str, Any]], things: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Errors of these checks, by the module or layer that they are of, or else by their check."""
    names, names_of_checks = set(things), {check["name"] for check in checks}
    errors: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for error in words.errors(report):
        if error["check"] in names_of_checks:
            place = words.place(error)
            errors[place if place in names else error["check"]].append(error)
    return errors


def _name(thing: dict[str, Any]) -> str:
    """The name of a module or layer."""
    return str(thing["module"] if "module" in thing else thing["layer"])


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


def _check(
    report: dict[str, Any], check: dict[str, Any], errors: list[dict[str, Any]]
) -> Iterator[ElementTree.Element]:
    notes = [_text(note) for note in words.notes(report) if note["check"] == check["name"]]
    yield from _cases(check["name"], errors, "\n".join(f"note: {note}" for note in notes))


def _cases(
    name: str, errors: list[dict[str, Any]], output: str = "", facts: str = ""
) -> Iterator[ElementTree.Element]:
    """A case for each error of a thing, numbered after the first; one that passes if there is none.

    output: what the first case says. facts: of the thing, for its failures.
    """
    if not errors:
        yield _case(name, None, output)
    for number, error in enumerate(errors, 1):
        numbered = name if number == 1 else f"{words.literal(name)}, {number}"
        details = "\n".join(filter(None, [_text(error), facts]))
        yield _case(numbered, (error["what"], details), output if number == 1 else "")


def _text(finding: dict[str, Any]) -> str:
    text = words.literal(finding["what"])
    text += f"\n  --> {words.literal(finding['where'])}" if finding.get("where") else ""
    return text + (f"\n  fix: {words.literal(finding['fix'])}" if finding.get("fix") else "")


def _thing(thing: dict[str, Any], errors: list[dict[str, Any]]) -> Iterator[ElementTree.Element]:
    """The cases of a module or layer."""
    facts = words.module_facts(thing) if "module" in thing else words.layer_facts(thing)
    text = "\n".join(f"{what}: {value}" for what, value in facts)
    yield from _cases(_name(thing), errors, "" if errors else text, text)


def _limits(report: dict[str, Any]) -> Iterator[ElementTree.Element]:
    """The limits that hold; one that does not is a failure of its check."""
    failed = {finding["check"] for finding in words.errors(report)}
    facts = "\n".join(f"{what}: {value}" for what, value in words.run_facts(report))
    for text in words.text_rows(report):
        facts += f"\n{text.pop('text')}: " + "; ".join(
            f"{what} {value}" for what, value in text.items()
        )
    facts += "".join(f"\ntask {', '.join(row)}" for row in words.task_rows(report))
    for other, comparison in words.comparison_texts(report):
        facts += f"\nnext to {words.literal(other)}: {comparison['verdict']}"
        facts += "".join(
            f"\n  {', '.join(row)}" for row in words.comparison_rows(comparison["figures"])
        )
    for limit, check in _LIMITS.items():
        value = (report.get("limits") or {}).get(limit)
        if value is not None and check not in failed:
            yield _case(f"{limit} {words.number(value)}", None, facts)
