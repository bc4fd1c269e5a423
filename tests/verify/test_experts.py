"""Checkpoints of any producer whose experts vLLM would skip or misread, each built by hand."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.e2e.calibrating import write_tokenizer

E, H, I = 2, 64, 32  # noqa: E741 - H, I and 2 I differ only in H = 2 I below
W = 48  # I of most models here
EXPERTS = "model.layers.0.mlp.experts"
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
ATTENTION = {f"model.layers.0.self_attn.{name}_proj": (H, H) for name in "qkvo"}


def codes(n, k):
    return torch.randint(
        -127, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
    )


def quantized(modules):
    table = {}
    for name, (n, k) in modules.items():
        table[f"{name}.weight"] = codes(n, k)
        table[f"{name}.weight_scale"] = torch.full((n, 1), 0.01)
    return table


def single(path=EXPERTS, width=W):
    sides = {"gate_proj": (width, H), "up_proj": (width, H), "down_proj": (H, width)}
    return {f"{path}.{e}.{name}": shape for e in range(E) for name, shape in sides.items()}


def stacks(path=EXPERTS, width=W, dtype=torch.bfloat16, *, turned=False):
    shapes = {"gate_up_proj": (E, 2 * width, H), "down_proj": (E, H, width)}
    made = {f"{path}.{name}": torch.ones(shape).to(dtype) for name, shape in shapes.items()}
    return {name: values.mT.contiguous() if turned else values for name, values in made.items()}


def scales(path=EXPERTS, width=W, end="_scale"):
    shapes = {"gate_up_proj": (E, 2 * width, 1), "down_proj": (E, H, 1)}
    return {f"{path}.{name}{end}": torch.full(shape, 0.01) for name, shape in shapes.items()}


def build(folder, kind, tensors, targets=("Linear",), ignore=("lm_head", "re:.*\\.mlp\\.gate$")):
    """A checkpoint with int8 attention, and these tensors of experts."""
    config = {
        "architectures": ["ForCausalLM"], "model_type": kind, "torch_dtype": "bfloat16",
        "hidden_size": H, "num_experts": E, "num_hidden_layers": 1, "vocab_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "int-quantized",
            "config_groups": {"group_0": {
                "targets": list(targets), "weights": CHANNEL, "input_activations": INPUTS}},
            "ignore": list(ignore),
        },
    }  # fmt: skip
    table = quantized(ATTENTION) | tensors
    for name in ("input_layernorm", "post_attention_layernorm"):
        table[f"model.layers.0.{name}.weight"] = torch.ones(H, dtype=torch.bfloat16)
    table["model.norm.weight"] = torch.ones(H, dtype=torch.bfloat16)
    for name in ("model.embed_tokens", "lm_head"):
        table[f"{name}.weight"] = torch.ones(128, H, dtype=torch.bfloat16)
    table["model.layers.0.mlp.gate.weight"] = torch.ones(E, H, dtype=torch.bfloat16)
    folder.mkdir(exist_ok=True)
    save_file(
        {name: values.contiguous() for name, values in table.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def errors(path):
    report = verify(VerifyOptions(path))
    return [f"{f.check}: {f.what} {f.where}" for f in report.findings if f.severity == "error"]


FLOAT = ("lm_head", "re:.*\\.mlp\\..*")


def test_sound_ones(tmp_path):
    """Of each form that the loader takes."""
    assert errors(build(tmp_path / "a", "qwen3_moe", quantized(single()))) == []
    int8 = stacks(dtype=torch.int8)
    assert errors(build(tmp_path / "b", "qwen3_5_moe", int8 | scales())) == []
    assert errors(build(tmp_path / "c", "qwen3_5_moe", stacks(), ignore=FLOAT)) == []
    path = "model.layers.0.feed_forward.experts"
    floats = ("lm_head", "re:.*\\.feed_forward\\..*", "re:.*\\.mlp\\.gate$")
    assert errors(build(tmp_path / "d", "llama4_text", stacks(path, turned=True), ignore=floats)) == []
    assert errors(build(tmp_path / "e", "llama4_text", quantized(single(path)))) == []
    assert errors(build(tmp_path / "f", "gpt_oss", stacks(turned=True), ignore=FLOAT)) == []


def one(found, *says):
    assert any(all(word in error for word in says) for error in found), found


@pytest.mark.parametrize(
    "end", ["_weight_scale", ".weight", ".weight_scale", "_weight", ".scale", "_scale_2"]
)
def test_names_that_make_no_parameter(tmp_path, end):
    int8 = stacks(dtype=torch.int8) | scales()
    int8[f"{EXPERTS}.gate_up_proj{end}"] = int8.pop(f"{EXPERTS}.gate_up_proj_scale")
    found = errors(build(tmp_path / "m", "qwen3_5_moe", int8))
    one(found, "no parameter has this name", f"`{EXPERTS}.gate_up_proj{end}`")


def test_codes_without_scales(tmp_path):
    found = errors(build(tmp_path / "m", "qwen3_5_moe", stacks(dtype=torch.int8)))
    one(found, "there is no `gate_up_proj_scale`", "what memory holds")
    one(found, "there is no `down_proj_scale`")


@pytest.mark.parametrize("shape", [(E, 2), (E,)])
def test_scales_of_whole_weights_are_not_stacked(tmp_path, shape):
    int8 = stacks(dtype=torch.int8) | scales()
    int8[f"{EXPERTS}.gate_up_proj_scale"] = torch.ones(shape)
    one(errors(build(tmp_path / "m", "qwen3_5_moe", int8)), "scales of stacked codes have three sides")


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        ((r"re:.*experts\.(gate_up|down)_proj$", r"re:.*self_attn.*"), ("lm_head",)),
        (("Linear",), ("lm_head", f"{EXPERTS}.0.gate_proj")),
        (("Linear",), ("lm_head", r"re:.*\.experts\.0\..*")),
    ],
)
def test_quantized_stacks_that_the_engine_builds_as_float(tmp_path, targets, ignore):
    int8 = stacks(dtype=torch.int8) | scales()
    found = errors(build(tmp_path / "m", "qwen3_5_moe", int8, targets, ignore))
    one(found, f"looks up `{EXPERTS}.0.gate_proj`", "take codes for weights", f"`{EXPERTS}`")


@pytest.mark.parametrize("ignore", [("lm_head",), ("lm_head", f"{EXPERTS}.gate_up_proj")])
def test_float_stacks_that_the_engine_builds_as_quantized(tmp_path, ignore):
    found = errors(build(tmp_path / "m", "qwen3_5_moe", stacks(), ignore=ignore))
    one(found, "which makes them quantized, and they are float")


def test_single_experts_that_ignore_names_by_expert_0(tmp_path):
    ignore = ("lm_head", *(f"{EXPERTS}.0.{name}_proj" for name in ("gate", "up", "down")))
    found = errors(build(tmp_path / "m", "qwen3_moe", quantized(single()), ignore=ignore))
    one(found, "is in `ignore`", f"{EXPERTS}.0")
    one(found, "experts of one layer must have one scheme", f"{EXPERTS}.1")


def test_llama_4_with_both_forms(tmp_path):
    path = "model.layers.0.feed_forward.experts"
    other = "model.layers.1.feed_forward.experts"
    both = stacks(path, turned=True) | quantized(single(other))
    ignore = ("lm_head", r"re:.*layers\.0\.feed_forward\..*")
    found = errors(build(tmp_path / "m", "llama4_text", both, ignore=ignore))
    one(found, "leaves single ones out", f"`{other}.0.")


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "gemma4_text", "mistral4"])
@pytest.mark.parametrize("width", [W, I])
def test_stacks_with_their_sides_exchanged(tmp_path, kind, width):
    """Also if H = 2 I: then `down_proj` tells."""
    path = "model.layers.0.experts" if kind == "gemma4_text" else EXPERTS
    ignore = ("lm_head", r"re:.*experts.*", r"re:.*\.mlp\.gate$")
    sound = errors(build(tmp_path / "sound", kind, stacks(path, width), ignore=ignore))
    assert sound == []
    found = errors(build(tmp_path / "m", kind, stacks(path, width, turned=True), ignore=ignore))
    one(found, "experts: ", "stores experts as")


def test_the_order_that_qwen3_vl_is_saved_in_is_not_the_engines(tmp_path):
    found = errors(build(tmp_path / "m", "qwen3_vl_moe_text", stacks(), ignore=FLOAT))
    one(found, "does not take a stack in this order", f"`{EXPERTS}.")
    turned = build(tmp_path / "sound", "qwen3_vl_moe_text", stacks(turned=True), ignore=FLOAT)
    assert errors(turned) == []


# -- gpt-oss -------------------------------------------------------------------------------------


def test_single_experts_of_gpt_oss_are_skipped(tmp_path):
    found = errors(build(tmp_path / "m", "gpt_oss", quantized(single())))
    one(found, "experts of `gpt_oss` cannot be quantized", "uninitialised memory")


def test_single_float_experts_of_gpt_oss_are_skipped(tmp_path):
    floats = {f"{name}.weight": torch.ones(shape).bfloat16() for name, shape in single().items()}
    found = errors(build(tmp_path / "m", "gpt_oss", floats, ignore=FLOAT))
    one(found, "skips this name without a word", f"`{EXPERTS}.0.gate_proj.weight`")


@pytest.mark.parametrize("end", ["_scale", "_weight_scale", ".weight"])
def test_stacks_of_gpt_oss_under_other_names_are_skipped(tmp_path, end):
    int8 = stacks(dtype=torch.int8, turned=True)
    int8[f"{EXPERTS}.gate_up_proj{end}"] = torch.ones(E, 1, 2 * W)
    found = errors(build(tmp_path / "m", "gpt_oss", int8))
    one(found, "skips it without a word", f"`{EXPERTS}.gate_up_proj{end}`")


# -- static inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize(("up", "sound"), [(0.02, True), (0.021, False)])
def test_gate_and_up_have_one_scale_of_inputs(tmp_path, up, sound):
    path = build(tmp_path / "m", "qwen3_moe", {})
    tensors = {}
    for name, (n, k) in (ATTENTION | single()).items():
        tensors[f"{name}.weight"] = torch.ones(n, k).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = torch.full((n, 1), 0.01)
        value = up if name.endswith(f"{EXPERTS}.1.up_proj") else 0.02
        tensors[f"{name}.input_scale"] = torch.tensor([value])
    build(tmp_path / "m", "qwen3_moe", tensors)
    config = json.loads((path / "config.json").read_text())
    block = config["quantization_config"]
    group = block["config_groups"]["group_0"]
    block["format"] = "float-quantized"
    group["weights"] = {**CHANNEL, "type": "float"}
    group["input_activations"] = {
        "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    found = errors(path)
    if sound:
        assert not any("refuses two for one input" in error for error in found)
    else:
        one(found, "refuses two for one input", f"`{EXPERTS}.1.")
