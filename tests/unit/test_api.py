"""The public API of the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantcli
from tests.families import make_family

RECIPE = Path(__file__).parents[2] / "recipes" / "w8a8_dynamic.yaml"


def test_every_public_name_is_there():
    assert set(quantcli.__all__) == {
        "Checkpoint", "calibrate", "inspect", "load_recipe", "make_plan", "open_checkpoint", "pack",
        "plan", "plan_calibration", "plan_pack", "quantize", "support", "verify",
    }  # fmt: skip
    for name in quantcli.__all__:
        assert callable(getattr(quantcli, name))
        assert re.search(rf"\b{name}\b", quantcli.__doc__), f"the docstring does not list {name}"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        quantcli.nonsense  # noqa: B018


def test_no_submodule_hides_a_function():
    code = """
import importlib, pkgutil, quantcli
for module in pkgutil.walk_packages(quantcli.__path__, "quantcli."):
    if module.name != "quantcli.__main__":
        importlib.import_module(module.name)
for name in quantcli.__all__:
    assert callable(getattr(quantcli, name)), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_imports_nothing_heavy():
    code = "import sys, quantcli; assert not {'torch', 'pydantic', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_conversion_in_python(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    plan = quantcli.make_plan(quantcli.load_recipe(RECIPE), quantcli.open_checkpoint(model))
    job = quantcli.plan(RECIPE, model=str(model), out=tmp_path / "out")
    assert job.plan.digest == plan.digest
    written = quantcli.quantize(job)
    assert (
        written.nbytes
        == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
        - (tmp_path / "out" / "quantcli_manifest.json").stat().st_size
    )
    account = quantcli.inspect(str(tmp_path / "out"))
    assert account["quantization"] == {
        "format": "ascend (W8A8_DYNAMIC 14)",
        "modules": 14,
        "evidence": account["quantization"]["evidence"],
    }


def test_support_knows_every_cell():
    cells = {(cell["scheme"], cell["target"]): cell for cell in quantcli.support()}
    labels = {key: cell["label"] for key, cell in cells.items() if cell["supported"]}
    assert {scheme: label for (scheme, target), label in labels.items() if target == "ascend"} == {
        "fp8_dynamic": "W8A8FP8_DYNAMIC",
        "mxfp4": "W4A4_MXFP4",
        "mxfp4_flatquant": "W4A4_MXFP4_FLATQUANT",
        "mxfp4_fp8": "W4A8_MXFP",
        "mxfp4a16": "W4A16_MXFP4",
        "mxfp8": "W8A8_MXFP8",
        "w4a16": "W4A16",
        "w4a4_dynamic": "W4A4_DYNAMIC",
        "w4a4_flatquant": "W4A4_FLATQUANT_DYNAMIC",
        "w4a8": "W4A8_DYNAMIC",
        "w8a16": "W8A16",
        "w8a8_dynamic": "W8A8_DYNAMIC",
        "w8a8_mix": "W8A8_MIX",
        "w8a8_static": "W8A8",
    }
    assert "target `ascend` cannot store" in cells["nvfp4", "ascend"]["why"]
    # an option that the recipe must set is named; one that the scheme leaves to the target is not
    assert cells["w4a8", "ascend"]["options"] == {"group_size": "channel"}
    assert cells["w4a16", "ascend"]["options"] == {}
    chosen = cells["mxfp4_fp8", "compressed-tensors"]
    assert (chosen["label"], chosen["options"]) == ("mxfp4 fp8 inputs in groups", {})
    assert cells["fp8_dynamic", "ascend"]["tensors"]["weight"] == {
        "dtype": "F8_E4M3",
        "shape": (256, 256),
    }
    assert cells["w8a8_static", "ascend"]["tensors"] == {
        "weight": {"dtype": "I8", "shape": (256, 256)},
        "input_scale": {"dtype": "F32", "shape": (1,)},
        "input_offset": {"dtype": "F32", "shape": (1,)},
        "quant_bias": {"dtype": "I32", "shape": (256,)},
        "deq_scale": {"dtype": "F32", "shape": (256,)},
    }
