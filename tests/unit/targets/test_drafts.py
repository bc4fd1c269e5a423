"""Stand-alone drafts: what is one, the names that engines look up, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.detect import Draft, draft_of
from quantcli.checkpoint.head import lm_head
from quantcli.checkpoint.roles import roles_of
from quantcli.cli.inspect import show_inspection
from quantcli.cli.output import Output
from quantcli.commands import quantize as commands
from quantcli.commands.inspect import inspect
from quantcli.commands.verify import run as verify
from quantcli.core.errors import InputError
from quantcli.verification.options import VerifyOptions
from tests.tiny_drafts import DRAFTS, LLAMA, attention, drawn, make_draft, mlp, norms, save_draft
from tests.tiny_models import make_tiny

CT = "compressed-tensors"
INT8 = {"match": ["*_proj", "fc"], "scheme": "w8a8_dynamic"}
KEPT = {"match": ["*.down_proj", "*.[qkv]_proj", "fc"], "scheme": "keep"}
ENGINE = {
    "eagle": Draft("EAGLE", "EagleLlamaForCausalLM"),
    "eagle3": Draft("EAGLE3", "Eagle3LlamaForCausalLM"),
    "eagle3_named": Draft("EAGLE3", "LlamaForCausalLMEagle3"),
    "eagle3_speculators": Draft("EAGLE3", "Eagle3LlamaForCausalLM"),
    "eagle3_qwen3": Draft("EAGLE3", "Eagle3Qwen3ForCausalLM"),
    "eagle3_deepseek": Draft("EAGLE3", "Eagle3DeepseekV2ForCausalLM"),
    "eagle_deepseek": Draft("EAGLE", "EagleDeepSeekMTPModel"),
    "dflash": Draft("DFlash", "DFlashDraftModel"),
    "medusa": Draft("Medusa", "MedusaModel"),
    "medusa_old": Draft("Medusa", "MedusaModel"),
    "mlp_speculator": Draft("MLP speculator", "MLPSpeculatorPreTrainedModel"),
}
LOADED = ("eagle", "eagle3", "eagle3_named", "eagle3_speculators", "eagle3_qwen3", "dflash")


def convert(folder: Path, model: Path, target: str, *rules: dict[str, Any]) -> Path:
    recipe = folder.with_name(folder.name + ".yaml")
    recipe.write_text(json.dumps({"target": target, "rules": rules}))
    commands.quantize(commands.plan(recipe, model=str(model), out=folder))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    block: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return block


# -- what is a draft ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAFTS)
def test_drafts_are_found_and_named(tmp_path: Path, name: str) -> None:
    model = make_draft(tmp_path / "draft", name)
    assert draft_of(open_checkpoint(model)) == ENGINE[name]
    assert inspect(str(model))["draft"] == ENGINE[name].kind
    stored = any(tensor.startswith("lm_head.") for tensor in load_file(model / "model.safetensors"))
    assert lm_head(open_checkpoint(model)) == ("stored" if stored else "none")


@pytest.mark.parametrize("name", ["eagle", "eagle3", "eagle3_speculators", "eagle3_deepseek"])
def test_roles_of_the_one_layer(tmp_path: Path, name: str) -> None:
    """A recipe by roles finds it, under its own name."""
    found = roles_of(open_checkpoint(make_draft(tmp_path / "draft", name)))
    layer = "midlayer" if name in ("eagle3", "eagle3_deepseek") else "layers.0"
    assert found[f"{layer}.self_attn.o_proj"] == "attention.out"
    assert found[f"{layer}.mlp.down_proj"].startswith("mlp")
    assert ("layers.0.mlp.down_proj" in found) == (layer == "layers.0")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_models_are_not_drafts(tmp_path: Path, family: str) -> None:
    model = make_tiny(tmp_path / "model", family)
    assert draft_of(open_checkpoint(model)) is None
    assert inspect(str(model))["draft"] is None


@pytest.mark.parametrize("config", [
    {"architectures": ["Eagle2_5_VLForConditionalGeneration"]}, {},
    {"architectures": ["DeepSeekMTPModel"]},
])  # fmt: skip
def test_a_model_with_layers_of_its_own_is_not_a_draft(tmp_path: Path, config: dict[str, Any]) -> None:
    tensors = drawn({"model.layers.0.mlp.fc": (8, 8), "model.norm": (8,), "layers.0.x": (8, 8)})
    model = save_draft(tmp_path / "m", {"torch_dtype": "bfloat16", **config}, tensors)
    assert draft_of(open_checkpoint(model)) is None


# -- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADED)
def test_names_are_those_of_the_engine_and_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    """Layers have the numbers after the target's, and siblings the name under which they are fused."""
    out = convert(tmp_path / "out", make_draft(tmp_path / "draft", name), CT, KEPT, INT8)
    entries = [re.compile(entry.removeprefix("re:")) for entry in config_of(out)["ignore"]]
    assert config_of(out)["config_groups"]["group_0"]["targets"] == ["Linear"]
    layer = "model.layers.61"
    for kept in (f"{layer}.self_attn.qkv_proj", f"{layer}.mlp.down_proj", "model.fc", "fc"):
        assert any(entry.match(kept) for entry in entries), kept
    for quantized in (f"{layer}.self_attn.o_proj", f"{layer}.mlp.gate_up_proj", "midlayer.mlp.up_proj"):
        assert not any(entry.match(quantized) for entry in entries), quantized
    assert verify(VerifyOptions(out, full=True))["ok"]


def test_groups_have_the_names_of_the_engine(tmp_path: Path) -> None:
    fp8 = {"match": "*.down_proj", "scheme": "fp8_dynamic"}
    out = convert(tmp_path / "out", make_draft(tmp_path / "draft", "eagle3"), CT, fp8, INT8)
    targets = {
        group["weights"]["type"]: [re.compile(entry.removeprefix("re:")) for entry in group["targets"]]
        for group in config_of(out)["config_groups"].values()
    }
    for name, kind in (("model.layers.9.mlp.down_proj", "float"), ("model.fc", "int"),
                       ("model.layers.9.self_attn.qkv_proj", "int"),
                       ("model.layers.9.mlp.gate_up_proj", "int")):  # fmt: skip
        assert [k for k, found in targets.items() if any(one.match(name) for one in found)] == [kind]


def test_gptq_lists_parts_of_names(tmp_path: Path) -> None:
    rule = {"match": ["*_proj", "fc"], "scheme": {"name": "w4a16", "group_size": 32}}
    out = convert(tmp_path / "out", make_draft(tmp_path / "draft", "eagle3"), "gptq", KEPT, rule)
    block = config_of(out)
    parts = block["modules_in_block_to_quantize"]
    excluded = [re.compile(rule.removeprefix("-:")) for rule in block["dynamic"]]

    def quantized(name: str) -> bool:
        return any(part in name for part in parts) and not any(one.match(name) for one in excluded)

    assert quantized("model.layers.9.self_attn.o_proj")
    assert quantized("model.layers.9.mlp.gate_up_proj")
    assert not quantized("model.layers.9.self_attn.qkv_proj")
    assert not quantized("model.fc")
    assert verify(VerifyOptions(out, full=True))["ok"]


@pytest.mark.parametrize(("names", "lost"), [
    (["midlayer.mlp.down_proj", "midlayer.self_attn.q_proj", "midlayer.self_attn.k_proj",
      "midlayer.self_attn.v_proj", "model.fc", "lm_head"], "`midlayer.self_attn.k_proj.weight_scale`"),
    (["re:.*down_proj", "re:.*qkv_proj", "fc", "lm_head"], "`fc.weight_scale`"),
])  # fmt: skip
def test_verify_finds_names_that_the_engine_does_not_look_up(
    tmp_path: Path, names: list[str], lost: str
) -> None:
    """vLLM would serve scales of uninitialised memory: tests/engine/test_drafts.py shows it."""
    out = convert(tmp_path / "out", make_draft(tmp_path / "draft", "eagle3"), CT, KEPT, INT8)
    config = json.loads((out / "config.json").read_text())
    for ignore, found in ((config["quantization_config"]["ignore"], False), (names, True)):
        config["quantization_config"]["ignore"] = ignore
        (out / "config.json").write_text(json.dumps(config))
        errors = [
            one["what"]
            for one in verify(VerifyOptions(out))["findings"]
            if one["check"] == "parameters"
        ]
        assert any(lost in what for what in errors) == found, errors


# -- what is carried along ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADED)
def test_tables_of_tokens_and_embeddings_stay_as_they_are(tmp_path: Path, name: str) -> None:
    model = make_draft(tmp_path / "draft", name)
    source, stored = load_file(model / "model.safetensors"), {}
    for file in convert(tmp_path / "out", model, CT, INT8).glob("*.safetensors"):
        stored |= load_file(file)
    kept = [key for key in source if not key.endswith(("_proj.weight", "fc.weight"))]
    assert {"d2t", "t2d"} <= {*kept} or name in ("eagle", "dflash")
    for key in kept:
        assert torch.equal(stored[key], source[key])
        assert stored[key].dtype == source[key].dtype
    assert stored["fc.weight"].dtype == torch.int8
    report = verify(VerifyOptions(tmp_path / "out", full=True, against=str(model)))
    assert report["ok"], report["findings"]


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reason"), [
    ("medusa", "without a quantization (its medusa.py:20-30"),
    ("medusa_old", "without a quantization (its medusa.py:20-30"),
    ("mlp_speculator", "without a quantization (its mlp_speculator.py"),
    ("eagle_deepseek", "of the model that it drafts for, not with its own (its deepseek_eagle.py:44"),
])  # fmt: skip
@pytest.mark.parametrize("target", [CT, "fp8", "gptq"])
def test_classes_that_load_no_quantized_draft(
    tmp_path: Path, name: str, reason: str, target: str
) -> None:
    model = make_draft(tmp_path / "draft", name)
    with pytest.raises(InputError, match=re.escape(reason)):
        convert(tmp_path / "out", model, target, INT8)


def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    config = LLAMA | {"architectures": ["OtherForCausalLM"]}
    model = save_draft(
        tmp_path / "draft", config, drawn({"fc": (64, 128), "layers.0.mlp.up_proj": (96, 64)})
    )
    with pytest.raises(InputError, match=r"`EagleOtherForCausalLM`.*registry.py:625-700"):
        convert(tmp_path / "out", model, CT, INT8)


def test_ascend_refuses_drafts_before_it_reads_them(tmp_path: Path) -> None:
    model = make_draft(tmp_path / "draft", "eagle3")
    (model / "model.safetensors").write_bytes(
        (model / "model.safetensors").read_bytes()[:-1000] + bytes(1000)
    )
    with pytest.raises(InputError, match=r"whole names.*modelslim_config.py:709-808"):
        convert(tmp_path / "out", model, "ascend", INT8)


def test_layers_of_a_draft_must_be_alike(tmp_path: Path) -> None:
    """Their numbers are those after the target's, which a config cannot know."""
    shapes = {"fc": (64, 128)}
    for layer in ("layers.0", "layers.1"):
        shapes |= attention(layer) | mlp(layer) | norms(layer, "post_attention_layernorm")
    model = save_draft(tmp_path / "draft", LLAMA | {"num_hidden_layers": 2}, drawn(shapes))
    with pytest.raises(InputError, match=r"`layers.0.mlp.down_proj` int8.*after those of its target"):
        convert(
            tmp_path / "out", model, CT, {"match": "layers.1.mlp.down_proj", "scheme": "keep"}, INT8
        )
    assert convert(tmp_path / "alike", model, CT, KEPT, INT8).is_dir()


def test_fp8_cannot_name_a_float_part_of_a_layer(tmp_path: Path) -> None:
    model = make_draft(tmp_path / "draft", "eagle")
    rule = {"match": "*_proj", "scheme": "fp8_tensor"}
    with pytest.raises(InputError, match="can only name it in full"):
        convert(tmp_path / "out", model, "fp8", KEPT, rule)
    whole = convert(tmp_path / "whole", model, "fp8", rule)  # `fc` has a name without a number
    assert "model.fc" in config_of(whole)["modules_to_not_convert"]
    assert verify(VerifyOptions(whole, full=True))["ok"]


def test_a_draft_is_not_calibrated(tmp_path: Path) -> None:
    """Its class is that of the target's layers: transformers would build another model."""
    model = make_draft(tmp_path / "draft", "eagle3")
    rule = {"match": "*_proj", "scheme": "w8a8_static"}
    with pytest.raises(InputError, match=r"draft \(EAGLE3\).*hidden states of another model"):
        convert(tmp_path / "out", model, CT, rule)


def test_inspect_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_draft(tmp_path / "draft", "eagle3")
    show_inspection(Output(as_json=False), inspect(str(model)))
    assert "draft         EAGLE3" in capsys.readouterr().out
