"""Compiled kernels and torch write the same files, and a user hears if torch has to serve."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from quantcli.core.kernels import machine
from tests.e2e.conftest import run_cli, snapshot

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-qwen3"
# with all that needs no data; `tests/property/test_kernels.py` has the other schemes
RECIPES = [
    path.stem
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
    if "\ncalibration:" not in path.read_text() and "moe" not in path.stem
]


def convert(out: Path, recipe: str, workers: int) -> dict[str, str]:
    result = run_cli("quantize", recipe, "--model", MODEL, "--out", out, "--workers", workers)
    assert result.code == 0, result.err
    off = "note: compiled kernels are not used (QUANTCLI_KERNELS=off): the conversion takes longer"
    assert (off in result.err.splitlines()) == (os.environ.get(machine.SWITCH) == "off")
    assert result.err.count("compiled kernels") == (os.environ.get(machine.SWITCH) == "off")
    return snapshot(out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_files(tmp_path, monkeypatch, recipe):
    monkeypatch.setenv(machine.SWITCH, "off")
    by_torch = convert(tmp_path / "torch", recipe, 2)
    monkeypatch.delenv(machine.SWITCH)
    for workers in (1, 3):
        found = convert(tmp_path / f"compiled {workers}", recipe, workers)
        assert found.keys() == by_torch.keys()
        assert [name for name in found if found[name] != by_torch[name]] == []
    verified = run_cli("verify", tmp_path / "torch", "--against", MODEL, "--json")
    assert verified.code == 0
    assert "recomputed" in {check["name"] for check in verified.json["checks"]}


def test_the_list_of_recipes_has_all_kinds():
    assert {"w8a8_dynamic", "fp8_dynamic", "fp8_block", "mxfp8", "vllm_w4a16"} <= {*RECIPES}


def test_a_switch_that_means_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.SWITCH, "of")
    result = run_cli("quantize", "w8a8_dynamic", "--model", MODEL, "--out", tmp_path / "out")
    assert result.code == 2
    assert result.err.splitlines() == [
        "error: environment variable QUANTCLI_KERNELS is `of`",
        "  fix: set it to on or off, or unset it",
    ]


def test_a_user_hears_that_torch_serves(tmp_path, monkeypatch):
    kernels = machine._Kernels()
    monkeypatch.setattr(machine, "_KERNELS", kernels)
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    arguments = ("quantize", "w8a8_dynamic", "--model", MODEL)
    result = run_cli(*arguments, "--out", tmp_path / "out")
    assert result.code == 0
    (note,) = [line for line in result.err.splitlines() if "compiled kernels" in line]
    assert note.startswith("note: compiled kernels are not used (ModuleNotFoundError: ")
    assert note.endswith("): the conversion takes longer")
    monkeypatch.setattr(machine, "_KERNELS", machine._Kernels())
    monkeypatch.delitem(sys.modules, "llvmlite")
    monkeypatch.delitem(sys.modules, "llvmlite.binding")
    monkeypatch.undo()
    assert convert(tmp_path / "usual", "w8a8_dynamic", 1) == snapshot(tmp_path / "out")


def test_a_user_hears_that_kernels_are_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_KERNELS", machine._Kernels())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine._folder.cache_clear()
    try:
        arguments = ("quantize", "w8a8_dynamic", "--model", MODEL)
        first = run_cli(*arguments, "--out", tmp_path / "first")
        monkeypatch.setattr(machine, "_KERNELS", machine._Kernels())
        second = run_cli(*arguments, "--out", tmp_path / "second")
    finally:
        machine._folder.cache_clear()
    kept = tmp_path / "cache" / "quantcli" / "kernels"
    said = f"compiling kernels for this CPU, kept in {kept}: a few seconds"
    assert first.err.splitlines().count(said) == 1
    assert said not in second.err
    assert (first.code, second.code) == (0, 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_plan_loads_no_kernels(tmp_path, monkeypatch, recipe):
    """Libraries for them would take longer to load than the plan takes."""

    def refuse(self, key):
        raise AssertionError(key)

    monkeypatch.setattr(machine._Kernels, "get", refuse)
    arguments = ("quantize", recipe, "--model", MODEL, "--out", tmp_path / "out", "--plan")
    assert run_cli(*arguments).code == 0
