"""What a command prints, and what it writes to --log-file instead or as well."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import pytest

from quantcli.cli.app import app
from tests.e2e.conftest import Box, run_cli


def logged(box: Box) -> list[str]:
    """Lines of the log, without their times."""
    return [line.partition("Z  ")[2] for line in (box.root / "log").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["--quiet", "--json", "--verbose"])
def test_the_log_has_all_that_the_screen_may_not_show(box: Box, mode: str) -> None:
    result = box.run("--log-file", box.root / "log", mode)
    assert result.code == 0, result.err
    lines = logged(box)
    assert lines[0].endswith(mode)
    order = ["planning ", "weights  ", "output  ", "shard 1/1: ", "done: "]
    found = [next(n for n, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert found == sorted(found)
    assert sum(line.startswith("done: ") for line in lines) == 1
    if mode == "--quiet":
        assert (result.out, result.err) == ("", "")
    for start in ("compiled kernels: ", "stays float: ", f"{box.recipe}:"):
        assert any(line.startswith(start) for line in lines)
        assert any(line.startswith(start) for line in result.err.splitlines()) == (mode == "--verbose")
    if mode == "--json":
        assert str(box.out) == result.json["out"]
    again = run_cli("verify", box.out, "--log-file", box.root / "log", "-q")
    assert again.err == ""
    assert logged(box)[: len(lines)] == lines
    *_, last = (line for line in logged(box) if not line.startswith("next: "))
    assert last == again.out.splitlines()[-1]
    assert "\nstructure " in again.out


def test_errors_are_in_the_log(box: Box) -> None:
    box.edit_recipe("target: nothing\n")
    result = box.run("--log-file", box.root / "log", "-q")
    assert result.code == 2
    assert result.err.splitlines() == logged(box)[1:]
    assert result.err.startswith("error: ")


def test_a_log_in_the_model_is_refused(box: Box) -> None:
    result = box.run("--log-file", box.model / "log")
    assert result.code == 2
    assert "the log would lie in a checkpoint" in result.err
    assert not (box.model / "log").exists()
    assert run_cli("recipes", "-q", "-v").code == 2


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda c: c.callback.__name__)
def test_every_command_has_the_options(command: object) -> None:
    callback: Callable[..., None] = command.callback  # type: ignore[attr-defined]
    parameters = signature(callback).parameters
    assert {"verbose", "quiet", "log_file", "as_json"} <= parameters.keys()
