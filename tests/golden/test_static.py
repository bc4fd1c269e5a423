"""Static int8 inputs against the reference producer: its format, and numbers from its input scales."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.convert.execute import RunOptions, execute
from quantcli.convert.folder import LocalFolder
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from quantcli.schemes.w8a8_static import W8A8Static
from tests.measured import store

DATA = Path(__file__).parent / "data"
CASES = [("model", "w8a8_static"), ("model_qwen2", "qwen2_w8a8_static")]


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pair(request, tmp_path_factory):
    """The source, the reference (tensors, description), and our plan of the same."""
    model, name = request.param
    recipe = tmp_path_factory.mktemp("static") / "recipe.yaml"
    recipe.write_text('target: ascend\nrules: [{match: "*_proj", scheme: w8a8_static}]\n')
    reference = tensors(DATA / name)
    description = json.loads((DATA / name / "quant_model_description.json").read_text())
    return DATA / model, reference, description, load_recipe(recipe)


def modules(reference):
    return sorted(name.removesuffix(".deq_scale") for name in reference if name.endswith(".deq_scale"))


def test_the_plan_has_the_same_tensors_and_tags(pair):
    model, reference, description, recipe = pair
    plan = make_plan(recipe, open_checkpoint(model))
    planned = {spec.name: spec for shard in plan.shards for spec in shard.tensors}
    assert planned.keys() == reference.keys()
    kinds = {torch.int8: "I8", torch.int32: "I32", torch.float32: "F32", torch.bfloat16: "BF16"}
    for name, tensor in reference.items():
        expected = kinds[tensor.dtype], tuple(tensor.shape)
        assert (planned[name].dtype, planned[name].shape) == expected, name
    assert json.loads(plan.sidecars["quant_model_description.json"]) == description
    assert set(plan.needs_data) == set(modules(reference))
    assert len(plan.needs_data) in {14, 21}


def test_numbers_from_the_reference_s_input_scales(pair, tmp_path):
    model, reference, _, recipe = pair
    zero = torch.zeros(1)
    stats = {
        module: {
            "input_scale": reference[f"{module}.input_scale"],
            "input_offset": reference[f"{module}.input_offset"],
            "input_min": zero,
            "input_max": zero,
        }
        for module in modules(reference)
    }
    plan = make_plan(recipe, open_checkpoint(model), store(tmp_path / "stats.safetensors", stats))
    assert plan.needs_data == ()
    execute(plan, LocalFolder(tmp_path / "out"), RunOptions(2))
    ours, source = tensors(tmp_path / "out"), tensors(model)
    assert ours.keys() == reference.keys()
    gain = [0.0, 0.0]
    for module in modules(reference):
        mine = {s: ours[f"{module}.{s}"] for s in ("weight", "deq_scale", "quant_bias", "input_scale")}
        theirs = {s: reference[f"{module}.{s}"] for s in mine}
        assert (mine["weight"].int() - theirs["weight"].int()).abs().max() <= 1, module
        assert torch.equal(mine["input_scale"], theirs["input_scale"])
        assert torch.equal(ours[f"{module}.input_offset"], reference[f"{module}.input_offset"])
        ratio = mine["deq_scale"] / theirs["deq_scale"]
        # 127.49 steps instead of 127, 0.4 % of the effective scale, two roundings to bfloat16 of theirs
        assert (ratio - 1).abs().max() <= 2**-6, module
        # what is added to the sum, in the units of the output
        added, expected = (t["quant_bias"].double() * t["deq_scale"].double() for t in (mine, theirs))
        spread = source[f"{module}.weight"].double().abs().sum(1) * float(mine["input_scale"]) * 2
        assert ((added - expected).abs() <= 0.01 * expected.abs() + spread).all(), module
        # the weight that the engine sees: codes times deq_scale, over what inputs are divided by
        r = (1 / mine["input_scale"].bfloat16().float()).bfloat16().double()
        for i, t in enumerate((mine, theirs)):
            seen = t["weight"].double() * t["deq_scale"].double().unsqueeze(1) * r
            gain[i] += float((seen - source[f"{module}.weight"].double()).square().sum())
    assert gain[0] < 0.9 * gain[1]


def digest(table, suffix):
    """Of the bytes of every tensor of that name, in the order of the modules."""
    found = hashlib.sha256()
    for name in sorted(table):
        if name.endswith(f"_proj.{suffix}"):
            found.update(table[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


# What is made from the reference's ranges: the first numbers of layer 0's down_proj, and digests of all
# modules. No sum of floats is in them, so they are the same bits with any instruction set.
NUMBERS = {
    "model": {
        "range": [-31.078125, 19.72265625],
        "input_scale": [0.19921875],
        "input_offset": [28.0],
        "weight": [-1, -27, -44],
        "deq_scale": [0.0004209950566291809, 0.00036303699016571045, 0.00035540759563446045],
        "quant_bias": [1092, 5096, -31556],
    },
    "model_qwen2": {
        "range": [-7.447265625, 7.86767578125],
        "input_scale": [0.06005859375],
        "input_offset": [-4.0],
        "weight": [-34, 18, -4],
        "deq_scale": [7.524341344833374e-05, 9.232386946678162e-05, 7.016584277153015e-05],
        "quant_bias": [9160, 648, 2604],
    },
}
DIGESTS = {
    "model": {
        "input_scale": "f0107cf12ce8b82b",
        "input_offset": "71b0022d48d23608",
        "weight": "78f5298be73eb837",
        "deq_scale": "e1ca243ae0b391b5",
        "quant_bias": "a5c7382ea047fe2e",
    },
    "model_qwen2": {
        "input_scale": "e9a4cc9765f31869",
        "input_offset": "a04f9f93d462f519",
        "weight": "92f62385d91e8ecf",
        "deq_scale": "db919d6c6ace892e",
        "quant_bias": "11643b8de01b39db",
    },
}


def test_numbers_from_given_ranges_are_the_same_bits_on_every_cpu(pair, tmp_path):
    """From the ends of the range to codes: scale, offset, deq_scale, quant_bias."""
    model, reference, _, recipe = pair
    stats = {}
    for module in modules(reference):
        scale, offset = (reference[f"{module}.input_{what}"].float() for what in ("scale", "offset"))
        observer = W8A8Static(observer="minmax").observer(torch.bfloat16)
        ends = torch.cat([scale * (-128 - offset), scale * (127 - offset)])
        observer.update(ends.view(1, 2), 0)
        stats[module] = dict(observer.stats())
        assert torch.equal(stats[module]["input_scale"], scale), module
        assert torch.equal(stats[module]["input_offset"], offset), module
        assert [float(stats[module][f"input_{end}"]) for end in ("min", "max")] == ends.tolist()
    plan = make_plan(recipe, open_checkpoint(model), store(tmp_path / "stats.safetensors", stats))
    execute(plan, LocalFolder(tmp_path / "out"), RunOptions(2))
    ours = tensors(tmp_path / "out")
    made = ("input_scale", "input_offset", "weight", "deq_scale", "quant_bias")
    module = "model.layers.0.mlp.down_proj"
    numbers = {
        "range": [float(stats[module][f"input_{end}"]) for end in ("min", "max")],
        **{what: ours[f"{module}.{what}"].flatten()[:3].tolist() for what in made},
    }
    assert numbers == NUMBERS[model.name]
    assert {what: digest(ours, what) for what in made} == DIGESTS[model.name]
