"""What the compressed-tensors target refuses and writes, against what vLLM registers."""

import json
import re

import numpy as np
import pytest
import torch

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype, torch_dtype
from quantcli.core.codes import pack_signed, unpack_signed
from quantcli.core.errors import InputError
from quantcli.core.numerics import Module, Numerics, Operand
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.base import PlannedCheckpoint
from quantcli.targets.compressed_tensors.config import read_groups
from quantcli.targets.compressed_tensors.kinds import arguments
from quantcli.targets.compressed_tensors.layouts import (
    layout_of,
    unpack_columns,
)
from quantcli.targets.compressed_tensors.target import CompressedTensors
from quantcli.targets.names import fold
from tests.measured import maxima

TARGET = CompressedTensors()
L = "model.layers.0"


def scheme(name, **options):
    return discover(Scheme)[name](**options)


SCHEMES = {
    "int8 W8A8 dynamic": scheme("w8a8_dynamic"),
    "int8 W8A8 static": scheme("w8a8_static", symmetric=True),
    "int8 W8A8 static asymmetric": scheme("w8a8_static"),
    "fp8 channel dynamic": scheme("fp8_dynamic"),
    "fp8 tensor static": scheme("fp8_static"),
    "fp8 tensor dynamic": scheme("fp8_tensor"),
    "fp8 block 128x128": scheme("fp8_block"),
    "mxfp8": scheme("mxfp8"),
    "mxfp8 float inputs": scheme("mxfp8", inputs="float"),
    "nvfp4": scheme("nvfp4"),
    "nvfp4 float inputs": scheme("nvfp4a16"),
    "mxfp4": scheme("mxfp4"),
    "mxfp4 float inputs": scheme("mxfp4a16"),
    "mxfp4 fp8 inputs": scheme("mxfp4_fp8", inputs="token"),
    "mxfp4 fp8 inputs in groups": scheme("mxfp4_fp8", inputs="groups"),
    "int8 channel W8A16": scheme("w8a16"),
    "int4 g128 W4A16": scheme("w4a16"),
    "int4 g32 W4A16": scheme("w4a16", group_size=32),
    "int4 channel W4A16": scheme("w4a16", group_size="channel"),
    "int8 g64 W8A16": scheme("w8a16", group_size=64),
    "int4 g32 W4A16 asymmetric": scheme("w4a16", group_size=32, symmetric=False),
    "int4 channel W4A16 asymmetric": scheme("w4a16", group_size="channel", symmetric=False),
    "int4 g64 W4A8": scheme("w4a8", group_size=64),
    "int4 channel W4A8": scheme("w4a8", group_size="channel"),
}
# suffix -> dtype and shape, of a weight of 200 x 256 served in bfloat16
N, K = 200, 256
SCALE = {"weight_scale": ("F32", (N, 1))}
INPUT = {"input_scale": ("F32", (1,))}
CODES = {"weight": ("I8", (N, K))}
PACKED = {"weight_packed": ("I32", (N, K // 8)), "weight_shape": ("I64", (2,))}
FP8 = {"weight": ("F8_E4M3", (N, K))}
FP4 = {"weight_packed": ("U8", (N, K // 2))}
NVFP4_TENSORS = FP4 | {"weight_scale": ("F8_E4M3", (N, 16)), "weight_global_scale": ("F32", (1,))}
MXFP4_TENSORS = FP4 | {"weight_scale": ("U8", (N, 8))}
WANTED = {
    "int8 W8A8 dynamic": CODES | SCALE,
    "int8 W8A8 static": CODES | SCALE | INPUT,
    "int8 W8A8 static asymmetric": CODES | SCALE | INPUT | {"input_zero_point": ("I8", (1,))},
    "fp8 channel dynamic": FP8 | SCALE,
    "fp8 tensor static": FP8 | {"weight_scale": ("F32", (1,))} | INPUT,
    "fp8 tensor dynamic": FP8 | {"weight_scale": ("F32", (1,))},
    "fp8 block 128x128": FP8 | {"weight_scale": ("F32", (2, 2))},
    "mxfp8": FP8 | {"weight_scale": ("U8", (N, 8))},
    "mxfp8 float inputs": FP8 | {"weight_scale": ("U8", (N, 8))},
    "nvfp4": NVFP4_TENSORS | {"input_global_scale": ("F32", (1,))},
    "nvfp4 float inputs": NVFP4_TENSORS,
    "mxfp4": MXFP4_TENSORS,
    "mxfp4 float inputs": MXFP4_TENSORS,
    "mxfp4 fp8 inputs": MXFP4_TENSORS,
    "mxfp4 fp8 inputs in groups": MXFP4_TENSORS,
    "int8 channel W8A16": {"weight_packed": ("I32", (N, K // 4)), "weight_shape": ("I64", (2,)),
                           "weight_scale": ("BF16", (N, 1))},
    "int4 g128 W4A16": PACKED | {"weight_scale": ("BF16", (N, 2))},
    "int4 g32 W4A16": PACKED | {"weight_scale": ("BF16", (N, 8))},
    "int4 channel W4A16": PACKED | {"weight_scale": ("BF16", (N, 1))},
    "int8 g64 W8A16": {"weight_packed": ("I32", (N, K // 4)), "weight_shape": ("I64", (2,)),
                       "weight_scale": ("BF16", (N, 4))},
    "int4 g32 W4A16 asymmetric": PACKED | {"weight_scale": ("BF16", (N, 8)),
                                           "weight_zero_point": ("I32", (N // 8, 8))},
    "int4 channel W4A16 asymmetric": PACKED | {"weight_scale": ("BF16", (N, 1)),
                                               "weight_zero_point": ("I32", (N // 8, 1))},
    "int4 g64 W4A8": CODES | {"weight_scale": ("BF16", (N, 4))},
    "int4 channel W4A8": CODES | {"weight_scale": ("BF16", (N, 1))},
}  # fmt: skip


def made(found, weight):
    """The parts of a weight, its scale as the engine holds it, and what is packed of them."""
    held = TARGET.engine_dtype(found.numerics, "weight_scale", "BF16")
    stats = dict(found.blank(weight.shape[1], torch.float32))
    if "input_scale" in stats:
        stats["input_scale"] = torch.tensor([0.037109375])
    if "input_offset" in stats:
        symmetric = found.numerics.input.symmetric
        stats["input_offset"] = torch.tensor([0.0 if symmetric else -37.0])
    constants = found.constants(stats, torch.float32)
    constants |= maxima(found, weight)
    dtype = torch_dtype(held)
    parts = found.quantize(weight, dtype, constants)
    parts["weight_scale"] = parts["weight_scale"].to(dtype)
    return parts, TARGET.pack(found.numerics, parts, tuple(weight.shape))


@pytest.fixture(scope="module")
def weight():
    torch.manual_seed(0)
    return torch.randn(N, K).bfloat16() * 0.02


@pytest.mark.parametrize("label", SCHEMES)
def test_tensors_as_the_engine_registers_them(label, weight):
    found = SCHEMES[label]
    assert TARGET.label(found.numerics) == label
    parts, stored = made(found, weight)
    specs = {s: (safetensors_dtype(t.dtype), tuple(t.shape)) for s, t in stored.items()}
    assert specs == WANTED[label]
    back = TARGET.unpack(found.numerics, stored)
    for name, tensor in back.items():
        same = parts[name].float() if name != "weight" else parts[name]
        assert torch.equal(tensor.float(), same.float().reshape(tensor.shape)), name
    parts["weight_scale"] = parts["weight_scale"].float()
    assert torch.equal(found.dequantize(back), found.dequantize(parts))
    layout = layout_of(found.numerics, TARGET._kind(found.numerics))
    params = {param.suffix: param for param in layout.params}
    assert params.keys() == stored.keys()
    for suffix, tensor in stored.items():
        assert params[suffix].fits(tuple(tensor.shape), N, K)
        assert safetensors_dtype(tensor.dtype) in params[suffix].dtypes


@pytest.mark.parametrize("label", SCHEMES)
def test_a_scheme_is_found_by_its_numerics(label):
    wanted = SCHEMES[label].numerics
    found = [s for cls in discover(Scheme).values() if (s := cls.for_numerics(wanted))]
    assert [s.numerics for s in found] == [wanted]


def test_labels_are_unique_and_load_somewhere():
    labels = [TARGET.label(found.numerics) for found in SCHEMES.values()]
    assert len(set(labels)) == len(SCHEMES)
    for label in labels:
        assert "vLLM" in TARGET.loads_on(label)
    assert "Atlas" in TARGET.loads_on("int8 W8A8 dynamic")
    assert "Ascend" not in TARGET.loads_on("int8 W8A8 static")
    assert "humming" in TARGET.loads_on("mxfp4 fp8 inputs in groups")
    assert "round inputs, too" in TARGET.loads_on("mxfp4 float inputs")


@pytest.mark.parametrize(
    ("label", "note"),
    [
        ("mxfp4", None),
        ("mxfp4 float inputs", "stay float in this run"),
        ("mxfp4 fp8 inputs", "fp8, as by the package humming"),
        ("mxfp4 fp8 inputs in groups", "fp8, as by the package humming"),
        ("mxfp8", "inputs of mxfp8 stay float"),
        ("nvfp4 float inputs", None),
    ],
)
def test_kernels_that_round_other_inputs_are_named(label, note):
    found = TARGET.unlike_kernels(SCHEMES[label].numerics)
    assert found is None if note is None else note in found


@pytest.mark.parametrize(
    "numerics",
    [
        scheme("w4a4_dynamic").numerics,
        scheme("w8a8_mix").numerics,
        Numerics(Operand("int8", "tensor"), Operand("int8", "token", dynamic=True)),
        Numerics(Operand("int4", "channel", symmetric=False), Operand("int8", "token", dynamic=True)),
    ],
)
def test_what_it_cannot_store(numerics):
    with pytest.raises(InputError, match="cannot store int"):
        TARGET.label(numerics)


def test_codes_of_four_bits_by_hand():
    codes = torch.tensor([[-8, -7, -1, 0, 1, 5, 6, 7]], dtype=torch.int8)
    packed = pack_signed(codes, 4)
    assert packed.view(torch.uint8).tolist() == [[0x10, 0x87, 0xD9, 0xFE]]
    assert packed.tolist() == [[int(np.uint32(0xFED98710).astype(np.int32))]]
    assert torch.equal(unpack_signed(packed, 4, 8), codes)
    assert torch.equal(unpack_signed(packed, 4, 5), codes[:, :5])


def test_codes_of_eight_bits_by_hand():
    codes = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    packed = pack_signed(codes, 8)
    assert packed.view(torch.uint8).tolist() == [[0, 127, 128, 255]]
    assert torch.equal(unpack_signed(packed, 8, 4), codes)


def test_zero_points_stand_along_rows():
    packed = torch.tensor([[0x76543210, 0x7FFFFFFF], [0x98, 0]], dtype=torch.int32)
    zero = unpack_columns(packed, 4, 10)
    assert zero.shape == (10, 2)
    assert zero[:, 0].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1]


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_by_another_way(bits):
    torch.manual_seed(bits)
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (5, 64), dtype=torch.int8)
    words = np.zeros((5, 64 * bits // 32), np.uint32)
    for row in range(5):
        for i, code in enumerate(codes[row].tolist()):
            words[row, i * bits // 32] |= np.uint32((code - low) << (i * bits % 32))
    assert np.array_equal(pack_signed(codes, bits).numpy().view(np.uint32), words)
    assert torch.equal(unpack_signed(pack_signed(codes, bits), bits, 64), codes)


# -- what is refused ---------------------------------------------------------------------------------

INT8, STATIC = SCHEMES["int8 W8A8 dynamic"].numerics, SCHEMES["int8 W8A8 static asymmetric"].numerics
BLOCK, GROUPS = SCHEMES["fp8 block 128x128"].numerics, SCHEMES["int4 g128 W4A16"].numerics
CHANNEL4 = SCHEMES["int4 channel W4A16"].numerics


def refusals(*modules):
    built = [Module(name, shape, numerics) for name, shape, numerics in modules]
    specs = {f"{m.name}.weight": TensorSpec(f"{m.name}.weight", "BF16", m.shape) for m in built}
    return [*TARGET.check_tensors(specs), *TARGET.check(built)]


SQUARE = (256, 256)
REFUSED = {
    "q alone": ([(f"{L}.mlp.q_proj", SQUARE, INT8), (f"{L}.mlp.k_proj", SQUARE, None)], "fuses"),
    "up static": ([(f"{L}.gate_proj", SQUARE, INT8), (f"{L}.up_proj", SQUARE, STATIC)], "fuses"),
    "router": ([(f"{L}.mlp.gate", SQUARE, INT8)], "routers as float"),
    "router of Gemma 4": ([("model.layers.0.router.proj", SQUARE, INT8)], "routers as float"),
    "draft layer": ([(f"{L}.eh_proj", SQUARE, INT8)], "eh_proj of draft layers as float"),
    "indexer": ([(f"{L}.self_attn.indexer.weights_proj", SQUARE, INT8)], "indexer as float"),
    "indexer wk": ([(f"{L}.self_attn.indexer.wk", SQUARE, INT8)], "indexer as float"),
    "embedding": ([("model.embed_tokens", SQUARE, GROUPS)], "no quantized embedding"),
    "static experts": ([(f"{L}.mlp.experts.0.up_proj", SQUARE, STATIC)], "no int8 W8A8 static"),
    "fp8_tensor experts": (
        [(f"{L}.mlp.experts.0.up_proj", SQUARE, SCHEMES["fp8 tensor dynamic"].numerics)],
        "no fp8 tensor dynamic"
    ),
    "experts of two kinds": (
        [(f"{L}.mlp.experts.0.up_proj", SQUARE, INT8), (f"{L}.mlp.experts.1.up_proj", SQUARE, GROUPS)],
        "experts of one layer",
    ),
    "groups do not divide": ([(f"{L}.self_attn.o_proj", (256, 192), GROUPS)], "groups of 128"),
    "mx groups": ([(f"{L}.self_attn.o_proj", (256, 80), SCHEMES["mxfp8"].numerics)], "groups of 32"),
    "nvfp4 groups": (
        [(f"{L}.self_attn.o_proj", (256, 40), SCHEMES["nvfp4"].numerics)], "groups of 16 columns"
    ),
    "groups of inputs": (
        [(f"{L}.self_attn.o_proj", (256, 96), SCHEMES["mxfp4 fp8 inputs in groups"].numerics)],
        "groups of 128 inputs do not divide 96",
    ),
    "an identity matrix against a measured scale": (
        [(f"{L}.self_attn.kv_b_proj", SQUARE, SCHEMES["nvfp4"].numerics)], "decodes kv_b_proj"
    ),
    "nibbles left over": ([(f"{L}.self_attn.o_proj", (256, 36), CHANNEL4)], "packs 8 columns"),
    "block cut by a sibling": (
        [(f"{L}.attn.{p}_proj", (n, 256), BLOCK) for p, n in (("q", 256), ("k", 64), ("v", 64))],
        "its 64 rows are not a multiple of 128",
    ),
    "merged halves": ([(f"{L}.mlp.gate_up_proj", (384, 256), BLOCK)], "two projections of 192"),
    "narrow experts": (
        [(f"{L}.mlp.experts.0.{p}_proj", s, BLOCK) for p, s in
         (("gate", (192, 256)), ("up", (192, 256)), ("down", (256, 192)))], "this one is 192"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    modules, word = REFUSED[case]
    found = refusals(*modules)
    assert any(word in refusal.what for refusal in found), found
    assert all(refusal.fix for refusal in found)


@pytest.mark.parametrize("label", ["nvfp4 float inputs", "mxfp4", "mxfp4 fp8 inputs", "mxfp8"])
def test_small_scales_that_are_taken(label):
    """Experts, and kv_b_proj if nothing is measured; groups of theirs are what kernels take."""
    numerics = SCHEMES[label].numerics
    names = (f"{L}.mlp.experts.0.up_proj", f"{L}.self_attn.kv_b_proj")
    assert refusals(*((name, SQUARE, numerics) for name in names)) == []
    assert list(TARGET.advise([Module(names[0], SQUARE, numerics)])) == []


def test_a_stored_divisor_is_one_over_the_multiplier(weight):
    """448 * 6 over the largest weight, and both directions are exact."""
    torch.manual_seed(1)
    for factor in torch.rand(20).tolist():
        parts, stored = made(SCHEMES["nvfp4"], (weight.float() * factor).bfloat16())
        amax = (weight.float() * factor).bfloat16().float().abs().max()
        divisor = stored["weight_global_scale"]
        assert float(divisor * amax) == pytest.approx(448 * 6, rel=1e-6)
        back = TARGET.unpack(SCHEMES["nvfp4"].numerics, stored)
        for name in ("weight_global_scale", "input_global_scale"):
            assert torch.equal(back[name], parts[name])
            assert torch.equal(1 / back[name], stored[name])


def test_what_may_be_odd():
    last = [
        (f"{L}.self_attn.{p}_proj", (n, 256), BLOCK) for p, n in (("q", 256), ("k", 128), ("v", 64))
    ]
    experts = [(f"{L}.mlp.experts.0.{p}_proj", s, BLOCK) for p, s in
               (("gate", (256, 200)), ("up", (256, 200)), ("down", (200, 256)))]  # fmt: skip
    assert refusals(*last, *experts, (f"{L}.self_attn.o_proj", (200, 200), BLOCK)) == []


def test_what_the_engine_merges():
    assert TARGET.fused_name(f"{L}.self_attn.k_proj") == f"{L}.self_attn.q_proj+k_proj+v_proj"
    assert TARGET.fused_name(f"{L}.mlp.experts.3.w3") == f"{L}.mlp.experts.3.w1+w3"
    assert TARGET.fused_name(f"{L}.mlp.down_proj") is None


# -- config.json -------------------------------------------------------------------------------------


def configured(modules, tied=False):
    specs = {f"{m.name}.weight": TensorSpec(f"{m.name}.weight", "BF16", m.shape) for m in modules}
    if tied:
        specs["model.embed_tokens.weight"] = TensorSpec("model.embed_tokens.weight", "BF16", (8, 8))
    config = Settings({"dtype": "bfloat16"})
    output = PlannedCheckpoint(modules, specs, dict.fromkeys(specs, "f"), config, "BF16")
    return json.loads(TARGET.sidecars(output)["config.json"])["quantization_config"]


def module(name, numerics=None, shape=(8, 8)):
    return Module(name, shape, numerics)


def test_one_scheme_is_for_all_linears_but_those_in_ignore():
    modules = [module(f"{L}.self_attn.{p}_proj", INT8) for p in "qkvo"]
    modules += [module(f"{L}.mlp.gate"), module("model.norm", shape=(8,)), module("model.embed_tokens")]
    block = configured(modules, tied=True)
    assert block["format"] == "int-quantized"
    (group,) = block["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True,
                                "dynamic": False}  # fmt: skip
    assert group["input_activations"] == {"num_bits": 8, "type": "int", "strategy": "token",
                                          "symmetric": True, "dynamic": True}  # fmt: skip
    assert block["ignore"] == [f"{L}.mlp.gate", "lm_head"]


def test_stacked_experts_of_another_name_are_float_in_every_engine():
    """Engines look up `block_sparse_moe.experts.0.gate_proj`, whatever the names of the tensors."""
    layers = [f"model.layers.{i}" for i in range(2)]
    modules = [module(f"{layer}.self_attn.o_proj", INT8) for layer in layers]
    modules += [module(f"{layer}.block_sparse_moe.input_linear", shape=(4, 8, 8)) for layer in layers]
    modules += [module(f"{layer}.conv1d", shape=(8, 1, 4)) for layer in layers]
    assert configured(modules, tied=True)["ignore"] == [
        *(f"{layer}.block_sparse_moe.experts" for layer in layers),
        "lm_head",
        r"re:(?:.*\.)?layers\.[0-9]+\.block_sparse_moe\.experts\..+",
    ]


def test_the_tied_head_of_whisper_has_its_own_name():
    modules = [module("model.decoder.layers.0.fc1", INT8)]
    modules += [module("model.encoder.conv1", shape=(8, 8, 3))]
    assert configured(modules, tied=True)["ignore"][:2] == ["lm_head", "proj_out"]


def test_a_quantized_head_is_named():
    (group,) = configured([module(f"{L}.mlp.up_proj", INT8), module("lm_head", INT8)])[
        "config_groups"
    ].values()
    assert group["targets"] == ["Linear", "lm_head"]


def test_several_schemes_are_told_apart_by_names():
    attention = [f"{L}.self_attn.{p}_proj" for p in "qkv"]
    modules = [module(name, GROUPS) for name in attention] + [module(f"{L}.mlp.down_proj", BLOCK)]
    block = configured(modules)
    assert block["format"] == "mixed-precision"
    first, second = block["config_groups"].values()
    assert first["targets"] == attention
    assert second["targets"] == [f"{L}.mlp.down_proj"]
    assert (first["format"], second["format"]) == ("pack-quantized", "float-quantized")
    assert first["weights"]["group_size"] == 128
    assert first["input_activations"] is None
    assert second["weights"]["block_structure"] == [128, 128]
    assert second["input_activations"]["group_size"] == 128


def test_many_names_are_folded_and_still_apart():
    experts = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in range(20) for e in range(16)
               for p in ("gate", "up", "down")]  # fmt: skip
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(20) for p in "qkvo"]
    block = configured([*(module(n, INT8) for n in experts), *(module(n, GROUPS) for n in attention)])
    groups = [group["targets"] for group in block["config_groups"].values()]
    assert len(groups[0]) == 3
    assert groups[1] == attention
    for renamed in ("", "language_model."):  # engines rename prefixes of names, not of expressions
        for name in experts:
            assert sum(bool(re.match(t.removeprefix("re:"), renamed + name)) for t in groups[0]) == 1
    assert not any(re.match(t.removeprefix("re:"), name) for t in groups[0] for name in attention)


def test_folding_never_takes_others():
    mine = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(10) for e in range(100)]
    others = [f"model.layers.10.mlp.experts.{e}.up_proj" for e in range(100)]
    patterns = fold(mine, others)
    assert len(patterns) == 10
    for name in mine:
        assert sum(bool(re.match(p.removeprefix("re:"), name)) for p in patterns) == 1
    assert not any(re.match(p.removeprefix("re:"), name) for p in patterns for name in others)


def test_folding_keeps_names_that_nothing_tells_apart():
    mine = [f"model.layers.{i}.mlp.up_proj" for i in range(0, 2000, 2)]
    others = [f"model.layers.{i}.mlp.up_proj" for i in range(1, 2000, 2)]
    assert sorted(fold(mine, others)) == sorted(mine)
    tower = [f"model.visual.layers.{i}.mlp.up_proj" for i in range(3)]
    assert len(fold(mine, [])) == 1
    assert sorted(fold(mine, tower)) == sorted(mine)


# -- configs of other producers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format": ["int-quantized"]}, "has the format ['int-quantized']"),
        ({"weights": {"scale_dtype": [], "strategy": "channel"}}, "has scales of []"),
        ({"weights": {"strategy": ["channel"]}}, "has the strategy ['channel']"),
        ({"weights": {"type": {}}}, "has {} numbers of 8 bits"),
        ({"weights": {"actorder": True}}, "orders columns by activations (actorder True)"),
        ({"output_activations": {"num_bits": 8}}, "quantizes outputs"),
    ],
)
def test_a_group_of_wrong_types_is_a_finding(changes, what):
    """Values of any JSON type may stand for names; the group keeps its place without numerics."""
    table = {"targets": ["Linear"], "format": "int-quantized", "weights": {}} | changes
    config = read_groups(Settings({"config_groups": {"g": table}}))
    assert [finding.severity for finding in config.findings] == ["error"]
    assert f"`config_groups.g` {what}" in config.findings[0].what
    assert [(group.numerics, group.kind) for group in config.groups] == [(None, None)]


MXFP8 = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
         "scale_dtype": "torch.uint8"}  # fmt: skip


def grouped(weights, inputs, form="mxfp8-quantized"):
    """One group as it is read, and the texts of the findings."""
    table = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = read_groups(Settings({"format": form, "config_groups": {"g": table}}))
    (group,) = config.groups
    return group, [finding.what for finding in config.findings]


def test_the_arguments_that_are_written_are_read_as_the_same_numerics():
    for label, found in SCHEMES.items():
        form = TARGET._kind(found.numerics).format
        inputs = found.numerics.input
        group, findings = grouped(
            arguments(found.numerics.weight), arguments(inputs) if inputs else None, form
        )
        assert (group.numerics, findings) == (found.numerics, []), label


def test_arguments_of_mxfp8():
    numerics = SCHEMES["mxfp8"].numerics
    assert arguments(numerics.weight) == MXFP8 | {"dynamic": False}
    assert numerics.input is not None
    assert arguments(numerics.input) == MXFP8 | {"dynamic": True}


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "symmetric": True, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}  # fmt: skip
LOCAL = NVFP4 | {"dynamic": "local", "observer": "static_minmax"}
MXFP4 = MXFP8 | {"num_bits": 4}
FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
FP8_GROUPS = FP8_TOKEN | {"strategy": "group", "group_size": 128}
INT8_TOKEN = FP8_TOKEN | {"type": "int"}


@pytest.mark.parametrize(
    ("label", "weights", "inputs"),
    [
        ("nvfp4", NVFP4, LOCAL),
        ("nvfp4 float inputs", NVFP4, None),
        ("mxfp4", MXFP4 | {"dynamic": False}, MXFP4 | {"dynamic": True}),
        ("mxfp4 fp8 inputs", MXFP4 | {"dynamic": False}, FP8_TOKEN),
        ("mxfp4 fp8 inputs in groups", MXFP4 | {"dynamic": False}, FP8_GROUPS),
    ],
)
def test_arguments_of_small_scales(label, weights, inputs):
    """As llm-compressor writes them, without what counts for nothing."""
    numerics = SCHEMES[label].numerics
    assert arguments(numerics.weight) == weights
    assert (arguments(numerics.input) if numerics.input else None) == inputs
    assert TARGET._kind(numerics).format == f"{label[:5]}-pack-quantized"


NV, MX4, MX8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"


@pytest.mark.parametrize(
    ("weights", "inputs", "form", "label", "said"),
    [
        (MXFP8, MXFP8 | {"dynamic": True}, MX8, "mxfp8", None),
        (MXFP8 | {"dynamic": False}, None, MX8, "mxfp8 float inputs", None),
        (MXFP4, MXFP4 | {"dynamic": True}, MX4, "mxfp4", None),
        (MXFP4, None, MX4, "mxfp4 float inputs", None),
        (MXFP4, FP8_TOKEN, MX4, "mxfp4 fp8 inputs", None),
        (MXFP4, FP8_GROUPS, MX4, "mxfp4 fp8 inputs in groups", None),
        (NVFP4, LOCAL, NV, "nvfp4", None),
        (NVFP4, None, NV, "nvfp4 float inputs", None),
        # fields that producers leave out, or fill with what counts for nothing
        (
            NVFP4 | {"scale_dtype": None},
            LOCAL | {"zp_dtype": None, "actorder": None},
            NV,
            "nvfp4",
            None,
        ),
        (MXFP4 | {"scale_dtype": None, "observer_kwargs": {}}, None, MX4, "mxfp4 float inputs", None),
        (NVFP4, NVFP4 | {"dynamic": True}, NV, "nvfp4", None),
        # the engine takes no notice of these inputs, and of the name of the format
        (MXFP8, INT8_TOKEN, MX8, "mxfp8", None),
        (MXFP4, INT8_TOKEN, MX4, "mxfp4", None),
        (MXFP8, None, "float-quantized", "mxfp8 float inputs", "vLLM goes by its weights"),
        (NVFP4, LOCAL, MX4, "nvfp4", "has the format mxfp4-pack-quantized; vLLM goes by its weights"),
        # it has no scheme for these, or would take bytes of scales by their values
        (NVFP4, INT8_TOKEN, NV, None, "no scheme for"),
        (NVFP4, MXFP4 | {"dynamic": True}, NV, None, "no scheme for"),
        (NVFP4 | {"strategy": "group"}, None, NV, None, "knows NVFP4 by the strategy tensor_group"),
        (NVFP4 | {"group_size": 32}, None, NV, None, "no scheme for"),
        (NVFP4 | {"symmetric": False}, None, NV, None, "no scheme for"),
        (NVFP4 | {"dynamic": "local"}, None, NV, None, "no scheme for"),
        (NVFP4 | {"scale_dtype": "torch.uint8"}, None, NV, None, "no scheme for"),
        (NVFP4 | {"dynamic": "global"}, None, NV, None, "says symmetric True, dynamic 'global'"),
        (MXFP4 | {"dynamic": "local"}, None, MX4, None, "says symmetric True, dynamic 'local'"),
        (MXFP4 | {"group_size": 16}, None, MX4, None, "no scheme for"),
        (MXFP8 | {"scale_dtype": None}, None, MX8, None, "knows MXFP8 by the scale_dtype torch.uint8"),
        (MXFP8 | {"scale_dtype": "torch.float8_e8m0fnu"}, None, MX8, None, "has scales of"),
        (MXFP8 | {"group_size": 16}, None, MX8, None, "no scheme for"),
        (MXFP8 | {"type": "int"}, None, MX8, None, "no scheme for"),
    ],
)
def test_small_scales_of_other_producers(weights, inputs, form, label, said):
    group, findings = grouped(weights, inputs, form)
    assert (group.kind.label if group.kind else None) == label
    assert [said in finding for finding in findings] == [True] * bool(said)


@pytest.mark.parametrize("side", ["weights", "inputs"])
@pytest.mark.parametrize("label", ["int8 W8A8 dynamic", "fp8 channel dynamic", "fp8 block 128x128"])
@pytest.mark.parametrize("dtype", ["torch.uint8", "torch.float8_e4m3fn"])
def test_other_formats_have_float_scales(label, side, dtype):
    """The engine would copy a byte by its value."""
    numerics = SCHEMES[label].numerics
    tables = {"weights": arguments(numerics.weight), "inputs": arguments(numerics.input)}
    form = TARGET._kind(numerics).format
    assert grouped(*tables.values(), form)[0].kind.label == label
    tables[side] |= {"scale_dtype": dtype}
    group, findings = grouped(*tables.values(), form)
    assert group.kind is None
    assert "no scheme for" in findings[0]


# -- scale and zero point as the engine finds them again ----------------------------------------------


def test_the_engine_finds_every_zero_point_again():
    """It computes scale and zero point from the range's ends, and cuts the fraction off."""
    torch.manual_seed(0)
    observer = SCHEMES["int8 W8A8 static asymmetric"]
    for _ in range(40):
        x = torch.randn(64, 8) * torch.rand(1) * 10 + torch.randn(1)
        seen = observer.observer(torch.float32)
        seen.update(x, 0)
        stats = seen.stats()
        scale, zero = stats["input_scale"], stats["input_offset"].to(torch.int32)
        high, low = scale * (127 - zero), scale * (-128 - zero)
        again = (high - low) / 255
        assert torch.equal(again, scale)
        assert (-128 - low / again).to(torch.int32) == zero


def test_zero_points_come_in_words_of_eight_rows():
    """vLLM registers as many words as there are whole ones, for each device's rows."""
    numerics = SCHEMES["int4 g32 W4A16 asymmetric"].numerics
    (found,) = TARGET.check([Module("model.layers.0.self_attn.q_proj", (68, 64), numerics)])
    assert "zero points of 8 rows together; there are 68" in found.what
    assert list(TARGET.check([Module("model.layers.0.self_attn.q_proj", (72, 64), numerics)])) == []
    symmetric = SCHEMES["int4 g32 W4A16"].numerics
    assert list(TARGET.check([Module("model.layers.0.self_attn.q_proj", (68, 64), symmetric)])) == []
