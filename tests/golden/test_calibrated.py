"""Calibration against the reference producer, on its models and its text.

The reference ran on a CPU with AVX-512, and its ranges depend on every rounding before them: another
instruction set adds up bfloat16 products in another order. So there are three promises:

* on every CPU, our ranges are those of its procedure on that CPU, to the last bit;
* with AVX-512, they are the very ranges that it has stored, to the last bit;
* on every CPU, they are near the stored ones: see `far`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcli.calibration.replay.engine import EngineLinears
from quantcli.calibration.replay.served import Served
from quantcli.calibration.replay.taps import Matrices, Tap
from quantcli.calibration.text.dataset import TextSource, load_dataset
from quantcli.commands import quantize as commands
from tests.golden import capped, simulated
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
    """The model, the reference's folder, and a function that makes our own checkpoint, once."""
    model, name = request.param
    folder = tmp_path_factory.mktemp("calibrated")

    def recipe(observer, inputs):
        file = folder / f"{observer}-{inputs}.yaml"
        text = RECIPE.replace("DATA", str(DATA)).replace("INPUTS", inputs)
        file.write_text(text.replace("OBSERVER", observer))
        return file

    @cache
    def make(observer, inputs):
        out = folder / f"{observer}-{inputs}"
        commands.quantize(commands.plan(recipe(observer, inputs), model=str(DATA / model), out=out))
        return out

    @cache
    def make_capped(observer, inputs):
        out = folder / f"{observer}-{inputs}-capped"
        return out, capped.convert(DATA / model, recipe(observer, inputs), out)

    return Case(DATA / model, DATA / name, make, make_capped)


@dataclass(frozen=True)
class Case:
    model: Path
    theirs: Path
    make: Callable[[str, str], Path]
    make_capped: Callable[[str, str], tuple[Path, str]]

    @property
    def count(self):
        return {"model": 21, "model_qwen2": 14}[self.model.name]


def ranges(out):
    """input_min and input_max of every module, from the reports of the calibration."""
    folder = out.with_name(out.name + ".calibration")
    return {
        module: (found["input_min"], found["input_max"])
        for file in sorted(folder.glob("layer-*.json"))
        for module, found in json.loads(file.read_text())["modules"].items()
    }


def constants(out):
    """The reference's scale and offset of every module, by its formula from the ranges that we saw."""
    return {
        module: simulated.scale_and_offset(*(torch.tensor([end]).bfloat16() for end in ends))
        for module, ends in ranges(out).items()
    }


def steps(out, reference):
    """How far `constants` is from what the reference has stored, by module: the scale, which tells the
    width of the range, in steps of bfloat16; the offset in codes."""
    found = {}
    for module, (scale, offset) in constants(out).items():
        bits = (
            t.bfloat16().view(torch.int16).int() for t in (scale, reference[f"{module}.input_scale"])
        )
        apart = next(bits) - next(bits)
        shift = offset.float() - reference[f"{module}.input_offset"]
        found[module] = int(apart), int(shift)
    return found


def far(out, reference):
    """Modules whose range is not near the stored one.

    Layer 0 up to the inputs of its MLP: one step of bfloat16 and one code, on any CPU. Inputs that are
    not quantized on the way miss that.

    What comes behind has gone through the MLP's product of two factors, where one rounding may become a
    large value, and random weights let it grow. Other instruction sets were found to change a width by
    up to 2.0 % and an offset by 3 codes; nudging one value in a hundred by a step of bfloat16, 10.4 %
    and 10 codes. So 15 % and 16 codes there, which tell only what is grossly wrong; finer mistakes show
    in the comparison with the reference's procedure.
    """
    found = []
    for module, (apart, shift) in steps(out, reference).items():
        if ".layers.0." in module and not module.endswith("down_proj"):
            near = abs(apart) <= 1 and abs(shift) <= 1
        else:
            ratio = float(constants(out)[module][0] / reference[f"{module}.input_scale"])
            near = abs(ratio - 1) <= 0.15 and abs(shift) <= 16
        if not near:
            found.append(module)
    return found


def test_ranges_are_those_of_the_reference_s_procedure_on_this_cpu(case):
    expected = simulated.ranges(case.model, [batch.input_ids for batch in batches(case.model)])
    assert ranges(case.make("minmax", "running")) == expected
    assert len(expected) == case.count


def test_tensors_are_the_reference_s_in_all_but_the_numbers(case):
    ours, reference = tensors(case.make("minmax", "running")), tensors(case.theirs)
    assert ours.keys() == reference.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (reference[name].dtype, reference[name].shape), name


def test_scales_are_the_ranges_rounded_once(case):
    """Where the reference rounds in bfloat16 at each step of its formula."""
    out = case.make("minmax", "running")
    ours = tensors(out)
    for module, (low, high) in ranges(out).items():
        once = torch.tensor([(high - low) / 255], dtype=torch.float64).bfloat16().float()
        assert torch.equal(ours[f"{module}.input_scale"], once), module
        ratio = float(once / constants(out)[module][0])
        assert abs(ratio - 1) <= 0.01, module


def test_ranges_are_near_the_reference_s_on_every_cpu(case):
    reference = tensors(case.theirs)
    assert far(case.make("minmax", "running"), reference) == []
    wrong = far(case.make("minmax", "float"), reference)
    mlp = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    assert set(mlp) <= set(wrong), "the bound would let float inputs pass"


def test_ranges_are_the_reference_s_to_the_last_bit_with_its_instruction_set(case):
    """All of them under AVX-512, newer extensions switched off; near ones where a CPU has none."""
    reference = tensors(case.theirs)
    out, instructions = case.make_capped("minmax", "running")
    found = steps(out, reference)
    assert len(found) == case.count
    assert far(out, reference) == []
    if instructions == "AVX512":
        assert found == dict.fromkeys(found, (0, 0))


def test_inputs_by_the_engine_s_arithmetic_are_near(case):
    """Equal to a step where nothing comes before; behind that, random weights let any other rounding
    grow to some percent."""
    ours, reference = tensors(case.make("minmax", "quantized")), tensors(case.theirs)
    first = [f"model.layers.0.self_attn.{name}_proj.input_scale" for name in "qkv"]
    scales = [name for name in ours if name.endswith(".input_scale")]
    assert len(scales) == case.count
    for name in scales:
        ratio = float(ours[name] / reference[name])
        assert abs(ratio - 1) <= (2**-7 if name in first else 0.15), (name, ratio)


def errors(model, folder, inputs):
    """Each layer's squared output error against float, on the float model's own inputs."""
    served = Served.open(folder)
    run = Replayed(model, inputs, dtype="F32")
    found = []
    for index, (name, _) in enumerate(run.skeleton.layers):
        exact, quantized = Memory(), Memory()
        with run.skeleton.loaded(index, run.read, CPU) as layer:
            run.replay.run(index, layer, run.states, exact.put)
        with run.skeleton.loaded(index, served.read, CPU) as layer:
            matrices = Matrices(name, layer)
            engine = EngineLinears(matrices, run.skeleton.segments(index), served.quantizer)
            run.replay.run(
                index,
                layer,
                run.states,
                quantized.put,
                lambda _, m=matrices, e=engine: Tap(m, e),
            )
        found.append(sum(float((exact[n] - quantized[n]).square().sum()) for n in exact))
        run.states = exact
    return found


def test_every_layer_s_output_is_closer_to_float_than_the_reference_s(case):
    out = case.make("mse", "float")
    inputs = batches(case.model)
    ours, reference = errors(case.model, out, inputs), errors(case.model, case.theirs, inputs)
    assert len(ours) in {2, 3}
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    assert all(ratio <= 1.0 for ratio in ratios), ratios
