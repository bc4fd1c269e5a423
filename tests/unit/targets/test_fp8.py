"""What the fp8 target writes and refuses, and how it reads config.json, against what vLLM does."""

import json

import pytest
import torch

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype
from quantcli.core.errors import InputError
from quantcli.core.numerics import Module
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.base import PlannedCheckpoint
from quantcli.targets.fp8.config import read_config
from quantcli.targets.fp8.kinds import layout_of, numerics_of
from quantcli.targets.fp8.target import Fp8
from tests.measured import constants

TARGET = Fp8()
L = "model.layers.0"
N, K = 200, 257
CODES = {"weight": ("F8_E4M3", (N, K))}
WANTED = {
    "fp8_tensor": ("fp8 tensor dynamic", CODES | {"weight_scale": ("F32", (1,))}),
    "fp8_static": (
        "fp8 tensor static",
        CODES | {"weight_scale": ("F32", (1,)), "input_scale": ("F32", (1,))},
    ),
    "fp8_block": ("fp8 block 128x128", CODES | {"weight_scale_inv": ("F32", (2, 3))}),
}


def scheme(name):
    return discover(Scheme)[name]()


NUMERICS = {name: scheme(name).numerics for name in WANTED}
BLOCK, TENSOR, STATIC = (NUMERICS[name] for name in ("fp8_block", "fp8_tensor", "fp8_static"))


@pytest.mark.parametrize("name", WANTED)
def test_tensors_as_the_engine_registers_them(name):
    made, (label, wanted) = scheme(name), WANTED[name]
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = made.quantize(weight, torch.float32, constants(made, torch.float32, weight, weight))
    stored = TARGET.pack(made.numerics, parts, (N, K))
    assert {s: (safetensors_dtype(t.dtype), tuple(t.shape)) for s, t in stored.items()} == wanted
    assert TARGET.label(made.numerics) == label
    assert "vLLM" in TARGET.loads_on(label)
    back = TARGET.unpack(made.numerics, stored)
    assert torch.equal(made.dequantize(back), made.dequantize(parts))
    layout = layout_of(made.numerics)
    assert layout.label == label
    assert {p.suffix: p.shape(N, K) for p in layout.params} == {s: v[1] for s, v in wanted.items()}
    rows = torch.arange(N) // 128  # what one row of scales is for many is given once for each
    spread = stored | {s: t[rows] for s, t in stored.items() if s == "weight_scale_inv"}
    assert torch.equal(layout.dequantize(spread), made.dequantize(parts))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("fp8_dynamic", "a scale per channel: under `quant_method: fp8` engines read one for a weight"),
        ("w8a8_dynamic", "fp8 alone, not int8 weights"),
        ("w4a16", "fp8 alone, not int4 weights"),
    ],
)
def test_what_it_cannot_store(name, word):
    with pytest.raises(InputError, match="target `fp8`") as caught:
        TARGET.engine_dtype(scheme(name).numerics, "weight_scale", "BF16")
    assert word in caught.value.what


def refusals(*modules):
    built = [Module(name, shape, numerics) for name, shape, numerics in modules]
    return list(TARGET.check(built))


SQUARE = (256, 256)
REFUSED = {
    "two schemes": (
        [(f"{L}.self_attn.o_proj", SQUARE, BLOCK), (f"{L}.mlp.down_proj", SQUARE, TENSOR)],
        "one scheme for the whole model",
    ),
    "half of what is fused": (
        [(f"{L}.mlp.gate_proj", SQUARE, BLOCK), (f"{L}.mlp.up_proj", SQUARE, None)],
        "fuses",
    ),
    "head": ([("lm_head", SQUARE, TENSOR)], "no fp8 head"),
    "embedding": ([("model.embed_tokens", SQUARE, TENSOR)], "no quantized embedding"),
    "router": ([(f"{L}.mlp.gate", SQUARE, TENSOR)], "routers as float"),
    "draft layer": ([(f"{L}.eh_proj", SQUARE, TENSOR)], "eh_proj of draft layers as float"),
    "indexer": ([(f"{L}.self_attn.indexer.weights_proj", SQUARE, TENSOR)], "indexer as float"),
    "some experts": (
        [(f"{L}.mlp.experts.{e}.up_proj", SQUARE, n) for e, n in ((0, STATIC), (1, None))],
        "experts of one layer",
    ),
    "block cut by a sibling": (
        [(f"{L}.attn.{p}_proj", (n, 256), BLOCK) for p, n in (("q", 256), ("k", 64), ("v", 64))],
        "its 64 rows are not a multiple of 128",
    ),
    "narrow experts": ([(f"{L}.mlp.experts.0.down_proj", (256, 96), BLOCK)], "this one is 96"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    modules, word = REFUSED[case]
    found = refusals(*modules)
    assert any(word in refusal.what for refusal in found), found
    assert all(refusal.fix for refusal in found)


def test_what_may_be_odd():
    assert refusals((f"{L}.self_attn.o_proj", (200, 130), BLOCK)) == []
    last = [(f"{L}.attn.{p}_proj", (n, 256), BLOCK) for p, n in (("q", 256), ("k", 128), ("v", 64))]
    assert refusals(*last) == []
    assert refusals((f"{L}.mlp.experts.0.up_proj", (96, 40), STATIC)) == []


def configured(*modules, tied=False):
    built = [Module(name, shape, numerics) for name, shape, numerics in modules]
    specs = {f"{m.name}.weight": TensorSpec(f"{m.name}.weight", "BF16", m.shape) for m in built}
    if tied:
        specs["model.embed_tokens.weight"] = TensorSpec("model.embed_tokens.weight", "BF16", (8, 8))
    config = Settings({"dtype": "bfloat16"})
    output = PlannedCheckpoint(built, specs, dict.fromkeys(specs, "f"), config, "BF16")
    return json.loads(TARGET.sidecars(output)["config.json"])["quantization_config"]


def test_config_names_every_linear_that_stays_float():
    found = configured(
        (f"{L}.self_attn.q_proj", SQUARE, BLOCK),
        (f"{L}.mlp.gate_proj", SQUARE, None),
        (f"{L}.mlp.up_proj", SQUARE, None),
        (f"{L}.input_layernorm", (256,), None),
        ("model.embed_tokens", SQUARE, None),
        ("lm_head", SQUARE, None),
    )
    assert found == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [f"{L}.mlp.gate_proj", f"{L}.mlp.up_proj", "lm_head"],
    }


def test_float_experts_are_also_named_as_one_module():
    """They are one in transformers and SGLang, which compare its name."""
    experts = [f"{L}.mlp.experts.{i}.up_proj" for i in range(2)]
    found = configured((f"{L}.self_attn.o_proj", SQUARE, BLOCK), *((e, SQUARE, None) for e in experts))
    assert found["modules_to_not_convert"] == [*experts, f"{L}.mlp.experts"]


@pytest.mark.parametrize(("numerics", "inputs"), [(TENSOR, "dynamic"), (STATIC, "static")])
def test_config_without_blocks_and_with_a_tied_head(numerics, inputs):
    assert configured((f"{L}.self_attn.o_proj", SQUARE, numerics), tied=True) == {
        "quant_method": "fp8",
        "activation_scheme": inputs,
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head"],
    }


@pytest.mark.parametrize("numerics", [BLOCK, TENSOR, STATIC])
def test_what_is_written_is_read(numerics):
    block = configured((f"{L}.self_attn.o_proj", SQUARE, numerics), ("lm_head", SQUARE, None))
    said = read_config(Settings(block))
    assert (said.numerics, said.ignored, said.findings) == (numerics, {"lm_head"}, [])


GOOD = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def test_the_list_of_the_engines_own_name_counts_if_it_has_any():
    both = GOOD | {"ignored_layers": ["a"], "modules_to_not_convert": ["b"]}
    assert read_config(Settings(both)).ignored == {"a"}
    assert [found.severity for found in read_config(Settings(both)).findings] == ["note"]
    assert read_config(Settings(both | {"ignored_layers": []})).ignored == {"b"}
    assert read_config(Settings(GOOD | {"modules_to_not_convert": None})).ignored == set()


def test_other_blocks_than_are_written():
    assert read_config(Settings(GOOD | {"weight_block_size": [64, 32]})).numerics == numerics_of(
        "dynamic", (64, 32)
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"quant_method": None}, "has no quantization_config"),
        ({"activation_scheme": None}, "activation_scheme is None"),
        ({"activation_scheme": ["dynamic"]}, "activation_scheme is ['dynamic']"),
        ({"weight_block_size": [128]}, "weight_block_size is [128]"),
        ({"weight_block_size": [128, 0]}, "weight_block_size is [128, 0]"),
        ({"weight_block_size": [128, True]}, "weight_block_size is [128, True]"),
        ({"weight_block_size": [1.5, 10**30]}, "weight_block_size is [1.5, 10000"),
        ({"weight_block_size": "128"}, "weight_block_size is '128'"),
        ({"weight_block_size": [128, 128], "activation_scheme": "static"}, "not have for blocks"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'; engines read every code as e4m3"),
        ({"ignored_layers": "lm_head"}, "ignored_layers is 'lm_head'"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert is [1]"),
        ({"modules_to_not_convert": {"a": 1}}, "modules_to_not_convert is {'a': 1}"),
    ],
)
def test_config_that_engines_do_not_take(changes, word):
    said = read_config(Settings(GOOD | changes))
    assert said.numerics is None
    assert any(word in found.what and found.severity == "error" for found in said.findings)
