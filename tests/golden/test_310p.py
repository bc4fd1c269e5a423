"""W8A8 and W8A8_DYNAMIC for Atlas 310P against numbers that are computed here by hand."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.commands.verify import run as verify
from quantcli.convert.execute import RunOptions, execute
from quantcli.convert.folder import LocalFolder
from quantcli.core.errors import InputError
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from quantcli.verification.options import VerifyOptions
from tests.measured import store

TARGET = {"name": "ascend", "device": "310P"}
MODULE = "model.layers.0.self_attn.o_proj"
SCALE, OFFSET = 0.0371, -7.0
BIAS = [0.5, -1.25, 3.0]
# two rows of codes that their scales reach exactly, and one whose largest value is not the first
WEIGHT = [[127, -3, 64, 5], [-127, 1, 2, 120], [10, 20, 127, -50]]
STEPS = [2.0**-8, 2.0**-7, 2.0**-9]  # of rows; 127 steps are a bfloat16 number


def model(folder, dtype):
    """One linear of three rows, with a bias."""
    folder.mkdir()
    name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
    config = {"model_type": "tiny", "architectures": ["TinyModel"], "torch_dtype": name}
    (folder / "config.json").write_text(json.dumps(config))
    weight = torch.tensor(WEIGHT, dtype=torch.float64) * torch.tensor(STEPS).unsqueeze(1)
    tensors = {f"{MODULE}.weight": weight.to(dtype), f"{MODULE}.bias": torch.tensor(BIAS).to(dtype)}
    assert torch.equal(tensors[f"{MODULE}.weight"].double(), weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe(folder, scheme, target=TARGET):
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"target": target, "rules": [{"match": "*_proj", "scheme": scheme}]}))
    return path


def static(tmp_path, dtype, target=TARGET):
    """The stored tensors of the module, and where they are."""
    scale = torch.tensor([SCALE]).to(torch.float16).float()
    stats = {"input_scale": scale, "input_offset": torch.tensor([OFFSET]),
             "input_min": torch.zeros(1), "input_max": torch.zeros(1)}  # fmt: skip
    source = open_checkpoint(model(tmp_path / "model", dtype))
    measured = store(tmp_path / "stats.safetensors", {MODULE: stats})
    plan = make_plan(load_recipe(recipe(tmp_path, "w8a8_static", target)), source, measured)
    execute(plan, LocalFolder(tmp_path / "out"), RunOptions(1))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    return plan, {name.removeprefix(f"{MODULE}."): t for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deq_scale_is_int64_also_for_models_in_bfloat16(tmp_path, dtype):
    """deq_scale = step / r with r = fp16(1 / fp16(s)), in 19 bits, in the low half of an int64."""
    plan, found = static(tmp_path, dtype)
    r = np.float16(1 / np.float32(np.float16(SCALE)))
    low = found["deq_scale"].numpy()
    assert low.dtype == np.int64
    assert (low >> 32 == 0).all()
    deq = low.astype(np.uint32).view(np.float32).astype(np.float64)
    assert (low & 0x1FFF == 0).all()  # what the hardware leaves out is not there
    # a step is the smallest of these that clips no code: 127 steps round up to 127.49 at most
    exact = np.array(STEPS) / np.float64(r)
    assert (deq >= exact * 127 / 127.49).all()
    assert (deq <= exact * (1 + 2.0**-10)).all()
    codes = found["weight"].numpy().astype(np.int64)
    weight = np.array(WEIGHT) * np.array(STEPS)[:, None]
    assert (codes == np.rint(weight / (deq * np.float64(r))[:, None])).all()
    bias = np.rint(np.array(BIAS) / deq - OFFSET * codes.sum(1))
    assert (np.abs(found["quant_bias"].numpy() - bias) <= 1).all()
    assert found["quant_bias"].dtype == torch.int32
    assert found["input_scale"].tolist() == [float(np.float16(SCALE))]
    assert plan.serving_dtype == "F16"
    config = json.loads(plan.sidecars.get("config.json", b"{}") or "{}")
    assert dtype == torch.float16 or config["torch_dtype"] == "float16"
    assert json.loads(plan.sidecars["quant_model_description.json"])[f"{MODULE}.weight"] == "W8A8"


def test_without_the_device_a_model_in_bfloat16_has_float32(tmp_path):
    plan, found = static(tmp_path, torch.bfloat16, "ascend")
    assert found["deq_scale"].dtype == torch.float32
    assert plan.serving_dtype == "BF16"


def test_dynamic_scales_stay_float32(tmp_path):
    """The loader for this chip keeps weight_scale in float32: codes are chosen against that one."""
    source = model(tmp_path / "model", torch.bfloat16)
    weight = {f"{MODULE}.weight": torch.tensor([[1.0, -0.3, 0.7, 0.11]] * 3).to(torch.bfloat16)}
    save_file(weight, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    job = commands.plan(recipe(tmp_path, "w8a8_dynamic"), model=str(source), out=out)
    assert any("float16 alone" in note for note in job.plan.notes)
    commands.quantize(job)
    (file,) = out.glob("*.safetensors")
    scale = load_file(file)[f"{MODULE}.weight_scale"]
    assert scale.dtype == torch.float32
    assert not torch.equal(scale, scale.bfloat16().float())
    assert abs(float(scale[0, 0]) * 127 - 1) < 0.004
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    report = verify(VerifyOptions(out, full=True, against=str(source)))
    assert report["ok"], report["findings"]


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8_mix", "w4a4_dynamic", "fp8_dynamic"])
def test_the_chip_has_two_types(tmp_path, scheme):
    source = model(tmp_path / "model", torch.bfloat16)
    with pytest.raises(InputError, match=r"on the 310P, only W8A8 and W8A8_DYNAMIC"):
        commands.plan(recipe(tmp_path, scheme), model=str(source), out=tmp_path / "out")


def test_the_head_stays_float(tmp_path):
    source = model(tmp_path / "model", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(8, 4).bfloat16()}, source / "model.safetensors")
    path = recipe(tmp_path, "w8a8_dynamic")
    path.write_text(path.read_text().replace("*_proj", "lm_head"))
    with pytest.raises(InputError, match="builds lm_head as float on the 310P"):
        commands.plan(path, model=str(source), out=tmp_path / "out")
