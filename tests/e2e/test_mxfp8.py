"""MXFP8 end to end: damage of the source, resumed and recomputed bytes, and the engine's arithmetic."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import Box, Result, make_llama, run_cli

NAME = "model.layers.0.mlp.down_proj"
TARGETS = ("ascend", "compressed-tensors")


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A model of one layer, 64 wide."""
    box = Box(
        tmp_path, make_llama(tmp_path / "model", side=64), tmp_path / "recipe.yaml", tmp_path / "out"
    )
    assert f"{NAME}.weight" in load_file(box.model / "model.safetensors")
    return box


def convert(box: Box, target: str, *more: object) -> Result:
    box.edit_recipe(f'target: {target}\nrules: [{{match: "*_proj", scheme: mxfp8}}]\n')
    return box.run(*more)


def damage(path: Path, name: str, to: object) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name] = to(tensors[name])  # type: ignore[operator]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_named(box: Box, target: str, value: float) -> None:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor[11, 37] = value
        return tensor

    damage(box.model, f"{NAME}.weight", put)
    done = convert(box, target)
    assert done.code == 2
    assert f"weight is {value}\n  --> `{NAME}.weight`[11, 37] in model.safetensors" in done.err
    assert not box.out.exists()


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_of_nothing_but_nan_is_named(box: Box, target: str) -> None:
    damage(box.model, f"{NAME}.weight", lambda t: t.fill_(math.nan))
    done = convert(box, target)
    assert done.code == 2
    assert f"weight is nan\n  --> `{NAME}.weight`[0, 0] in model.safetensors" in done.err


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_of_zeros_has_the_smallest_exponent(box: Box, target: str) -> None:
    damage(box.model, f"{NAME}.weight", lambda t: t.fill_(0))
    assert convert(box, target).code == 0
    (file,) = box.out.glob("*.safetensors")
    stored = load_file(file)
    assert stored[f"{NAME}.weight_scale"].dtype == torch.uint8
    assert not stored[f"{NAME}.weight_scale"].any()
    assert not stored[f"{NAME}.weight"].view(torch.uint8).any()
    assert run_cli("verify", box.out, "--full", "--against", box.model).code == 0


@pytest.mark.parametrize("target", TARGETS)
def test_one_exponent_is_recomputed(box: Box, target: str) -> None:
    """A code and its scale that say nearly the same: only what the recipe makes tells them apart."""
    assert convert(box, target, "--no-checksum").code == 0
    done = run_cli("verify", box.out, "--full", "--against", box.model, "--json")
    assert done.code == 0, done.out
    (recomputed,) = (c["checked"] for c in json.loads(done.out)["checks"] if c["name"] == "recomputed")
    assert recomputed > 14
    (file,) = box.out.glob("*.safetensors")
    tensors = load_file(file)
    codes = tensors[f"{NAME}.weight"].float()
    tensors[f"{NAME}.weight_scale"][5, 1] += 1
    codes[5, 32:64] /= 2  # the same numbers, but for subnormal ones
    tensors[f"{NAME}.weight"] = codes.to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    done = run_cli("verify", box.out, "--full", "--against", box.model)
    assert done.code == 1
    assert "`model.layers.0.mlp.down_proj.weight_scale`[5, 1]" in done.out
    assert "the recipe makes" in done.out


def test_widths_that_no_group_divides_are_refused(tmp_path: Path) -> None:
    box = Box(
        tmp_path, make_llama(tmp_path / "model", side=48), tmp_path / "recipe.yaml", tmp_path / "out"
    )
    for target in TARGETS:
        done = convert(box, target)
        assert done.code == 2
        assert "groups of 32 columns do not divide 48" in done.err


def test_siblings_may_differ_in_their_largest_weights(box: Box) -> None:
    """No scale is shared: k three times as large leaves the codes of q as they are."""
    assert convert(box, "compressed-tensors").code == 0
    (file,) = box.out.glob("*.safetensors")
    before = load_file(file)
    damage(box.model, "model.layers.0.self_attn.k_proj.weight", lambda t: t * 4)
    assert convert(box, "compressed-tensors", "--force").code == 0
    after = load_file(file)
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    assert torch.equal(after[f"{q}.weight_scale"], before[f"{q}.weight_scale"])
    assert torch.equal(after[f"{k}.weight_scale"], before[f"{k}.weight_scale"] + 2)
    assert torch.equal(after[f"{k}.weight"].view(torch.uint8), before[f"{k}.weight"].view(torch.uint8))
