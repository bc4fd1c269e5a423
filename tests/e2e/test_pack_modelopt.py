"""Between compressed-tensors and ModelOpt: the same numbers for the engine, there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.test_pack import MANIFEST, pack, refused
from tests.verify.test_fp4 import nvfp4_checkpoint
from tests.verify.test_modelopt import LAYER, checkpoint, mixture
from tests.verify.test_producers import errors, examine

CT = "compressed-tensors"
DOWN = f"{LAYER}.mlp.down_proj"


def packed(source: Path, target: str, name: str) -> Path:
    """A sound checkpoint next to `source`."""
    out = source.with_name(name)
    result = pack(source, target, out)
    assert result.code == 0, result.err
    report = examine(out)
    assert errors(report) == []
    assert report.format == target
    return out


def load(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def state(folder: Path) -> str:
    return str(json.loads((folder / MANIFEST).read_text())["state"])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


FORMS: dict[str, Callable[[Path], Path]] = {
    "FP8": lambda folder: checkpoint(folder, "FP8"),
    "channel": lambda folder: checkpoint(folder, "FP8_PER_CHANNEL_PER_TOKEN"),
    "blocks": lambda folder: checkpoint(
        folder, "fp8_pb_wo", ["lm_head", "self_attn", "*.gate_up_proj"], only="down_proj"
    ),
    "MXFP8": lambda folder: checkpoint(folder, "MXFP8"),
    "mixed": lambda folder: checkpoint(folder, "MIXED_PRECISION", of=mixture),
}


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(tmp_path: Path, form: str) -> None:
    source = FORMS[form](tmp_path / "source")
    there = packed(source, CT, "there")
    back = packed(there, "modelopt", "back")
    before, after = load(source), load(back)
    assert before.keys() == after.keys()
    globals_ = {name for name in before if name.endswith(("weight_scale_2", "input_scale"))}
    unlike = {name for name in before if not same(before[name], after[name])}
    assert unlike <= (globals_ if form == "mixed" else set())
    assert (state(there) == "lossless") == (not unlike)


def test_a_divisor_becomes_the_multiplier_that_the_engine_makes_of_it(tmp_path: Path) -> None:
    """Every byte of codes and every scale of a block with it."""
    source = nvfp4_checkpoint(tmp_path / "source", inputs=True)
    tensors = load(source)
    codes, scales = tensors[f"{DOWN}.weight_packed"], tensors[f"{DOWN}.weight_scale"]
    codes.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    scales.view(torch.uint8).view(-1)[:126] = torch.arange(1, 127, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors")
    there = packed(source, "modelopt", "there")
    assert state(there) == "lossless"
    before, after = tensors, load(there)
    for name in (n.removesuffix(".weight_packed") for n in before if n.endswith(".weight_packed")):
        assert same(after[f"{name}.weight"], before[f"{name}.weight_packed"])
        assert same(after[f"{name}.weight_scale"], before[f"{name}.weight_scale"])
        for one, other in (("weight_scale_2", "weight_global"), ("input_scale", "input_global")):
            multiplier = 1 / before[f"{name}.{other}_scale"]
            assert same(after[f"{name}.{one}"], multiplier.reshape(()))
    back = packed(there, CT, "back")
    assert state(back) == "lossless"
    for name, tensor in load(back).items():
        if name.endswith("global_scale"):  # the engine's number is the same
            assert torch.equal(1 / tensor, 1 / before[name])
        else:
            assert same(tensor, before[name]), name


def unreached() -> float:
    """A float32 that is the reciprocal of none: found by trial."""
    bits = torch.arange(4096, dtype=torch.int32) + torch.tensor(0.0019).view(torch.int32)
    numbers = bits.view(torch.float32)
    return float(numbers[1 / (1 / numbers) != numbers][0])


def test_a_multiplier_that_no_divisor_makes(tmp_path: Path) -> None:
    """The engine's scale moves by its last bit, and the plan says of how many modules."""
    number = unreached()
    assert all(
        float(1 / (torch.tensor(1 / number).view(torch.int32) + d).view(torch.float32)) != number
        for d in range(-3, 4)
    )
    source = checkpoint(tmp_path / "source", "W4A16_NVFP4")
    tensors = load(source)
    for name in tensors:
        if name.endswith("weight_scale_2"):
            tensors[name] = torch.tensor(number if ".o_proj" in name else 1 / 512)
    save_file(tensors, source / "model.safetensors")
    out = tmp_path / "there"
    result = pack(source, CT, out)
    assert result.code == 0, result.err
    assert "weight_global_scale of 4 modules, such as `model.layers.0.self_attn.o_proj`" in result.out
    assert state(out) == "lossless but for the last bits of global scales"
    multiplier = 1 / load(out)[f"{LAYER}.self_attn.o_proj.weight_global_scale"]
    assert 0 < abs(float(multiplier) - number) <= number * 2**-23
    assert float(1 / load(out)[f"{DOWN}.weight_global_scale"]) == 1 / 512


def test_a_block_scale_of_nothing_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "NVFP4")
    tensors = load(source)
    tensors[f"{DOWN}.weight_scale"].view(torch.uint8)[5, 1] = 0
    save_file(tensors, source / "model.safetensors")
    refused(pack(source, CT, tmp_path / "out"), "weight_scale is 0", f"{DOWN}.weight_scale`[5]")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_no_parameter_takes_is_not_carried_along(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "MXFP8")
    stray = {f"{DOWN}.weight_zero_point": torch.ones(1)}
    save_file(load(source) | stray, source / "model.safetensors")
    refused(pack(source, CT, tmp_path / "there"), f"`{DOWN}.weight_zero_point`", "MXFP8 has no")
    assert not (tmp_path / "there").exists()
