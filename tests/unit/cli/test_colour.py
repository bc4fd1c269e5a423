"""Colour of words that say ok, warning or failed: never the only sign, and only on a terminal."""

from __future__ import annotations

import io

import pytest

from quantcli.cli.output import Output
from quantcli.cli.verify import show_verification
from quantcli.core.errors import InputError
from tests import reports


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch):
    def show(*, terminal: bool = True, **variables: str) -> str:
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm", "COLUMNS": "200", **variables}.items():
            monkeypatch.setenv(name, value)
        stream = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr("sys.stderr", stream)
        out = Output(as_json=False)
        show_verification(out, reports.report(2))
        show_verification(out, reports.report(2, bad=["layers.1"]))
        out.warn("w")
        out.error(InputError("e"))
        return stream.getvalue()

    return show


def test_on_a_terminal(shown) -> None:
    text = shown()
    for coloured in (
        "\x1b[32mpassed:\x1b[0m /models",
        "\x1b[1;31mFAILED:\x1b[0m /models",
        "\x1b[32mok\x1b[0m      model.",
        "\x1b[1;31mFAILED\x1b[0m  model.",
        "\x1b[1;31mFAILED\x1b[0m       sqnr",
        "\x1b[33mnote\x1b[0m  ",
        "\x1b[33mwarning:\x1b[0m w",
        "\x1b[1;31merror:\x1b[0m e",
    ):
        assert coloured in text, repr(text)


def test_where_there_is_none(shown) -> None:
    plain = shown(terminal=False)
    assert "\x1b" not in plain
    assert shown(TERM="dumb") == plain
    assert "\x1b[3" not in shown(NO_COLOR="1")
    assert "\x1b[1;3" not in shown(NO_COLOR="1")
    assert "\x1b[32mpassed:" in shown(terminal=False, FORCE_COLOR="1")
    for word in ("passed:", "FAILED:", "ok  ", "FAILED  ", "warning: w", "error: e"):
        assert word in plain
