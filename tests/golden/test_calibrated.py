"""Calibration against the reference producer, on its models and its text."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcli.calibration.replay.engine import EngineLinears
from quantcli.calibration.replay.served import Served
from quantcli.calibration.replay.taps import Matrices, Tap
from quantcli.calibration.text.dataset import TextSource, load_dataset
from quantcli.commands import quantize as commands
from tests.replaying import CPU, Memory, Replayed

DATA = Path(__file__).parent / "data"
CASES = [("model", "w8a8_static"), ("model_qwen2", "qwen2_w8a8_static")]
RECIPE = """\
target: ascend
calibration: {data: DATA/calib.jsonl, samples: 8, length: 512, pack: false, inputs: INPUTS}
rules: [{match: "*_proj", scheme: {name: w8a8_static, observer: OBSERVER}}]
"""


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def batches(model):
    source = TextSource(str(DATA / "calib.jsonl"), "here", 8, 512, 0, pack=False, batch_tokens=1)
    return load_dataset(source, model, positions=2048, vocab_size=1024).batches


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """The model, the reference's folder, and a function that makes our own checkpoint."""
    model, name = request.param
    folder = tmp_path_factory.mktemp("calibrated")

    def make(observer, inputs):
        recipe = folder / f"{observer}-{inputs}.yaml"
        text = RECIPE.replace("DATA", str(DATA)).replace("INPUTS", inputs)
        recipe.write_text(text.replace("OBSERVER", observer))
        out = folder / recipe.stem
        job = commands.prepare(recipe, model=str(DATA / model), out=out)
        commands.quantize(job)
        return out

    return DATA / model, DATA / name, make


def ranges(out):
    """input_min and input_max of every module, from the reports of the calibration."""
    folder = out.with_name(out.name + ".calibration")
    return {
        module: (found["input_min"], found["input_max"])
        for file in sorted(folder.glob("layer-*.json"))
        for module, found in json.loads(file.read_text())["modules"].items()
    }


def bf16(value):
    return torch.tensor(value, dtype=torch.bfloat16)


def test_ranges_are_the_reference_s_to_the_last_bit(case):
    """Its scale and offset, by its own formula in bfloat16 from the extremes that we saw."""
    model, theirs, make = case
    out = make("minmax", "running")
    ours, reference = tensors(out), tensors(theirs)
    assert ours.keys() == reference.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (reference[name].dtype, reference[name].shape), name
    found = ranges(out)
    assert len(found) == {"model": 21, "model_qwen2": 14}[model.name]
    for module, ends in found.items():
        low, high = map(bf16, ends)
        scale = high / 255 - low / 255
        assert float(scale) == float(reference[f"{module}.input_scale"]), module
        offset = (-low / scale).round() - 128
        assert float(offset) == float(reference[f"{module}.input_offset"]), module
        ratio = float(ours[f"{module}.input_scale"]) / float(scale)
        assert abs(ratio - 1) <= 0.01, module  # ours rounds it once


def test_inputs_by_the_engine_s_arithmetic_are_near(case):
    """Equal where nothing quantized comes before; behind that, random weights let any other rounding
    grow to some percent."""
    _, theirs, make = case
    ours, reference = tensors(make("minmax", "quantized")), tensors(theirs)
    for name in ours:
        if name.endswith(".input_scale"):
            ratio = float(ours[name] / reference[name])
            exact = "layers.0.self_attn" in name and "o_proj" not in name
            assert abs(ratio - 1) <= (0 if exact else 0.07), (name, ratio)


def errors(model, folder, inputs):
    """Each layer's squared output error against float, on the float model's own inputs."""
    served = Served.open(folder)
    run = Replayed(model, inputs, dtype="F32")
    found = []
    for index, (name, _) in enumerate(run.skeleton.layers):
        exact, quantized = Memory(), Memory()
        with run.skeleton.loaded(index, run.read, CPU) as layer:
            run.replay.run(index, layer, run.states, exact.__setitem__)
        with run.skeleton.loaded(index, served.read, CPU) as layer:
            engine = EngineLinears(name, layer, run.skeleton.segments(index), served.quantizer)
            matrices = Matrices(name, layer)
            run.replay.run(
                index,
                layer,
                run.states,
                quantized.__setitem__,
                lambda _, m=matrices, e=engine: Tap(m, e),
            )
        found.append(sum(float((exact[n] - quantized[n]).square().sum()) for n in exact))
        run.states = exact
    return found


def test_every_layer_s_output_is_closer_to_float_than_the_reference_s(case):
    model, theirs, make = case
    out = make("mse", "float")
    inputs = batches(model)
    ours, reference = errors(model, out, inputs), errors(model, theirs, inputs)
    assert len(ours) in {2, 3}
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    assert all(ratio <= 1.0 for ratio in ratios), ratios
