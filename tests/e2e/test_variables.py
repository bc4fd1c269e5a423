"""Environment variables: what they set, that options win, and what is said of bad and unknown ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.conftest import Box, run_cli


def planned_workers(box: Box, *more: object) -> int:
    workers: int = box.run("--plan", "--json", *more).json["plan"]["workers"]
    return workers


def test_workers(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCLI_WORKERS", "7")
    assert planned_workers(box) == 7
    assert planned_workers(box, "--workers", 3) == 3
    monkeypatch.setenv("QUANTCLI_WORKERS", "")
    assert planned_workers(box) == len(os.sched_getaffinity(0))


def test_device(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCLI_DEVICE", "cuda:1")
    assert "[default: cuda:1]" in " ".join(run_cli("calibrate", "--help").out.split())
    assert box.run("--plan").code == 0
    refused = box.run("--plan", "--device", "tpu")  # the option wins
    assert (refused.code, refused.err.splitlines()[0]) == (2, "error: unknown device `tpu`")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORKERS", "0", "a number from 1 to 1024"),
        ("WORKERS", "1025", "a number from 1 to 1024"),
        ("WORKERS", "9" * 5000, "a number from 1 to 1024"),
        ("WORKERS", "²", "a number from 1 to 1024"),
        ("WORKERS", "-1", "a number from 1 to 1024"),
        ("DEVICE", "tpu", "cpu, cuda, npu, or one of several, such as cuda:1"),
        ("EXECUTOR", "dask", "threads, ray, ray:local, or ray:HOST:PORT"),
        ("CACHE", "cache", "the absolute path of a folder"),
        ("CACHE", __file__, "the absolute path of a folder"),
        ("KERNELS", "of", "on or off"),
    ],
)
def test_a_bad_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(f"QUANTCLI_{name}", value)
    result = run_cli("quantize", "w8a8_dynamic", "--model", tmp_path, "--out", tmp_path / "out")
    assert result.code == 2
    assert result.err == (
        f"error: environment variable QUANTCLI_{name} is `{value}`\n"
        f"  fix: set it to {expected}, or unset it\n"
    )


@pytest.mark.parametrize("name", ["WORKERS", "DEVICE", "EXECUTOR"])
def test_a_bad_value_of_another_command(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A command without the option does not read the variable."""
    monkeypatch.setenv(f"QUANTCLI_{name}", "x")
    assert run_cli("recipes").code == 0
    assert run_cli("--version").code == 0


def test_an_unknown_one_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCLI_WORKER", "7")
    monkeypatch.setenv("QUANTCLI_XYZ", "7")
    result = run_cli("recipes", "--json")
    known = "QUANTCLI_WORKERS, QUANTCLI_DEVICE, QUANTCLI_EXECUTOR, QUANTCLI_CACHE, QUANTCLI_KERNELS"
    known += ", QUANTCLI_PASSWORD, QUANTCLI_API_KEY"
    assert (result.code, result.json["ok"], result.err.splitlines()) == (
        0,
        True,
        [
            "warning: environment variable QUANTCLI_WORKER is not known and does nothing; "
            "did you mean QUANTCLI_WORKERS?",
            "warning: environment variable QUANTCLI_XYZ is not known and does nothing; "
            f"known are {known}",
        ],
    )
    assert run_cli("recipes", "--quiet").err == ""


def test_the_help_lists_them() -> None:
    text = run_cli("--help").out
    for name in ("WORKERS", "DEVICE", "EXECUTOR", "CACHE", "KERNELS"):
        assert f"    QUANTCLI_{name} " in text
