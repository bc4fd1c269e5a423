"""The first words of a command line: help, version, misspelt commands and options."""

from __future__ import annotations

import pytest

from quantcli import __version__
from tests.e2e.conftest import run_cli

COMMANDS = ["inspect", "calibrate", "quantize", "pack", "verify", "recipes"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_two_names(command: list[str]) -> None:
    short, long = run_cli(*command, "-h"), run_cli(*command, "--help")
    assert (short.code, short.err) == (long.code, long.err) == (0, "")
    assert short.out == long.out
    assert short.out.startswith(" ".join(["Usage: quantcli", *command]))
    assert "-h, --help" in short.out


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(option: str) -> None:
    plain = run_cli(option)
    assert (plain.code, plain.out, plain.err) == (0, f"quantcli {__version__}\n", "")
    for arguments in ([option, "--json"], ["--json", option]):
        result = run_cli(*arguments)
        assert (result.code, result.json["version"], result.err) == (0, __version__, "")


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["--verison"], "no such option: --verison", "did you mean `--version`? see `quantcli --help`"),
        (["--hlep"], "no such option: --hlep", "did you mean `--help`? see `quantcli --help`"),
        (["-x"], "no such option: -x", "see `quantcli --help`"),
        (["-x", "quantize"], "no such option: -x", "see `quantcli --help`"),
        (["quantise"], "there is no command `quantise`",
         "did you mean `quantize`? see `quantcli --help`"),
        (["xyzzy"], "there is no command `xyzzy`", "see `quantcli --help`"),
        (["it's"], "there is no command `it's`", "see `quantcli --help`"),
        (["inspect", "--suport"], "no such option: --suport",
         "did you mean `--support`? see `quantcli inspect --help`"),
        (["quantize", "--cheksum"], "no such option: --cheksum",
         "did you mean `--checksum`? see `quantcli quantize --help`"),
        (["pack", "-q", "--hlep"], "no such option: --hlep",
         "did you mean `--help`? see `quantcli pack --help`"),
        (["inspect", "--tensors"], "option '--tensors' requires an argument",
         "see `quantcli inspect --help`"),
        (["quantize", "a", "b"], "unexpected extra argument(s) (b)",
         "the model is given as --model MODEL; see `quantcli quantize --help`"),
        (["--json"], "--json needs a command before it", "quantcli COMMAND --json"),
        (["--json", "inspect", "x"], "--json needs a command before it", "quantcli COMMAND --json"),
    ],
)  # fmt: skip
def test_misspelt(arguments: list[str], what: str, fix: str) -> None:
    result = run_cli(*arguments)
    assert (result.code, result.err) == (2, f"error: {what}\n  fix: {fix}\n")
    documented = run_cli(*arguments, "--json") if arguments[-1] != "--tensors" else None
    if documented and "--json" not in arguments:
        assert documented.json["error"] == {"what": what, "where": None, "fix": fix}
