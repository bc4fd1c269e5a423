"""What the modelopt target writes, refuses and reads, against the rules of vLLM and TensorRT-LLM."""

import json
from fnmatch import fnmatch, fnmatchcase

import pytest
import torch

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype, torch_dtype
from quantcli.core.errors import InputError
from quantcli.core.numerics import Module
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.base import PlannedCheckpoint
from quantcli.targets.modelopt.config import exclude_list
from quantcli.targets.modelopt.kinds import KINDS, layout_of
from quantcli.targets.modelopt.matching import Entries, Layers
from quantcli.targets.modelopt.target import ModelOpt
from tests.measured import constants

TARGET = ModelOpt()
L = "model.layers.0"
N, K = 200, 256
FP8 = {"weight": ("F8_E4M3", (N, K))}
ONE = ("F32", ())
WANTED = {
    "fp8_static": ("FP8", FP8 | {"weight_scale": ONE, "input_scale": ONE}),
    "fp8_dynamic": ("FP8_PER_CHANNEL_PER_TOKEN", FP8 | {"weight_scale": ("F32", (N,))}),
    "fp8_block": ("FP8_PB_WO", FP8 | {"weight_scale": ("F32", (2, 1, 2, 1))}),
    "mxfp8": ("MXFP8", FP8 | {"weight_scale": ("U8", (N, K // 32))}),
}


def scheme(name):
    return discover(Scheme)[name]()


NUMERICS = {algorithm: kind.numerics for algorithm, kind in KINDS.items()}


@pytest.mark.parametrize("name", WANTED)
def test_tensors_as_the_engine_registers_them(name):
    made, (label, wanted) = scheme(name), WANTED[name]
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = made.quantize(weight, torch.float32, constants(made, torch.float32, weight, weight))
    held = TARGET.engine_dtype(made.numerics, "weight_scale", "BF16")
    parts["weight_scale"] = parts["weight_scale"].to(torch_dtype(held))
    stored = TARGET.pack(made.numerics, parts, (N, K))
    assert {s: (safetensors_dtype(t.dtype), tuple(t.shape)) for s, t in stored.items()} == wanted
    assert TARGET.label(made.numerics) == label
    assert "vLLM" in TARGET.loads_on(label)
    back = TARGET.unpack(made.numerics, stored)
    parts["weight_scale"] = parts["weight_scale"].float()
    assert torch.equal(made.dequantize(back), made.dequantize(parts))
    layout = TARGET.layout(made.numerics)
    assert {p.suffix: p.fits(wanted[p.suffix][1], N, K) for p in layout.params} == dict.fromkeys(
        wanted, True
    )
    rows = torch.arange(N) // 128  # what one row of scales is for many is given once for each
    spread = stored | ({"weight_scale": stored["weight_scale"][rows]} if name == "fp8_block" else {})
    assert torch.equal(layout.dequantize(spread), made.dequantize(parts))


def test_nvfp4_is_code_times_scale_times_multiplier():
    """Every byte of codes, every positive scale, at a global scale of its own."""
    octets = torch.arange(256, dtype=torch.uint8).repeat(126, 1)
    numbers = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = numbers[:, None].view(torch.uint8).repeat(1, 32).view(torch.float8_e4m3fn)
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor([*half, *(-v for v in half)])
    nibbles = torch.stack([octets & 15, octets >> 4], -1).flatten(1).long()
    for algorithm in ("NVFP4", "W4A16_NVFP4"):
        numerics = NUMERICS[algorithm]
        parts = {"weight": octets, "weight_scale": scales, "weight_global_scale": torch.tensor([0.003])}
        if algorithm == "NVFP4":
            parts["input_global_scale"] = torch.tensor([0.25])
        stored = TARGET.pack(numerics, parts, (126, 512))
        shapes = {s: (safetensors_dtype(t.dtype), tuple(t.shape)) for s, t in stored.items()}
        inputs = {"input_scale": ONE} if algorithm == "NVFP4" else {}
        assert shapes == {
            "weight": ("U8", (126, 256)),
            "weight_scale": ("F8_E4M3", (126, 32)),
            "weight_scale_2": ONE,
            **inputs,
        }
        assert float(stored["weight_scale_2"]) == float(torch.tensor(0.003))
        found = layout_of(KINDS[algorithm]).dequantize(stored)
        expected = values[nibbles] * (numbers.float() * 0.003)[:, None]
        assert torch.allclose(found, expected, rtol=2e-7, atol=0)
        back = TARGET.unpack(numerics, stored)
        assert back.keys() == parts.keys()
        assert all(torch.equal(back[part].float(), parts[part].float()) for part in parts)
        assert all(back[part].shape == parts[part].shape for part in parts)


@pytest.mark.parametrize("name", ["fp8_tensor", "w8a8_dynamic", "w4a16"])
def test_what_it_cannot_store(name):
    with pytest.raises(InputError, match="target `modelopt` cannot store"):
        TARGET.engine_dtype(scheme(name).numerics, "weight_scale", "BF16")


def refusals(*modules):
    built = [Module(name, shape, numerics) for name, shape, numerics in modules]
    return list(TARGET.check(built))


SQUARE = (256, 256)
CHANNEL, BLOCK, STATIC, MX = (
    NUMERICS[a] for a in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8", "MXFP8")
)
NV, NV16 = NUMERICS["NVFP4"], NUMERICS["W4A16_NVFP4"]
REFUSED = {
    "half of what is fused": (
        [(f"{L}.mlp.gate_proj", SQUARE, MX), (f"{L}.mlp.up_proj", SQUARE, None)],
        "fuses",
    ),
    "unlike siblings": (
        [(f"{L}.mlp.gate_proj", SQUARE, NV), (f"{L}.mlp.up_proj", SQUARE, NV16)],
        "gate_proj NVFP4, up_proj W4A16_NVFP4",
    ),
    "embedding": ([("model.embed_tokens", SQUARE, MX)], "no quantized embedding"),
    "router": ([(f"{L}.mlp.gate", SQUARE, MX)], "routers as float"),
    "tower": ([("vision_tower.blocks.0.fc1", SQUARE, MX)], "`vision_tower` in their names as float"),
    "tower of CLIP": ([("a.vision_model.layers.0.fc1", SQUARE, NV)], "`vision_model` in their names"),
    "experts per channel": (
        [(f"{L}.mlp.experts.0.up_proj", SQUARE, CHANNEL)],
        "no FP8_PER_CHANNEL_PER_TOKEN for experts",
    ),
    "experts in blocks": ([(f"{L}.mlp.experts.0.up_proj", SQUARE, BLOCK)], "no FP8_PB_WO for experts"),
    "head in blocks": ([("lm_head", SQUARE, BLOCK)], "no head in FP8_PB_WO"),
    "some experts": (
        [(f"{L}.mlp.experts.{e}.up_proj", SQUARE, n) for e, n in ((0, NV), (1, None))],
        "experts of one layer",
    ),
    "columns of blocks": ([(f"{L}.self_attn.o_proj", (256, 200), BLOCK)], "128 columns, which do not"),
    "columns of MXFP8": ([(f"{L}.self_attn.o_proj", (256, 48), MX)], "32 columns, which do not"),
    "columns of NVFP4": ([(f"{L}.self_attn.o_proj", (256, 40), NV16)], "16 columns, which do not"),
    "block cut by a sibling": (
        [(f"{L}.attn.{p}_proj", (n, 256), BLOCK) for p, n in (("q", 256), ("k", 64), ("v", 64))],
        "its 64 rows are not a multiple of 128",
    ),
    "latent keys": ([(f"{L}.self_attn.kv_b_proj", SQUARE, NV)], "by an identity matrix"),
    "latent keys, static": ([(f"{L}.self_attn.kv_b_proj", SQUARE, STATIC)], "by an identity matrix"),
    "next tokens": ([("mtp.fc", SQUARE, NV16)], "builds `mtp.fc` as float if the model is W4A16_NVFP4"),
    "two schemes of a draft": (
        [
            ("fc", SQUARE, MX),
            ("layers.0.mlp.down_proj", SQUARE, CHANNEL),
            ("layers.0.self_attn.o_proj", SQUARE, MX),
        ],
        "MIXED_PRECISION names modules in full",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    modules, word = REFUSED[case]
    found = refusals(*modules)
    assert any(word in refusal.what for refusal in found), found
    assert all(refusal.fix for refusal in found)


def test_what_is_taken():
    heads = [("lm_head", SQUARE, n) for n in (MX, CHANNEL, STATIC, NV, NV16)]
    assert [refusals(head) for head in heads] == [[]] * 5
    experts = [(f"{L}.mlp.experts.0.up_proj", SQUARE, n) for n in (MX, STATIC, NV, NV16)]
    assert [refusals(expert) for expert in experts] == [[]] * 4
    assert refusals((f"{L}.self_attn.o_proj", (200, 256), BLOCK)) == []
    assert refusals((f"{L}.self_attn.kv_b_proj", SQUARE, MX)) == []
    assert refusals(("mtp.fc", SQUARE, MX)) == []


# -- both descriptions ---------------------------------------------------------------------------


def described(*modules, tied=False, **config):
    """config.json's object and that of the file, for modules by name, shape and numerics."""
    built = [Module(name, shape, numerics) for name, shape, numerics in modules]
    specs = {f"{m.name}.weight": TensorSpec(f"{m.name}.weight", "BF16", m.shape) for m in built}
    if tied:
        specs["model.embed_tokens.weight"] = TensorSpec("model.embed_tokens.weight", "BF16", (8, 8))
    config = {"dtype": "bfloat16", **config}
    output = PlannedCheckpoint(built, specs, dict.fromkeys(specs, "f"), Settings(config), "BF16")
    files = TARGET.sidecars(output)
    config = json.loads(files.get("config.json", b"{}")).get("quantization_config")
    own = files.get("hf_quant_config.json")
    return config, None if own is None else json.loads(own)


PRODUCER = {"name": "modelopt"}
FLOATS = [(f"{L}.mlp.gate", (8, 256), None), (f"{L}.input_layernorm", (256,), None)]


def test_one_algorithm_in_both_files():
    config, own = described((f"{L}.self_attn.o_proj", SQUARE, NV), *FLOATS, ("lm_head", SQUARE, None))
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert config == {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "config_groups": {
            "group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
        },
        "ignore": [f"{L}.mlp.gate", "lm_head"],
        "kv_cache_scheme": None,
        "producer": PRODUCER,
    }
    assert own == {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": "NVFP4",
            "group_size": 16,
            "kv_cache_quant_algo": None,
            "exclude_modules": [f"{L}.mlp.gate", "lm_head"],
        },
    }


def test_float_inputs_are_in_no_group():
    """vLLM takes NVFP4 for float inputs if no group has any."""
    config, own = described((f"{L}.self_attn.o_proj", SQUARE, NV16))
    assert config["quant_algo"] == own["quantization"]["quant_algo"] == "W4A16_NVFP4"
    assert "input_activations" not in config["config_groups"]["group_0"]


def test_blocks_have_their_name_in_small_letters():
    """TensorRT-LLM knows no other."""
    config, own = described((f"{L}.self_attn.o_proj", SQUARE, BLOCK))
    assert config["quant_algo"] == own["quantization"]["quant_algo"] == "fp8_pb_wo"
    assert "group_size" not in config


def test_several_algorithms_in_both_files():
    config, own = described(
        (f"{L}.self_attn.o_proj", SQUARE, CHANNEL),
        (f"{L}.mlp.down_proj", SQUARE, MX),
        *FLOATS,
        ("lm_head", SQUARE, NV16),
    )
    layers = {
        f"{L}.self_attn.o_proj": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        f"{L}.mlp.down_proj": {"quant_algo": "MXFP8", "group_size": 32},
        "lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    }
    assert config["quant_algo"] == own["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == own["quantization"]["quantized_layers"] == layers
    assert config["ignore"] == own["quantization"]["exclude_modules"] == [f"{L}.mlp.gate"]
    assert [group["targets"] for group in config["config_groups"].values()] == [[n] for n in layers]


def test_a_tied_head_is_excluded():
    assert described((f"{L}.self_attn.o_proj", SQUARE, MX), tied=True)[0]["ignore"] == ["lm_head"]


def test_a_head_without_a_name_is_float_in_a_mixture_alone():
    """vLLM looks it up under "", which no list can have: an empty entry is a part of every name."""
    modules = [(f"{L}.self_attn.o_proj", SQUARE, MX), ("lm_head", SQUARE, None)]
    config, own = described(*modules, architectures=["ExaoneMoeForCausalLM"])
    assert config["quant_algo"] == own["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert list(config["quantized_layers"]) == [f"{L}.self_attn.o_proj"]
    assert described(*modules, architectures=["LlamaForCausalLM"])[0]["quant_algo"] == "MXFP8"
    quantized = [(name, shape, MX) for name, shape, _ in modules]
    config, _ = described(*quantized, architectures=["ExaoneMoeForCausalLM"])
    assert config["quant_algo"] == "MXFP8"


def test_experts_that_the_engine_builds_under_another_name():
    """Those of MiniMax-M2 are `block_sparse_moe` in the checkpoint and `mlp` in the engine."""
    expert = f"{L}.block_sparse_moe.experts.0.w1"
    config, _ = described((expert, SQUARE, MX), (f"{L}.self_attn.o_proj", SQUARE, NV16))
    assert f"{L}.mlp.experts.0.w1" in config["quantized_layers"]
    config, _ = described((expert, SQUARE, None), (f"{L}.self_attn.o_proj", SQUARE, NV16))
    assert vllm_excludes(f"{L}.mlp.experts", config["ignore"])
    mamba = "model.layers.0.mamba.in_proj"
    config, _ = described((mamba, SQUARE, MX), (f"{L}.self_attn.o_proj", SQUARE, NV16))
    assert "model.layers.0.mixer.in_proj" in config["quantized_layers"]
    falcon = {"model_type": "falcon_h1", "num_hidden_layers": 10}
    mamba = "model.layers.2.mamba.in_proj"
    config, _ = described((mamba, SQUARE, MX), (f"{L}.self_attn.o_proj", SQUARE, NV16), **falcon)
    assert "model.12.mixer.in_proj" in config["quantized_layers"]
    config, _ = described((mamba, SQUARE, None), (f"{L}.self_attn.o_proj", SQUARE, NV16), **falcon)
    assert vllm_excludes("model.12.mixer.in_proj", config["ignore"])
    assert not vllm_excludes("model.11.mixer.in_proj", config["ignore"])
    assert not vllm_excludes(f"{L}.o_proj", config["ignore"])
    config, _ = described((mamba, SQUARE, MX), (f"{L}.self_attn.o_proj", SQUARE, None), **falcon)
    assert vllm_excludes(f"{L}.o_proj", config["ignore"])


def test_nothing_quantized_is_described_by_nothing():
    assert described(("lm_head", SQUARE, None)) == (None, None)


# -- which modules stay float --------------------------------------------------------------------

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
         "in_proj_ba": ("in_proj_b", "in_proj_a")}  # fmt: skip


def vllm_excludes(prefix, entries):
    """As vLLM 0.32 does, from its source: True, False, or ValueError for a part of what is fused."""
    last = prefix.split(".")[-1]
    if last in FUSED and prefix not in entries:
        found = {prefix.replace(last, shard) in entries for shard in FUSED[last]}
        if len(found) > 1:
            raise ValueError(prefix)
        skipped = found.pop()
    elif last not in FUSED and "experts" in prefix:
        skipped = any(prefix in entry for entry in entries if "experts" in entry)
    else:
        skipped = prefix in entries
    inside = any(entry != prefix and entry in prefix for entry in entries)
    return skipped or inside or any(fnmatch(prefix, entry) for entry in entries)


def trt_excludes(name, entries):
    """As TensorRT-LLM does: by the name, or that of a module around it."""
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return any(fnmatchcase(one, entry) for one in around for entry in entries)


def built_as(name):
    """vLLM's name of a module: of its siblings', of all experts."""
    if ".experts." in name:
        return name.partition(".experts.")[0] + ".experts"
    parent, _, last = name.rpartition(".")
    return next((f"{parent}.{whole}" for whole, parts in FUSED.items() if last in parts), name)


def renamed(name):
    """As `hf_to_vllm_mapper` of the class for images and text does it."""
    for old, new in (("model.language_model.", "language_model.model."), ("model.visual.", "visual."),
                     ("lm_head", "language_model.lm_head")):  # fmt: skip
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


ATTENTION = [f"{L}.self_attn.{p}_proj" for p in "qkvo"]
MLP = [f"{L}.mlp.{p}_proj" for p in ("gate", "up", "down")]
EXPERTS = [f"{L}.mlp.experts.{e}.{p}_proj" for e in range(3) for p in ("gate", "up", "down")]
TEXT = [name.replace("model.", "model.language_model.", 1) for name in [*ATTENTION, *MLP]]
VISUAL = ["model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0"]
# float modules, quantized ones
CASES = {
    "head": (["lm_head"], ATTENTION),
    "a name within a name": ([f"{L}.mlp.gate", "lm_head"], [*MLP, *ATTENTION]),
    "siblings float": ([*ATTENTION[:3]], [ATTENTION[3], *MLP]),
    "experts float": ([f"{L}.mlp.gate", *EXPERTS], [*ATTENTION, f"{L}.mlp.shared_experts.down_proj"]),
    "shared expert float": (
        [f"{L}.mlp.gate", *(f"{L}.mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down"))],
        [*EXPERTS, *ATTENTION],
    ),
    "a head in a name": (["lm_head"], ["lm_head_of_drafts.proj", *MLP]),
    "fused parts in a name": (
        [f"{L}.attn.in_proj_b", f"{L}.attn.in_proj_a"],
        [f"{L}.attn.in_proj_bias_net", *MLP],
    ),
    "a layer of ten": (["model.layers.1.mlp.down_proj"], ["model.layers.11.mlp.down_proj"]),
    "tower": ([*VISUAL, "lm_head"], TEXT),
    "tower of which one is quantized": ([VISUAL[0], "lm_head"], [*TEXT, VISUAL[1]]),
}


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_float_modules_are_excluded_by_every_engine(case):
    floats, quantized = CASES[case]
    entries = exclude_list(floats, quantized)
    moved = [renamed(entry) for entry in entries]
    for name in [*floats, *quantized]:
        expected = name in floats
        assert vllm_excludes(built_as(name), entries) is expected, (name, entries)
        assert vllm_excludes(built_as(renamed(name)), moved) is expected, (name, moved)
        if ".experts." in name:  # it asks for the set
            assert trt_excludes(built_as(name), entries) is expected
        assert trt_excludes(name, entries) is expected, (name, entries)


@pytest.mark.parametrize("case", CASES)
def test_reading_agrees_with_the_engine(case):
    floats, quantized = CASES[case]
    names = [*floats, *quantized]
    found = Entries(exclude_list(floats, quantized), names)
    assert [name for name in names if found.excluded(name)] == floats


LISTS = {
    "wildcards": (["model.layers.0*", "*.mlp.up_proj"], [*ATTENTION, *MLP, "lm_head"]),
    "of published checkpoints": (["lm_head", "model.layers.0.mlp.gate", "*router*"], [*MLP, "lm_head"]),
    "a part of a name": (["self_attn"], [*ATTENTION, *MLP]),
    "a fused name": ([f"{L}.self_attn.qkv_proj"], ATTENTION),
    "one letter": (["?odel.layers.0.mlp.down_pro[jk]"], MLP),
    "one expert": ([EXPERTS[4]], [*EXPERTS, *ATTENTION]),
    "nothing": ([], MLP),
    "empty": ([""], MLP),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_of_others_are_read_as_the_engine_does(case):
    entries, names = LISTS[case]
    found = Entries(entries, names)
    assert {n: found.excluded(n) for n in names} == {
        n: vllm_excludes(built_as(n), entries) for n in names
    }


def test_a_part_of_what_is_fused_stops_the_engine():
    entries = [ATTENTION[0]]
    with pytest.raises(ValueError, match="qkv_proj"):
        vllm_excludes(f"{L}.self_attn.qkv_proj", entries)
    assert Entries(entries, ATTENTION).excluded(ATTENTION[1]) is None


def test_algorithms_of_a_mixture():
    layers = {
        **dict.fromkeys(ATTENTION, "FP8"),
        f"{L}.mlp.experts.0.gate_proj": "NVFP4",
        f"{L}.mlp.shared_expert.gate_proj": "MXFP8",
        "model.layers.1.mlp.gate_up_proj": "MXFP8",
        "model.layers.2.moe.gate_proj": "NVFP4",
        "model.layers.3.mlp.gate_proj": "MXFP8",
        "model.layers.3.mlp.up_proj": "NVFP4",
        "lm_head": "FP8",
    }
    found = Layers(layers, ())
    for name, expected in {
        ATTENTION[1]: {"FP8"},
        EXPERTS[5]: {"NVFP4"},  # by the first of the layer's
        f"{L}.mlp.shared_expert.up_proj": {"MXFP8"},  # by its sibling
        f"{L}.mlp.down_proj": set(),
        "model.layers.1.mlp.up_proj": {"MXFP8"},
        "model.layers.2.moe.experts.7.up_proj": {"NVFP4"},  # by what is next to them
        "model.layers.3.mlp.up_proj": {"MXFP8", "NVFP4"},
        "model.language_model.layers.0.self_attn.q_proj": {"FP8"},
        "language_model.lm_head": {"FP8"},
    }.items():
        assert found.algorithms(name) == expected, name
