"""What the Ascend target refuses and writes, against the engine's rules."""

import json

import pytest
import torch

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.numerics import Module
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.ascend.target import Ascend
from quantcli.targets.base import PlannedCheckpoint
from quantcli.targets.compressed_tensors.target import CompressedTensors
from quantcli.targets.fp8.target import Fp8

INT8 = discover(Scheme)["w8a8_dynamic"]().numerics
W8A16 = discover(Scheme)["w8a16"]().numerics
INT4 = discover(Scheme)["w4a4_dynamic"]().numerics
FP8 = discover(Scheme)["fp8_dynamic"]().numerics
STATIC = discover(Scheme)["w8a8_static"]().numerics
SYMMETRIC = discover(Scheme)["w8a8_static"](symmetric=True).numerics
MXFP8 = discover(Scheme)["mxfp8"]().numerics
MIX = discover(Scheme)["w8a8_mix"]().numerics
W4A8 = discover(Scheme)["w4a8"](group_size="channel").numerics
W4A16 = {size: discover(Scheme)["w4a16"](group_size=size).numerics for size in (32, 64, 128)}
TARGET = Ascend()


def refusals(quantized, floats=(), shape=(64, 64), numerics=INT8):
    modules = [Module(name, shape, numerics) for name in quantized]
    modules += [Module(name, (64, 64), None) for name in floats]
    specs = {f"{m.name}.weight": TensorSpec(f"{m.name}.weight", "BF16", m.shape) for m in modules}
    return [*TARGET.check_tensors(specs), *TARGET.check(modules)]


L = "model.layers.0"
REFUSED = {
    "q alone": ([f"{L}.self_attn.q_proj"], [f"{L}.self_attn.k_proj", f"{L}.self_attn.v_proj"], "fuses"),
    "v left out": ([f"{L}.self_attn.{p}_proj" for p in "qk"], [f"{L}.self_attn.v_proj"], "fuses"),
    "gate alone": ([f"{L}.mlp.gate_proj"], [f"{L}.mlp.up_proj"], "fuses"),
    "q_a alone": ([f"{L}.self_attn.q_a_proj"], [f"{L}.self_attn.kv_a_proj_with_mqa"], "fuses"),
    "in_proj z": ([f"{L}.linear_attn.in_proj_qkv"], [f"{L}.linear_attn.in_proj_z"], "fuses"),
    "w1 alone": ([f"{L}.feed_forward.w1"], [f"{L}.feed_forward.w3"], "fuses"),
    "one expert float": (
        [f"{L}.mlp.experts.0.{p}_proj" for p in ("gate", "up", "down")],
        [f"{L}.mlp.experts.1.{p}_proj" for p in ("gate", "up", "down")],
        "experts of one layer",
    ),
    "down of experts float": (
        [f"{L}.mlp.experts.0.{p}_proj" for p in ("gate", "up")],
        [f"{L}.mlp.experts.0.down_proj"],
        "experts of one layer",
    ),
    "prefix of a float name": (["model.layers.0.o"], ["model.layers.0.o_norm"], "begins the name"),
    "layer's own prefix": ([f"{L}.mlp.dense"], [f"{L}.mlp.dense_h_to_4h"], "begins the name"),
    "embedding": (["model.embed_tokens"], [], "no quantized embedding"),
    "router": ([f"{L}.mlp.gate"], [], "routers as float"),
    "shared expert gate": ([f"{L}.mlp.shared_expert_gate"], [], "gate as float"),
    "kv_b_proj": ([f"{L}.self_attn.kv_b_proj"], [], "must be float"),
    "draft projection": (["model.layers.61.eh_proj"], [], "draft layers"),
    "indexer weights_proj": ([f"{L}.self_attn.indexer.weights_proj"], [], "indexer"),
    "indexer wk": ([f"{L}.self_attn.indexer.wk"], [], "indexer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    quantized, floats, word = REFUSED[case]
    found = refusals(quantized, floats)
    assert found
    assert any(word in refusal.what for refusal in found), found
    assert all(refusal.fix for refusal in found)
    assert {refusal.module for refusal in found} <= {*quantized, *floats}


def test_whole_groups_pass():
    names = [f"{L}.self_attn.{p}_proj" for p in "qkvo"]
    names += [f"{L}.mlp.{p}_proj" for p in ("gate", "up", "down")]
    names += [f"{L}.block_sparse_moe.experts.{e}.{w}" for e in range(3) for w in ("w1", "w2", "w3")]
    floats = ["lm_head", "model.norm", f"{L}.self_attn.q_norm", f"{L}.block_sparse_moe.gate"]
    assert refusals(names, floats) == []


def test_router_beside_quantized_gate_proj_passes():
    # the router's name begins `gate_proj`, but it is the quantized module's name that counts
    assert refusals([f"{L}.mlp.gate_proj", f"{L}.mlp.up_proj"], [f"{L}.mlp.gate"]) == []


@pytest.mark.parametrize(
    ("numerics", "label"),
    [(W8A16, "W8A16"), (STATIC, "W8A8"), (SYMMETRIC, "W8A8"), (MIX, "W8A8_MIX")],
)
def test_what_is_not_for_experts(numerics, label):
    found = refusals([f"{L}.mlp.experts.0.up_proj"], numerics=numerics)
    assert f"no {label} for experts" in found[0].what
    assert refusals([f"{L}.mlp.shared_experts.down_proj"], numerics=numerics) == []


@pytest.mark.parametrize(
    ("words", "fine"),
    [(("observer: mse",) * 3, True), (("observer: mse", "observer: mse", "observer: minmax"), False)],
)
def test_siblings_must_be_measured_alike(words, fine):
    names = [f"{L}.self_attn.{p}_proj" for p in "qkv"]
    modules = [Module(n, (64, 64), STATIC, word) for n, word in zip(names, words, strict=True)]
    found = list(TARGET.check(modules))
    assert (found == []) == fine
    if not fine:
        assert "v_proj W8A8 (observer: minmax)" in found[0].what


@pytest.mark.parametrize(
    ("name", "merged"),
    [
        (f"{L}.self_attn.k_proj", f"{L}.self_attn.q_proj+k_proj+v_proj"),
        (f"{L}.mlp.up_proj", f"{L}.mlp.gate_proj+up_proj"),
        (f"{L}.mlp.down_proj", None),
        (f"{L}.mlp.experts.3.up_proj", None),
        ("lm_head", None),
    ],
)
def test_what_the_engine_merges(name, merged):
    assert TARGET.fused_name(name) == merged


@pytest.mark.parametrize(
    ("shape", "ok"), [((65535, 8), True), ((65536, 8), False), ((8, 65536), False)]
)
def test_matmul_limits(shape, ok):
    found = refusals([f"{L}.self_attn.o_proj"], shape=shape)
    assert (not found) == ok


@pytest.mark.parametrize(
    ("name", "k", "tp", "said"),
    [
        ("self_attn.q_proj", 96, None, None),
        ("self_attn.o_proj", 96, 1, None),
        ("self_attn.o_proj", 128, 2, None),
        ("self_attn.q_proj", 96, 2, None),
        ("self_attn.q_proj", 80, None, "groups of 32 columns do not divide 80"),
        ("mlp.experts.0.up_proj", 96, None, "W8A8_MXFP8 takes inputs of experts in multiples of 64"),
        ("self_attn.o_proj", 192, 2, "its 96 inputs on each of 2 devices are not a multiple of 64"),
    ],
)
def test_widths_of_mx_groups(name, k, tp, said):
    modules = [Module(f"{L}.{name}", (64, k), MXFP8)]
    found = [refusal.what for refusal in Ascend(tp=tp).check(modules)]
    found = [what for what in found if "fuse" not in what]
    assert [said is not None and said in what for what in found] == [True] * (said is not None), found


def test_only_ascend_rounds_exponents_of_inputs_down():
    assert TARGET.engine_parts(MXFP8).keys() == {"input_scale_alg"}
    assert int(TARGET.engine_parts(MXFP8)["input_scale_alg"]) == 0
    assert TARGET.engine_parts(W4A8).keys() == {"symmetric_inputs"}
    assert TARGET.engine_parts(FP8) == {}
    assert CompressedTensors().engine_parts(MXFP8).keys() == {"float_inputs"}


def test_no_note_on_kernels_of_another_engine():
    assert TARGET.unlike_kernels(MXFP8) is None


def test_fused_width_is_advice():
    modules = [Module(f"{L}.mlp.{p}_proj", (53248, 8), INT8) for p in ("gate", "up")]
    (word,) = TARGET.advise(modules)
    assert "106496" in word
    assert "tensor parallel size 2" in word


@pytest.mark.parametrize("target", [TARGET, CompressedTensors(), Fp8()])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 128)),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (8, 128, 64)),
        ("model.layers.0.block_sparse_moe.output_linear.weight", (8, 64, 64)),
        ("model.layers.0.moe.gate_proj.weight", (8, 64, 64)),
        ("model.layers.0.mlp.output_linear.weight", (8, 64, 64)),
        ("transformer.blocks.0.ffn.experts.mlp.w1", (512, 64)),
    ],
)
def test_stacked_experts_are_refused(target, name, shape):
    (refusal,) = target.check_tensors({name: TensorSpec(name, "BF16", shape)})
    assert refusal.module == name
    assert f"{len(shape)}-D" in refusal.what


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("backbone.layers.0.mixer.conv1d.weight", (64, 1, 4)),
        ("visual.patch_embed.proj.weight", (64, 3, 2, 14, 14)),
        ("model.layers.0.moe.gate.weight", (8, 64)),
        ("model.layers.0.mlp.gate_proj.weight", (8, 64)),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", (8, 64)),
    ],
)
def test_other_tensors_are_not_stacked_experts(name, shape):
    assert list(TARGET.check_tensors({name: TensorSpec(name, "BF16", shape)})) == []


@pytest.mark.parametrize("target", [TARGET, CompressedTensors()])
def test_projections_of_mamba_1_are_refused(target):
    names = [f"{L}.mamba.{last}" for last in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    first = [Module(name, (64, 64), FP8 if last else None) for last, name in enumerate(names)]
    refused = [r.module for r in target.check(first) if "Mamba 1" in r.what]
    assert refused == names[1:]
    second = [Module(name, (64, 64), FP8) for name in (names[0], names[3])]  # Mamba 2
    assert not any("Mamba" in r.what for r in target.check(second))


def test_labels_and_what_the_engine_holds():
    known = (INT8, FP8, W8A16, STATIC, SYMMETRIC, MIX, INT4)
    assert [TARGET.label(n) for n in known] == [
        "W8A8_DYNAMIC", "W8A8FP8_DYNAMIC", "W8A16", "W8A8", "W8A8", "W8A8_MIX", "W4A4_DYNAMIC",
    ]  # fmt: skip
    held = [TARGET.engine_dtype(n, "weight_scale", "F16") for n in known]
    assert held == ["F16", "F32", "F16", "F32", "F32", "F16", "F32"]
    assert [TARGET.engine_dtype(n, "input_scale", "F16") for n in (STATIC, MIX)] == ["F16", "F16"]
    assert "A5" in TARGET.loads_on("W8A8FP8_DYNAMIC")
    assert "A2, A3" in TARGET.loads_on("W8A8")
    assert "0.13" in TARGET.loads_on("W8A8_MIX")


@pytest.mark.parametrize("serving", [torch.bfloat16, torch.float16])
def test_static_tensors_as_the_engine_registers_them(serving):
    parts = {
        "weight": torch.ones(2, 3, dtype=torch.int8),
        "weight_scale": torch.full((2, 1), 0.5),
        "deq_scale": torch.tensor([0.0012, 0.25]),
        "quant_bias": torch.tensor([-7, 7], dtype=torch.int32),
        "input_scale": torch.tensor([0.5], dtype=serving),
        "input_offset": torch.tensor([-3.0]),
    }
    stored = TARGET.pack(STATIC, parts, tuple(parts["weight"].shape))
    assert stored.keys() == {"weight", "input_scale", "input_offset", "quant_bias", "deq_scale"}
    assert (stored["input_scale"].dtype, stored["input_scale"].tolist()) == (torch.float32, [0.5])
    assert (stored["input_offset"].dtype, stored["input_offset"].tolist()) == (torch.float32, [-3.0])
    assert (stored["quant_bias"].dtype, stored["quant_bias"].tolist()) == (torch.int32, [-7, 7])
    if serving == torch.bfloat16:
        assert torch.equal(stored["deq_scale"], parts["deq_scale"])
    else:  # the bits of the float32 in the low half
        assert stored["deq_scale"].dtype == torch.int64
        assert stored["deq_scale"].tolist() == [0x3A9D4952, 0x3E800000]
    back = TARGET.unpack(STATIC, stored)
    assert back["input_scale"].dtype == serving
    assert torch.equal(back["weight_scale"], parts["deq_scale"].unsqueeze(1) * 2)
    mixed = TARGET.pack(MIX, parts, tuple(parts["weight"].shape))
    assert mixed.keys() == {*stored, "weight_scale", "weight_offset"}
    assert torch.equal(mixed["weight_scale"], parts["weight_scale"])
    assert mixed["weight_offset"].tolist() == [[0.0], [0.0]]
    assert torch.equal(TARGET.unpack(MIX, mixed)["weight_scale"], parts["weight_scale"])


def test_static_modules_are_described_tensor_by_tensor():
    suffixes = ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
    module = Module(f"{L}.self_attn.q_proj", (4, 4), STATIC)
    other = Module(f"{L}.self_attn.o_proj", (4, 4), INT8)
    names = [f"{module.name}.{suffix}" for suffix in suffixes]
    table, _ = described([*names, f"{module.name}.bias", f"{other.name}.weight"], [module, other])
    assert [table[name] for name in names] == ["W8A8"] * 5
    assert table[f"{module.name}.bias"] == "FLOAT"
    assert table["model_quant_type"] == "W8A8"
    table, _ = described([f"{other.name}.weight"], [other])
    assert table["model_quant_type"] == "W8A8_DYNAMIC"


def described(tensors, modules=(), config=None, serving="BF16"):
    specs = {name: TensorSpec(name, "BF16", (4, 4)) for name in tensors}
    output = PlannedCheckpoint(
        list(modules),
        specs,
        dict.fromkeys(tensors, "f"),
        Settings(config or {"dtype": "bfloat16"}),
        serving,
    )
    files = {name: json.loads(content) for name, content in TARGET.sidecars(output).items()}
    return files["quant_model_description.json"], files


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("thinker.model.embed_tokens.weight", "thinker.lm_head.weight"),
        ("transformer.wte.weight", "lm_head.weight"),
    ],
)
def test_tied_head_is_described_though_absent(embedding, head):
    table, _ = described([embedding, "model.norm.weight"])
    assert table[head] == "FLOAT"
    table, _ = described([embedding, "lm_head.weight"])
    assert [name for name in table if "lm_head" in name] == ["lm_head.weight"]


def test_description_covers_every_tensor():
    module = Module(f"{L}.self_attn.q_proj", (4, 4), INT8)
    names = [f"{module.name}.{s}" for s in ("weight", "weight_scale", "weight_offset", "bias")]
    table, _ = described([*names, "lm_head.weight"], [module])
    assert [table[name] for name in names] == ["W8A8_DYNAMIC"] * 3 + ["FLOAT"]
    head = {k: table[k] for k in ("version", "model_quant_type", "metadata", "group_size", "optional")}
    assert head == {
        "version": "1.0.0",
        "model_quant_type": "W8A8_DYNAMIC",
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
    assert table.keys() == {*head, *names, "lm_head.weight"}


@pytest.mark.parametrize(("kind", "asked"), [("qwen3_moe", False), ("mixtral", True)])
def test_experts_of_unlisted_types_are_described_by_their_set(kind, asked):
    module = Module(f"{L}.mlp.experts.0.up_proj", (4, 4), INT8)
    config = {"model_type": kind, "dtype": "bfloat16"}
    table, _ = described([f"{module.name}.weight"], [module], config)
    assert (table.get(f"{L}.mlp.experts.weight") == "W8A8_DYNAMIC") == asked


def test_config_loses_quantization_at_both_levels_and_says_the_serving_dtype():
    block = {"quant_method": "fp8"}
    config = {
        "quantization_config": block,
        "dtype": "float32",
        "text_config": {"compression_config": block, "hidden_size": 4, "dtype": "float32"},
    }
    _, files = described(["a.weight"], config=config)
    assert files["config.json"] == {
        "dtype": "bfloat16",
        "text_config": {"hidden_size": 4, "dtype": "bfloat16"},
    }
    assert config["quantization_config"] == block, "the source's config was changed"


def test_config_says_the_serving_dtype_by_every_key():
    """Old engines read `torch_dtype`, new ones `dtype`, and some those of the text model."""
    config = {"dtype": "bfloat16", "torch_dtype": "float32", "vision_config": {"dtype": "float32"}}
    config["text_config"] = {"dtype": "torch.bfloat16", "torch_dtype": "float16"}
    _, files = described(["a.weight"], config=config)
    assert files["config.json"] == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "vision_config": {"dtype": "float32"},
        "text_config": {"dtype": "torch.bfloat16", "torch_dtype": "bfloat16"},
    }


def test_config_that_needs_no_change_is_not_generated():
    _, files = described(["a.weight"], config={"torch_dtype": "float16"}, serving="F16")
    assert files.keys() == {"quant_model_description.json", "model.safetensors.index.json"}


def test_index_lists_every_tensor():
    _, files = described(["b.weight", "a.weight"])
    assert files["model.safetensors.index.json"] == {
        "metadata": {"total_size": 64},
        "weight_map": {"a.weight": "f", "b.weight": "f"},
    }


@pytest.mark.parametrize(("numerics", "label"), [(INT8, "W8A8_DYNAMIC"), (None, "FLOAT")])
def test_merged_modules_are_described_by_their_siblings_too(numerics, label):
    modules = [
        Module(f"{L}.mlp.gate_up_proj", (4, 4), numerics),
        Module(f"{L}.attn.qkv_proj", (4, 4), numerics),
    ]
    table, _ = described([f"{m.name}.weight" for m in modules], modules)
    asked = [f"{L}.mlp.{p}_proj.weight" for p in ("gate", "up")]
    asked += [f"{L}.attn.{p}_proj.weight" for p in "qkv"]
    assert [table[name] for name in asked] == [label] * 5


def test_int4_inputs_come_in_eights():
    modules = [Module(f"{L}.self_attn.o_proj", (64, 60), INT4)]
    (refusal,) = TARGET.check(modules)
    assert "multiples of 8; there are 60" in refusal.what
    (expert,) = TARGET.check([Module(f"{L}.mlp.experts.0.up_proj", (64, 64), INT4)])
    assert "no W4A4_DYNAMIC for experts" in expert.what


EXPERTS = [
    f"{L}.mlp.experts.{number}.{name}_proj" for number in (0, 1) for name in ("gate", "up", "down")
]
INT4_REFUSED = {
    "linear W4A8": ([f"{L}.self_attn.o_proj"], (64, 64), W4A8, "for experts alone"),
    "linear W4A16": ([f"{L}.self_attn.o_proj"], (64, 64), W4A16[32], "for experts alone"),
    "odd outputs": (EXPERTS, (65, 64), W4A8, "outputs in multiples of 8; there are 65"),
    "outputs not in eights": (EXPERTS, (68, 64), W4A8, "outputs in multiples of 8; there are 68"),
    "slices": (EXPERTS, (64, 56), W4A8, "16 slices, which do not divide 56 inputs"),
    "groups": (EXPERTS, (64, 96), W4A16[64], "groups of 64 columns do not divide 96"),
}


@pytest.mark.parametrize("case", INT4_REFUSED)
def test_refused_int4(case):
    names, shape, numerics, why = INT4_REFUSED[case]
    found = refusals(names, shape=shape, numerics=numerics)
    assert found
    assert all(why in refusal.what for refusal in found)
    if case == "slices":  # gate and up have a sum of the whole row
        assert {refusal.module.rpartition(".")[2] for refusal in found} == {"down_proj"}


@pytest.mark.parametrize("size", sorted(W4A16))
def test_int4_experts_are_taken(size):
    assert refusals(EXPERTS, shape=(128, 256), numerics=W4A16[size]) == []
    assert refusals(EXPERTS, shape=(72, 48), numerics=W4A8) == []


@pytest.mark.parametrize(("one", "other"), [
    (W4A8, W4A16[32]), (W4A8, MXFP8), (W4A16[64], MXFP8), (W4A16[64], W4A16[32]),
])  # fmt: skip
def test_one_group_size_for_all(one, other):
    """Experts of two layers of types that read different values in the description."""
    second = [name.replace("layers.0", "layers.1") for name in EXPERTS]
    modules = [Module(name, (128, 256), one) for name in EXPERTS]
    modules += [Module(name, (128, 256), other) for name in second]
    (found,) = TARGET.check(modules)
    assert found.module in {EXPERTS[0], second[0]}
    assert "one `group_size` for all modules" in found.what
    alike = [Module(module.name, module.shape, W4A16[32]) for module in modules[:6]]
    assert list(TARGET.check(alike + [Module(n, (128, 256), MXFP8) for n in second])) == []
