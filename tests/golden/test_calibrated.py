"""Calibration against the reference producer, on its models and its text."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from quantcli import commands
from quantcli.calibration.dataset import TextSource, load_dataset
from quantcli.calibration.engine import Engine
from quantcli.calibration.served import Served
from quantcli.calibration.taps import Matrices, Tap
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
        return out, commands.quantize(job).plan

    return DATA / model, DATA / name, make


class Running:
    """The reference's way: an input widens the range and is quantized with it at once, in bfloat16."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.low, self.high, self.weights = {}, {}, {}

    def scale(self, name):
        scale = self.high[name] / 255 - self.low[name] / 255
        return scale, (-self.low[name] / scale).round() - 128

    def linear(self, matrix, x, bias):
        name = matrix.parameter.removesuffix(".weight")
        zero = torch.zeros((), dtype=x.dtype)
        self.low[name] = torch.minimum(self.low.get(name, zero), x.min())
        self.high[name] = torch.maximum(self.high.get(name, zero), x.max())
        scale, offset = self.scale(name)
        codes = (x / scale + offset).round().clamp(-128, 127)
        if name not in self.weights:
            weight = self.parameters[matrix.parameter]
            step = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(2**-23)
            self.weights[name] = (weight / step).round().clamp(-128, 127) * step
        return F.linear((codes - offset) * scale, self.weights[name], bias)


@pytest.mark.parametrize(("model", "name", "count"), [(*CASES[0], 21), (*CASES[1], 14)])
def test_the_reference_s_ranges_to_the_last_bit(model, name, count):
    """With the reference's own arithmetic in place of ours, the replay finds the very same numbers."""
    model, reference = DATA / model, tensors(DATA / name)
    run = Replayed(model, batches(model), workers=1)  # in the order of the samples
    found = {}

    def taps(index, layer):
        name = run.skeleton.layers[index][0]
        running = Running({f"{name}.{local}": p for local, p in layer.named_parameters()})
        found[index] = running
        return lambda _: Tap(Matrices(name, layer), running)

    run.layers(taps)
    modules = [(running, module) for running in found.values() for module in running.low]
    assert len(modules) == count
    for running, module in modules:
        scale, offset = running.scale(module)
        assert float(scale) == float(reference[f"{module}.input_scale"]), module
        assert float(offset) == float(reference[f"{module}.input_offset"]), module


def test_ranges_are_near_the_reference_s(case):
    """The same ranges where inputs are the same; behind quantized layers, random weights let a
    rounding grow to some percent, whichever way it is done."""
    _, theirs, make = case
    ours, reference = tensors(make("minmax", "quantized")[0]), tensors(theirs)
    assert ours.keys() == reference.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (reference[name].dtype, reference[name].shape), name
        if name.endswith(".input_scale"):
            ratio = float(tensor / reference[name])
            exact = "layers.0.self_attn" in name and "o_proj" not in name
            assert abs(ratio - 1) <= (0 if exact else 0.07), (name, ratio)


def errors(model, folder, plan, inputs):
    """Each layer's squared output error against float, on the float model's own inputs."""
    served = Served(plan, folder)
    run = Replayed(model, inputs, dtype="F32")
    found = []
    for index, (name, _) in enumerate(run.skeleton.layers):
        exact, quantized = Memory(), Memory()
        with run.skeleton.loaded(index, run.read, CPU) as layer:
            run.replay.run(index, layer, run.states, exact.__setitem__)
        with run.skeleton.loaded(index, served.read, CPU) as layer:
            engine = Engine(name, layer, run.skeleton.segments(index), served.quantizer)
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
    out, plan = make("mse", "float")
    inputs = batches(model)
    ours, reference = errors(model, out, plan, inputs), errors(model, theirs, plan, inputs)
    assert len(ours) in {2, 3}
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    assert all(ratio <= 1.0 for ratio in ratios), ratios
