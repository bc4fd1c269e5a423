"""`--device npu`, on a stand-in for torch_npu: see tests/stand_in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import snapshot
from tests.stand_in.run_npu import LAYERS, RECIPES

WEIGHTS = "model-00001-of-00001.safetensors"
STAND_IN = Path(__file__).parents[1] / "stand_in"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the process left: cases.json, and the outputs of each case."""
    folder = tmp_path_factory.mktemp("npu")
    paths = [*sys.path, str(STAND_IN)]
    done = subprocess.run(
        [sys.executable, STAND_IN / "run_npu.py", folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=STAND_IN.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def cases(root: Path) -> Any:
    return json.loads((root / "cases.json").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_of_a_calibration_is_on_the_device(cases: Any, recipe: str) -> None:
    """What is on another device would fail there; so would arithmetic in float64."""
    case = cases[recipe]
    assert case["codes"] == [0, 0], case["err"]
    layers = 1 if recipe == "learned" else LAYERS
    assert case["operations"]["mm"] >= 7 * layers
    assert case["operations"]["bmm"] >= 2 * layers
    assert set(case["float64"]) <= {"copy_", "_to_copy", "empty_strided", "t", "transpose"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_results_are_those_of_the_cpu(root: Path, recipe: str) -> None:
    """Up to the order of sums: attention is computed in another way there."""
    cpu, npu = (snapshot(root / recipe / device) for device in ("cpu", "npu"))
    assert cpu.keys() == npu.keys()
    differ = {name for name in cpu if cpu[name] != npu[name]}
    assert differ <= {WEIGHTS, "quantcli_manifest.json"}
    ours, theirs = (load_file(root / recipe / device / WEIGHTS) for device in ("cpu", "npu"))
    scales = [name for name in ours if name.endswith(("_scale", "_trans"))]
    for name in [*scales, *(name for name in ours if name.endswith(".weight"))]:
        before, after = ours[name].double(), theirs[name].double()
        assert float((before - after).norm()) <= 0.05 * float(before.norm()), name
    assert scales


def test_one_layer_at_a_time_is_in_the_memory_of_the_device(root: Path, cases: Any) -> None:
    case = cases["gptq"]
    assert case["used"] == 0, "tensors are left there"
    layers = sum(
        tensor.nbytes
        for name, tensor in load_file(root / "model" / "model.safetensors").items()
        if name.startswith("model.layers.")
    )
    assert case["most"] > layers / LAYERS


def test_too_little_memory(cases: Any) -> None:
    too_little, nearly, enough = cases["memory"]
    assert too_little["code"] == 3
    assert "memory of `npu`: 1.0 kB free; the largest layer takes 61.8 kB" in too_little["err"]
    assert "error: memory of `npu` does not suffice: the largest layer takes" in too_little["err"]
    assert nearly["code"] == 3
    assert "error: memory of `npu` does not suffice for " in nearly["err"]
    assert "NPU out of memory. Tried to allocate" in nearly["err"]
    assert "fix: take fewer --workers or a shorter calibration.length, or --device cpu" in nearly["err"]
    assert enough["code"] == 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no device", "error: no device `npu` here: Invalid device ID 0: this machine has 0"),
        ("no second", "error: no device `npu:1` here: Invalid device ID 1: this machine has 1"),
    ],
)
def test_a_device_that_is_not_there(cases: Any, case: str, message: str) -> None:
    assert cases[case]["code"] == 3
    assert cases[case]["err"].splitlines()[-2:] == [message, "  fix: --device cpu works anywhere"]


@pytest.mark.parametrize(
    ("driver", "reason"),
    [("absent", "libascend_hal.so: cannot open"), ("conflict", "Two accelerators cannot be used")],
)
def test_a_package_that_cannot_be_loaded(cases: Any, driver: str, reason: str) -> None:
    """It is installed already, so the message does not suggest to install it."""
    error = cases[driver]
    assert error["code"] == 3
    assert error["what"].startswith(f"torch_npu cannot be loaded: {reason}")
    assert "pip install" not in error["fix"]
