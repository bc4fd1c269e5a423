"""Int4 experts for vLLM-Ascend: the reference's packing and description, and the engine's sums."""

import json
import re
from functools import cache

import pytest
import torch

from quantcli.commands import quantize as commands
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.ascend.target import Ascend
from tests.golden.short import DATA, DESCRIPTION, assemble, tensors
from tests.golden.test_ascend import RECIPES

TARGET = Ascend()
W4A8 = discover(Scheme)["w4a8"](group_size="channel", clip="none")
FEW = ("calibration.samples=4", "calibration.length=32")


def halves(packed):
    """Codes [n, k] of bytes [n / 2, k], byte by byte."""
    rows = []
    for row in packed.tolist():
        for shift in (0, 4):
            nibbles = [(octet & 255) >> shift & 15 for octet in row]
            rows.append([nibble - 16 if nibble > 7 else nibble for nibble in nibbles])
    return torch.tensor(rows, dtype=torch.int8)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The reference producer's, of a dense model, which no engine loads."""
    return tensors(assemble("w4a8_dynamic", tmp_path_factory.mktemp("w4a8") / "reference"))


def modules(table):
    return sorted(name.removesuffix(".scale_bias") for name in table if name.endswith(".scale_bias"))


def test_the_reference_is_packed_like_this(reference):
    """Its codes and scales give its bytes, and every slice of its scale_bias, exactly."""
    assert len(modules(reference)) == 14
    shapes = set()
    for name in modules(reference):
        stored = {suffix: reference[f"{name}.{suffix}"] for suffix in
                  ("weight", "weight_scale", "weight_offset", "scale_bias")}  # fmt: skip
        codes = halves(stored["weight"])
        parts = {"weight": codes, "weight_scale": stored["weight_scale"].bfloat16()}
        packed = TARGET.pack_module(name, W4A8.numerics, parts, tuple(codes.shape))
        assert packed.keys() == stored.keys()
        for suffix, tensor in stored.items():
            assert packed[suffix].dtype == tensor.dtype, (name, suffix)
            assert torch.equal(packed[suffix], tensor), (name, suffix)
        assert torch.equal(TARGET.unpack(W4A8.numerics, stored)["weight"], codes)
        shapes.add((name.rpartition(".")[2], packed["scale_bias"].shape[1]))
    ones = {(f"{name}_proj", 1) for name in ("q", "k", "v", "gate", "up")}
    assert shapes == ones | {("o_proj", 16), ("down_proj", 16)}


def test_codes_are_neighbours_of_the_references(reference):
    source = tensors(DATA / "model")
    for name in modules(reference):
        parts = W4A8.quantize(source[f"{name}.weight"], torch.bfloat16)
        assert bool((parts["weight_scale"] > 0).all())
        ratio = parts["weight_scale"] / reference[f"{name}.weight_scale"]
        assert float((ratio - 1).abs().max()) <= 2**-7
        distance = parts["weight"].int() - halves(reference[f"{name}.weight"]).int()
        assert int(distance.abs().max()) <= 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a recipe makes of a small mixture of experts: the description and the tensors."""

    @cache
    def make(recipe):
        out = tmp_path_factory.mktemp(recipe) / "out"
        path, model = RECIPES / f"{recipe}.yaml", str(DATA / "model_moe")
        commands.quantize(commands.plan(path, model=model, out=out, overrides=FEW))
        return json.loads((out / DESCRIPTION).read_text()), tensors(out)

    return make


@pytest.mark.parametrize("recipe", ["w4a8_moe", "w4a16_moe"])
def test_the_description_is_the_references_but_for_experts(made, recipe):
    table, ours = made(recipe)
    expected = json.loads((DATA / "moe_w8a8_dynamic" / DESCRIPTION).read_text())
    if recipe == "w4a8_moe":
        experts = {k: "W4A8_DYNAMIC" for k in expected if ".experts." in k}
        biases = {k.replace("weight_offset", "scale_bias"): v for k, v in experts.items()
                  if "offset" in k}  # fmt: skip
        expected |= experts | biases
    else:
        expected = {
            key.replace(".weight", ".weight_packed")
            if ".experts." in key and key.endswith(".weight")
            else key.replace("weight_offset", "weight_shape") if ".experts." in key else key: value
            for key, value in expected.items()
        }  # fmt: skip
        named = {k: "W4A16" if ".experts." in k else v for k, v in expected.items()}
        expected = {k: "W8A16" if v == "W8A8_DYNAMIC" else v for k, v in named.items()}
        expected |= {"group_size": 32, "model_quant_type": "W8A16"}
    assert table == expected
    assert table["version"] == "1.0.0"
    assert {name for name in table if name in ours} == ours.keys()


def as_loaded(tensors_of_layer, names, ranks, rank):
    """Codes [k, n] as eight to an int32, scale_bias [n] and scale [n] of one device, as the engine has
    them after loading."""
    packed, scale, bias = [], [], []
    for name in names:
        part = {s: tensors_of_layer[f"{name}.{s}"] for s in ("weight", "weight_scale", "scale_bias")}
        down = name.endswith("down_proj")
        if down:  # inputs are split, and slices with them
            part["weight"] = part["weight"].chunk(ranks, 1)[rank]
            part["scale_bias"] = part["scale_bias"].chunk(ranks, 1)[rank]
        else:
            part = {s: t.chunk(ranks, 0)[rank] for s, t in part.items()}
        packed.append(part["weight"])
        scale.append(part["weight_scale"])
        bias.append(part["scale_bias"])
    weight = torch.cat(packed).T.contiguous().view(torch.int32)
    bits = torch.cat(scale).T.contiguous().view(torch.int32).to(torch.int64)
    return weight, torch.cat(bias).T.contiguous().sum(0), bits


def kernel(x, weight, bias, bits):
    """y [m, n] of int8 inputs [m, k] by int4 products of their halves, in float64."""
    codes = torch.stack([weight << (28 - 4 * j) >> 28 for j in range(8)], -1).flatten(1).double()
    scale = bits.to(torch.int32).view(torch.float32).double()
    high, low = x >> 4, (x & 15) - 8
    return (16 * high.double() @ codes + low.double() @ codes) * scale + bias.double()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_engines_split_of_inputs_comes_to_the_plain_product(made, ranks):
    _, ours = made("w4a8_moe")
    layer = "model.layers.1.mlp.experts.5"
    for names in (["gate_proj", "up_proj"], ["down_proj"]):
        names = [f"{layer}.{name}" for name in names]
        codes = torch.cat([halves(ours[f"{name}.weight"]) for name in names]).double()
        scales = torch.cat([ours[f"{name}.weight_scale"] for name in names]).double()
        generator = torch.Generator().manual_seed(3)
        x = torch.randint(-127, 128, (9, codes.shape[1]), generator=generator, dtype=torch.int32)
        exact = x.double() @ (codes * scales).T
        if len(names) == 1:
            parts = [kernel(part, *as_loaded(ours, names, ranks, rank))
                     for rank, part in enumerate(x.chunk(ranks, 1))]  # fmt: skip
            found = sum(parts)
        else:
            split = [kernel(x, *as_loaded(ours, names, ranks, rank)) for rank in range(ranks)]
            halved = [each.chunk(2, 1) for each in split]  # gate and up of each device
            found = torch.cat([each[side] for side in (0, 1) for each in halved], 1)
        assert float((found - exact).abs().max()) < 1e-6 * float(exact.abs().max())


def test_the_engine_unpacks_the_codes_that_were_chosen(made):
    _, ours = made("w4a16_moe")
    source = tensors(DATA / "model_moe")
    names = [name for name in ours if name.endswith(".weight_packed")]
    assert len(names) == 48
    lost = kept = 0.0
    for name in names:
        module, packed = name.removesuffix(".weight_packed"), ours[name]
        n, k = source[f"{module}.weight"].shape
        codes = torch.zeros(n, k)
        for place in range(8):
            codes[:, place::8] = ((packed >> (4 * place)) & 15) - 8
        scale = ours[f"{module}.weight_scale"]
        assert (scale.dtype, scale.shape) == (torch.bfloat16, (n, k // 32))
        assert ours[f"{module}.weight_shape"].tolist() == [n, k]
        weight = codes * scale.float().repeat_interleave(32, 1)
        lost += float((weight - source[f"{module}.weight"].float()).square().sum())
        kept += float(source[f"{module}.weight"].float().square().sum())
    assert (lost / kept) ** 0.5 < 0.16


def test_one_checkpoint_for_two_engines(tmp_path):
    """What vLLM-Ascend asks of compressed-tensors, and what it makes of the codes when it loads them.

    Source: vllm-ascend 182b75ea84, quantization/compressed_tensors_config.py:386-421 and
    quantization/methods/w4a8.py:385-410.
    """
    out, recipe = tmp_path / "out", RECIPES / "vllm_w4a8_moe.yaml"
    model = str(DATA / "model_moe")
    commands.quantize(commands.plan(recipe, model=model, out=out, overrides=FEW))
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block["format"] == "int-quantized"
    groups = {group["weights"]["num_bits"]: group for group in block["config_groups"].values()}
    assert set(groups) == {4, 8}
    for bits, group in groups.items():
        assert group["format"] == "int-quantized"
        weights, inputs = group["weights"], group["input_activations"]
        assert (weights["strategy"], weights["symmetric"], weights["dynamic"]) == (
            "channel",
            True,
            False,
        )
        assert not weights.get("group_size")
        assert (inputs["num_bits"], inputs["strategy"]) == (8, "token")
        assert (inputs["symmetric"], inputs["dynamic"]) == (True, True)
        matched = [bool(re.search(r"experts", target)) for target in group["targets"]]
        assert set(matched) == {bits == 4}
    ours = tensors(out)
    names = [n.removesuffix(".weight") for n in ours if ".experts." in n and n.endswith(".weight")]
    assert len(names) == 48
    for name in names:
        codes, scale = ours[f"{name}.weight"], ours[f"{name}.weight_scale"]
        assert (codes.dtype, int(codes.min()) >= -8, int(codes.max()) <= 7) == (torch.int8, True, True)
        assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (len(codes), 1))
        assert bool((scale > 0).all())
        stored = TARGET.pack_module(
            name, W4A8.numerics, {"weight": codes, "weight_scale": scale}, tuple(codes.shape)
        )
        turned = codes.T.contiguous()  # the engine packs neighbours of the last dimension then
        packed = (turned[:, 1::2] << 4) | (turned[:, 0::2] & 15)
        assert torch.equal(packed, stored["weight"].T)
        bias = 8 * (turned.float() * scale.float().T).sum(0)
        assert torch.allclose(bias, stored["scale_bias"].sum(1), rtol=1e-5, atol=1e-5)
