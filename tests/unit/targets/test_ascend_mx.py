"""MX types of the Ascend target: widths, the sides and blocks of transforms, and the description."""

import json
import math

import pytest

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.numerics import Module, Numerics, Operand, decompose
from quantcli.targets.ascend.target import Ascend
from quantcli.targets.base import PlannedCheckpoint

FP4 = Operand("fp4_e2m1", "group", block=(1, 32), scale="e8m0")
FP4_INPUTS = Operand("fp4_e2m1", "group", dynamic=True, block=(1, 32), scale="e8m0")
FP8 = Operand("fp8_e4m3", "group", block=(1, 32), scale="e8m0")
FP8_INPUTS = Operand("fp8_e4m3", "group", dynamic=True, block=(1, 32), scale="e8m0")
W4A4, W4A8, W4A16, W8A8 = (
    Numerics(FP4, FP4_INPUTS),
    Numerics(FP4, FP8_INPUTS),
    Numerics(FP4, None),
    Numerics(FP8, FP8_INPUTS),
)
INT8 = Numerics(Operand("int8", "channel"), Operand("int8", "token", dynamic=True))
L = "model.layers.0"


def flat(blocks=1):
    return Numerics(FP4, FP4_INPUTS, transform="kronecker", blocks=blocks)


def said(name, k, numerics, tp=None, biased=False):
    module = Module(f"{L}.{name}", (64, k), numerics, biased=biased)
    found = [*Ascend(tp=tp).refusals(module, []), *Ascend(tp=tp).check([module])]
    return [refusal.what for refusal in found if "fuse" not in refusal.what]


def test_labels():
    found = [Ascend().label(n) for n in (W4A4, W4A8, W4A16, W8A8, flat(), flat(4), flat(3))]
    assert found == [
        "W4A4_MXFP4", "W4A8_MXFP", "W4A16_MXFP4", "W8A8_MXFP8", *["W4A4_MXFP4_FLATQUANT"] * 3,
    ]  # fmt: skip
    assert all("A5" in Ascend().loads_on(label) for label in found)


@pytest.mark.parametrize(
    ("name", "k", "numerics", "word"),
    [
        ("self_attn.q_proj", 96, W4A4, None),  # an odd number of groups is filled up
        ("self_attn.q_proj", 80, W4A4, "groups of 32 columns do not divide 80"),
        ("self_attn.q_proj", 96, W4A8, "W4A8_MXFP takes inputs in multiples of 64; there are 96"),
        ("self_attn.q_proj", 128, W4A8, None),
        ("self_attn.q_proj", 96, flat(), "inputs in multiples of 64"),
        ("mlp.experts.0.up_proj", 96, W4A4, "inputs of experts in multiples of 64"),
        ("mlp.experts.0.up_proj", 96, W4A16, "inputs of experts in multiples of 64"),
        ("mlp.experts.0.up_proj", 128, W4A4, None),
        ("mlp.experts.0.up_proj", 128, W4A16, None),
        ("mlp.experts.0.up_proj", 128, flat(), "no W4A4_MXFP4_FLATQUANT for experts"),
        ("mlp.up_proj", 128, W4A16, "W4A16_MXFP4 for experts alone"),
    ],
)
def test_widths_and_kinds(name, k, numerics, word):
    found = said(name, k, numerics)
    assert bool(found) == (word is not None)
    assert word is None or word in found[0]


def test_inputs_of_each_device_are_pairs_of_groups():
    assert said("self_attn.o_proj", 128, W4A4, tp=2) == []
    assert "its 96 inputs on each of 2 devices" in said("self_attn.o_proj", 192, W4A4, tp=2)[0]


def engine_sides(size, largest):
    """The rule of the engine for modules whose inputs are split, transcribed."""

    def sides(n, m):
        a = math.isqrt(n)
        a += a * a < n
        while math.isqrt(a * a - n) ** 2 != a * a - n:
            a += 1
        b = math.isqrt(a * a - n)
        if a + b > 256:
            raise ValueError
        return (256, m * n // 256) if (a - b) * m > 256 else (a - b, a + b)

    _, right = sides(size // largest, largest)
    return size // right, right


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_sides_are_those_of_the_engine(devices):
    widths = [
        256, 512, 896, 1024, 1536, 2048, 3072, 4096, 4864, 5120, 8192, 8960, 9728, 11008, 12288, 13824,
        14336, 17408, 18944, 25600, 28672, 29568, 53248,
    ]  # fmt: skip
    taken = 0
    for k in widths:
        found = said("mlp.down_proj", k, flat(devices), tp=devices)
        try:
            left, right = engine_sides(k, devices)
        except ValueError:
            assert "takes sides up to 256" in found[0], k
            continue
        fits = left * right == k and left % devices == 0 and right % 2 == 0 and max(left, right) <= 256
        if not fits:
            assert found, k
        elif k // devices % 64 == 0:
            assert found == [], k
            assert decompose(k, devices) == (left, right)
            taken += 1
    assert taken >= 12


@pytest.mark.parametrize(
    ("k", "blocks", "sides"),
    [(4096, 1, (64, 64)), (4096, 4, (128, 32)), (11008, 4, (128, 86)), (28672, 4, (256, 112)),
     (29568, 4, (0, 0)), (4098, 1, (0, 0)), (4100, 8, (0, 0))],
)  # fmt: skip
def test_some_sides(k, blocks, sides):
    assert decompose(k, blocks) == sides


@pytest.mark.parametrize(
    ("name", "blocks", "tp", "word"),
    [
        ("self_attn.q_proj", 1, None, None),
        ("self_attn.q_proj", 4, None, "in one block"),
        ("self_attn.o_proj", 1, None, "up to 4 devices share its inputs"),
        ("self_attn.o_proj", 4, None, None),
        ("self_attn.o_proj", 1, 1, None),
        ("self_attn.o_proj", 4, 2, "up to 2 devices"),
        ("self_attn.o_proj", 2, 2, None),
    ],
)
def test_blocks_of_transforms(name, blocks, tp, word):
    found = said(name, 4096, flat(blocks), tp)
    assert bool(found) == (word is not None)
    assert word is None or word in found[0]


def test_a_bias_that_the_matmul_does_not_take():
    assert "has a bias in float32 alone" in said("self_attn.q_proj", 128, flat(), biased=True)[0]
    assert said("self_attn.q_proj", 128, W4A4, biased=True) == []
    assert said("self_attn.q_proj", 128, W4A8, biased=True) == []


def described(modules, tp=None):
    specs = {f"{m.name}.weight": TensorSpec(f"{m.name}.weight", "U8", m.shape) for m in modules}
    config = Settings({"dtype": "bfloat16"})
    output = PlannedCheckpoint(modules, specs, dict.fromkeys(specs, "f"), config, "BF16")
    return json.loads(Ascend(tp=tp).sidecars(output)["quant_model_description.json"])


def test_description_of_groups_and_devices():
    names = [f"{L}.mlp.down_proj", f"{L}.self_attn.o_proj"]
    both = [Module(names[0], (64, 128), W8A8), Module(names[1], (64, 128), INT8)]
    table = described(both)
    assert table["group_size"] == 32
    assert "max_supported_tp" not in table
    assert table["model_quant_type"] == "W8A8_MXFP8"
    assert [r.what for r in Ascend().check(both)] == []
    table = described([Module(names[0], (64, 256), flat(4)), both[1]])
    assert (table["group_size"], table["max_supported_tp"]) == (32, 4)
    assert table["model_quant_type"] == "W4A4_MXFP4_FLATQUANT"
    assert described([Module(names[0], (64, 256), flat(2))], tp=2)["max_supported_tp"] == 2


def test_advice_on_devices():
    module = Module(f"{L}.mlp.down_proj", (64, 256), flat(4))
    (note,) = Ascend().advise([module])
    assert note == "transforms are made for tensor parallel sizes that divide 4"
