"""MX types as vLLM-Ascend loads them: its parameters, and what they are after loading, restated from
vllm-ascend 182b75ea84, quantization/methods (files in the comments), without an NPU."""

import json

import pytest
import torch

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.targets.base import target_of
from quantcli.targets.module_rows import ModuleReader
from tests.golden.short import DATA, DESCRIPTION, short_model, tensors
from tests.golden.test_ascend import RECIPES

GROUP = 32
NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
EXPERTS = "model.layers.{}.mlp.experts"
LINEARS = {"W8A8_MXFP8", "W4A4_MXFP4", "W4A8_MXFP"}  # by `register_scheme`
# relative, of normal weights whose spread is not the best for powers of two
ERRORS = {"W8A8_MXFP8": 0.0268, "W4A4_MXFP4": 0.122, "W4A8_MXFP": 0.122, "W4A16_MXFP4": 0.122}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Convert with a recipe, once: the model, and the checkpoint."""
    folders = {}
    source = short_model(tmp_path_factory.mktemp("mx") / "model")

    def convert(recipe, mixture=False):
        if (recipe, mixture) not in folders:
            model = DATA / "model_moe" if mixture else source
            out = tmp_path_factory.mktemp("mx") / "out"
            commands.quantize(commands.plan(RECIPES / f"{recipe}.yaml", model=str(model), out=out))
            folders[recipe, mixture] = model, out
        return folders[recipe, mixture]

    return convert


def fp4(packed):
    """w4a16_mxfp4.py:36-47."""
    table = torch.tensor([*NUMBERS, *(-number for number in NUMBERS)])
    low, high = packed & 0x0F, packed // 16
    return table[torch.stack([low, high], -1).reshape(*packed.shape[:-1], -1).long()]


def power(exponents):
    return torch.ldexp(torch.ones(()), exponents.float() - 127)


def registered(label, n, k):
    """get_weight and get_pergroup_param of a linear: shapes and dtypes."""
    groups = -(-k // GROUP) if label in {"W8A8_MXFP8", "W4A4_MXFP4"} else k // GROUP
    weight = ((n, k), torch.float8_e4m3fn) if label == "W8A8_MXFP8" else ((n, k // 2), torch.uint8)
    return {"weight": weight, "weight_scale": ((n, groups), torch.uint8)}


def loaded(label, weight, scale):
    """process_weights_after_loading of a linear: [k, n] or [k / 2, n], and [k / 64, n, 2]."""
    n, groups = scale.shape
    if label in {"W8A8_MXFP8", "W4A4_MXFP4"} and groups % 2:
        scale = torch.nn.functional.pad(scale, (0, 1))
    return weight.transpose(0, 1), scale.reshape(n, -1, 2).transpose(0, 1)


def kernel_weight(label, weight, scale, k):
    """The float weight [n, k] that the product has, from what is there after loading."""
    weight, n = weight.transpose(0, 1), weight.shape[1]
    values = weight.float() if label == "W8A8_MXFP8" else fp4(weight)
    return values * power(scale.transpose(0, 1).reshape(n, -1)).repeat_interleave(GROUP, 1)[:, :k]


def read(folder):
    """Weights by module, as verification reads them."""
    checkpoint = open_checkpoint(folder)
    found = {}
    for name, module in target_of(checkpoint).open_stored(checkpoint).modules.items():
        with ModuleReader(module) as reader:
            found[name] = reader.weight(0, module.shape[0]).clone()
    return found


@pytest.mark.parametrize(
    ("recipe", "label"), [("mxfp4", "W4A4_MXFP4"), ("mxfp4_fp8", "W4A8_MXFP"), ("mxfp8", "W8A8_MXFP8")]
)
def test_linears_are_what_the_engine_registers(made, recipe, label):
    model, out = made(recipe)
    source, stored, decoded = tensors(model), tensors(out), read(out)
    table = json.loads((out / DESCRIPTION).read_text())
    assert (table["group_size"], table["model_quant_type"]) == (GROUP, label)
    names = [name for name, value in table.items() if value == label and name.endswith(".weight")]
    assert len(names) == 14
    lost = signal = 0.0
    for name in (name.removesuffix(".weight") for name in names):
        n, k = source[f"{name}.weight"].shape
        own = {key[len(name) + 1 :]: t for key, t in stored.items() if key.startswith(f"{name}.")}
        assert {s: (tuple(t.shape), t.dtype) for s, t in own.items()} == registered(label, n, k)
        after = loaded(label, own["weight"], own["weight_scale"])
        assert after[1].shape == (k // 64, n, 2)
        weight = kernel_weight(label, *after, k)
        assert torch.equal(weight, decoded[name])
        lost += float((weight - source[f"{name}.weight"].float()).double().square().sum())
        signal += float(source[f"{name}.weight"].double().square().sum())
    assert (lost / signal) ** 0.5 < ERRORS[label]


@pytest.mark.parametrize(
    ("recipe", "label", "others"),
    [
        ("mxfp4", "W4A4_MXFP4", "W4A4_MXFP4"),
        ("mxfp4_fp8", "W4A8_MXFP", "W4A8_MXFP"),
        ("mxfp4a16_moe", "W4A16_MXFP4", "W8A8_MXFP8"),
    ],
)
def test_experts_are_what_the_engine_registers(made, recipe, label, others):
    """get_weight and get_dynamic_quant_param: w13 [E, 2 I, H / 2], w2 [E, H, I / 2]; so are scales."""
    model, out = made(recipe, mixture=True)
    source, stored, decoded = tensors(model), tensors(out), read(out)
    table = json.loads((out / DESCRIPTION).read_text())
    assert others in LINEARS
    assert table["group_size"] == GROUP
    assert {value for name, value in table.items() if str(name).endswith("q_proj.weight")} == {others}
    for layer in range(2):
        base = EXPERTS.format(layer)

        def fused(suffix, projections, base=base):
            each = [
                torch.cat([stored[f"{base}.{e}.{p}.{suffix}"] for p in projections]) for e in range(8)
            ]
            return torch.stack(each)

        for projections in (("gate_proj", "up_proj"), ("down_proj",)):
            weight, scale = fused("weight", projections), fused("weight_scale", projections)
            whole = torch.stack(
                [
                    torch.cat([source[f"{base}.{e}.{p}.weight"] for p in projections]).float()
                    for e in range(8)
                ]
            )
            count, n, k = whole.shape
            assert (weight.dtype, weight.shape) == (torch.uint8, (count, n, k // 2))
            assert (scale.dtype, scale.shape) == (torch.uint8, (count, n, k // GROUP))
            if label == "W4A16_MXFP4":
                # w4a16_mxfp4.py:145-161: decoded, then [E, k, n], [E, k / 32, n]
                codes, scales = fp4(weight).transpose(1, 2), scale.transpose(1, 2).contiguous()
                value = (codes * power(scales).repeat_interleave(GROUP, 1)).transpose(1, 2)
            else:  # w4a4_mxfp4.py:218-231, w4a8_mxfp4.py:191-203: [E, k / 64, n, 2]
                scales = scale.reshape(count, n, k // GROUP // 2, 2).transpose(1, 2)
                flat = scales.transpose(1, 2).reshape(count, n, -1)
                value = fp4(weight) * power(flat).repeat_interleave(GROUP, -1)
            error = float((value - whole).norm() / whole.norm())
            assert 0.10 < error < ERRORS[label]
            for e in range(8):
                read_back = torch.cat([decoded[f"{base}.{e}.{p}"] for p in projections])
                assert torch.equal(read_back, value[e])


def test_a_bias_is_kept_for_the_engine(made, tmp_path):
    """w4a4_mxfp4.py:91-92 casts it to float32; the parameter is in the serving dtype."""
    out = tmp_path / "out"
    model = DATA / "model_qwen2"
    commands.quantize(commands.plan(RECIPES / "mxfp4.yaml", model=str(model), out=out))
    before, after = tensors(model), tensors(out)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
    table = json.loads((out / DESCRIPTION).read_text())
    assert (table[f"{name}.weight"], table[f"{name}.bias"]) == ("W4A4_MXFP4", "FLOAT")
