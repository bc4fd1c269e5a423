"""The report on a terminal: what is wrong at the top, the verdict at the end."""

import pytest

from quantcli.cli.output import Output
from quantcli.cli.verify import show_verification
from tests import reports


@pytest.fixture
def shown(capsys):
    def show(report, **options):
        show_verification(Output(as_json=False), report, **options)
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()

    return show


def test_what_is_wrong_comes_first_and_the_verdict_last(shown):
    lines = shown(reports.report(28, bad=["layers.13"]))
    assert lines[0] == "FAILED       sqnr: SQNR is 6.17 dB; the limit is 30 dB"
    assert lines[1] == "  --> model.layers.13.self_attn.q_proj"
    assert lines[2].startswith("  fix: keep the module in float")
    assert lines[-1] == "FAILED: /models/qwen3-w8a8: 7 errors (7 sqnr), 1 note; look at layer 13"


def test_each_check_has_its_say(shown):
    many = [(f"check {i}", "wrong", None) for i in range(30)]
    lines = shown(reports.report(4, 16, bad=["layers.1"], errors=many))
    for name, _, _ in many:
        assert f"FAILED       {name}: wrong" in lines
    assert any(line.startswith("FAILED       and 51 more (51 sqnr)") for line in lines)


def test_modules_that_failed_are_first_and_the_rest_is_counted(shown):
    lines = shown(reports.report(4, 16, bad=["layers.1.mlp.experts"]))
    table = lines[next(i for i, line in enumerate(lines) if "worst modules" in line) :]
    assert all(line.startswith("FAILED  model.layers.1.mlp.experts") for line in table[1:11])
    assert table[11] == "and 199 modules more, 38 of them FAILED"
    values = [float(line.split(" dB")[0].rsplit(None, 1)[1]) for line in table[1:11]]
    assert values == sorted(values)
    few = shown(reports.report(2), modules=2)
    assert "and 13 modules more" in few


def test_a_healthy_one(shown):
    lines = shown(reports.report(2))
    assert "FAILED" not in "\n".join(lines)
    assert "structure    headers 123, index 123, files 123" in lines
    assert "perplexity   45.43 -> 45.47, 1.0009 x (95 % 1.0000 to 1.0018 x; limit 1.01 x)" in lines
    sizes = "W8A8_DYNAMIC 4.1 MB (8.2 bits per weight), FLOAT 1.0 MB (16 bits per weight)"
    assert f"size         5.1 MB: {sizes}" in lines
    assert lines[-1] == "passed: /models/qwen3-w8a8: structure, full, against, run; 8 checks, 1 note"


def test_what_was_not_checked_is_said(shown):
    lines = shown(reports.structure())
    assert lines[-2].startswith("not checked  weights were not read (--full); ")
    assert lines[-1] == "passed: /models/qwen3-w8a8: structure; 3 checks, 1 note"


def test_no_code_of_a_stranger_reaches_the_terminal(shown):
    text = "\n".join(shown(reports.hostile()))
    assert not any(c in text for c in "\x00\x1b\u202e")
