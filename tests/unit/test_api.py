"""The public API of the package."""

from pathlib import Path

import pytest

import quantcli
from tests.families import make_family

RECIPE = Path(__file__).parents[2] / "recipes" / "w8a8_dynamic.yaml"


def test_every_public_name_is_there():
    assert set(quantcli.__all__) == {
        "Checkpoint", "inspect", "load_recipe", "make_plan", "open_checkpoint", "prepare", "quantize",
        "support",
    }  # fmt: skip
    assert all(callable(getattr(quantcli, name)) for name in quantcli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        quantcli.nonsense  # noqa: B018


def test_a_conversion_in_python(tmp_path):
    model = make_family(tmp_path / "model", "llama")
    plan = quantcli.make_plan(quantcli.load_recipe(RECIPE), quantcli.open_checkpoint(model))
    job = quantcli.prepare(RECIPE, model=str(model), out=tmp_path / "out")
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
        "w4a4_dynamic": "W4A4_DYNAMIC",
        "w4a4_flatquant": "W4A4_FLATQUANT_DYNAMIC",
        "w8a16": "W8A16",
        "w8a8_dynamic": "W8A8_DYNAMIC",
        "w8a8_mix": "W8A8_MIX",
        "w8a8_static": "W8A8",
    }
    assert "target `ascend` cannot store" in cells["w4a16", "ascend"]["why"]
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
