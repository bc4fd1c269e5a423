"""Completion: the answers to a shell, and the script that asks for them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quantcli.cli.app import app
from quantcli.cli.terminal.environment import COMPLETE
from quantcli.commands.choosing.devices import parse_device
from quantcli.core.registry import discover
from quantcli.recipe.shipped import shipped_recipes
from quantcli.targets.base import Target
from tests.e2e.conftest import run_cli

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)
SHELLS = ("bash", "zsh", "fish")


def completed(monkeypatch: pytest.MonkeyPatch, *words: str, shell: str = "bash") -> list[str]:
    monkeypatch.setenv(COMPLETE, shell)
    result = run_cli(*words)
    assert (result.code, result.err) == (0, "")
    return result.out.splitlines()


def test_values(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, targets = sorted(shipped_recipes()), sorted(discover(Target))
    assert completed(monkeypatch, "") == COMMANDS
    assert completed(monkeypatch, "qua") == ["quantize"]
    assert completed(monkeypatch, "--install", "") == COMMANDS
    assert completed(monkeypatch, "calibrate", "") == recipes
    assert completed(monkeypatch, "quantize", "") == sorted([*recipes, "auto"])
    assert completed(monkeypatch, "quantize", "--model", "x", "fp8_d") == [
        name for name in recipes if name.startswith("fp8_d")
    ]
    assert completed(monkeypatch, "quantize", "--model", "") == []  # the shell completes files
    assert completed(monkeypatch, "pack", "x", "--target", "") == targets
    assert completed(monkeypatch, "calibrate", "x", "--device", "c") == ["cpu", "cuda"]
    devices = completed(monkeypatch, "recommend", "x", "--for", "")
    assert {"910B", "RTX-4090", "H100", "cpu"} <= {*devices}
    assert [str(parse_device(name)) for name in devices]  # each is one that --for takes
    assert completed(monkeypatch, "quantize", "auto", "--for", "2xH10") == ["2xH100", "2xH100-NVL"]
    assert completed(monkeypatch, "recipes", "") == ["show"]
    assert completed(monkeypatch, "recipes", "show", "") == recipes
    assert completed(monkeypatch, "nothing", "x", "") == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_those_of_the_help(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    options = completed(monkeypatch, command, "-")
    monkeypatch.delenv(COMPLETE)
    words = run_cli(command, "--help").out.replace(",", " ").split()
    assert options == sorted({word for word in words if word in options})
    assert {"--help", "--json", "--quiet"} <= set(options)


def test_each_shell_has_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    word = ("calibrate", "--fre")
    about = "Start over instead of resuming after the last layer."
    assert completed(monkeypatch, *word, shell="bash") == ["--fresh"]
    assert completed(monkeypatch, *word, shell="zsh") == [f"--fresh:{about}"]
    assert completed(monkeypatch, *word, shell="fish") == [f"--fresh\t{about}"]


QUANTCLI = """
import sys
from quantcli.__main__ import main
try:
    main()
finally:
    print(*{"torch", "numpy", "transformers"} & sys.modules.keys())
"""


def test_the_script_of_bash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words reach quantcli as they stand on the command line, and nothing heavy is imported."""
    monkeypatch.setenv("SHELL", "/usr/bin/bash")
    python = shlex.join([sys.executable, "-c", QUANTCLI])
    script = f"""
quantcli() {{ {python} "$@"; }}
{run_cli("--show-completion").out}
COMP_WORDS=(quantcli quantize --model "a b" w8a8_st) COMP_CWORD=4
_quantcli
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["w8a8_static", "w8a8_static_smooth"]


@pytest.mark.parametrize("shell", SHELLS)
def test_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shell: str) -> None:
    home = tmp_path / "it's home"
    home.mkdir()
    (home / f".{shell}rc").write_text("alias ls='ls -l'")  # no end of line
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    for _ in range(2):  # the second time nothing is added
        result = run_cli("--install-completion")
        assert (result.code, result.out) == (0, ""), result.err
    (file,) = [path for path in home.rglob("*") if path.is_file() and path.name != f".{shell}rc"]
    assert file.read_text() == run_cli("--show-completion").out
    assert str(file) in result.err
    added = "" if shell == "fish" else f"\nsource {shlex.quote(str(file))}\n"
    assert (home / f".{shell}rc").read_text() == "alias ls='ls -l'" + added


def test_a_shell_without_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/dash")
    for option in ("--install-completion", "--show-completion"):
        result = run_cli(option)
        assert result.code == 2
        assert result.err == (
            "error: there is no completion for the shell `dash`\n"
            "  fix: set the variable SHELL to one of bash, zsh, fish\n"
        )
    monkeypatch.delenv("SHELL")
    assert run_cli("--show-completion").err.startswith("error: SHELL is not set\n")
