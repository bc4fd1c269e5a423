"""Calibration and `verify --run` of models with two stacks, with layers for the next token, with tables
that layers share, and without a head for text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantcli.calibration.session import Resources
from quantcli.commands import quantize as commands
from quantcli.core.events import Progress
from tests.e2e.calibrating import RECIPE, Bench, make_bench, write_tokenizer
from tests.e2e.conftest import run_cli
from tests.tiny_models import COMMON, save
from tests.unit.calibration.test_stacks import make, make_with_next_token

HEAD = """\
target: compressed-tensors
calibration: {data: text.txt, samples: 4, length: 16}
rules:
"""
STATIC = "    scheme: {name: w8a8_static, observer: minmax}\n"
RULES = {
    "t5": HEAD + '  - match: ["*.q", "*.k", "*.v", "*.o", "*.wi", "*.wo"]\n' + STATIC,
    "gemma4": HEAD + '  - match: ["*.self_attn.*_proj", "*.mlp.*_proj"]\n' + STATIC,
    "glm_moe_dsa": HEAD
    + '  - {match: ["*.indexer.*", "*.kv_b_proj"], scheme: keep}\n'
    + '  - {match: ["*.mlp.*_proj"], scheme: w8a8_dynamic}\n  - match: "*.self_attn.*_proj*"\n'
    + STATIC,
    "deepseek_v3": HEAD
    + '  - {match: ["*.kv_b_proj", "*.eh_proj"], scheme: keep}\n'
    + '  - {match: ["*.mlp.*_proj"], scheme: w8a8_dynamic}\n  - match: "*.self_attn.*_proj*"\n'
    + STATIC,
}


class Stops(Progress):
    """Ctrl-C as soon as a layer is done."""

    def __init__(self, layer: int) -> None:
        self.at = layer

    def layer(self, name: str, index: int, note: str = "") -> None:
        if index == self.at:
            raise KeyboardInterrupt


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    name = request.param
    if name == "deepseek_v3":
        make_with_next_token(tmp_path / "m", name)
    else:
        make(tmp_path / "m", name)
    write_tokenizer(tmp_path / "m")
    return make_bench(tmp_path, tmp_path / "m", RULES[name])


@pytest.mark.parametrize("bench", RULES, indirect=True)
def test_interrupted_after_any_layer(bench: Bench) -> None:
    whole = bench.run("--workers", 1)
    assert whole.code == 0, whole.err
    reports = sorted(bench.store.glob("layer-*.json"))
    for layer in range(len(reports) - 1):
        again = bench.at(f"again{layer}")
        job = commands.plan(again.recipe, model=str(again.model), out=again.out)
        with pytest.raises(KeyboardInterrupt):
            commands.quantize(job, Stops(layer), Resources(workers=2))
        assert any(again.store.glob("*states-*"))
        assert again.run().code == 0
        assert snapshot(again.store) == snapshot(bench.store)
        assert snapshot(again.out) == snapshot(bench.out)
    assert not any(bench.store.glob("*states-*"))


@pytest.mark.parametrize("bench", ["deepseek_v3"], indirect=True)
def test_the_next_token_layer_is_measured(bench: Bench) -> None:
    assert bench.run().code == 0
    report = json.loads((bench.store / "layer-00003.json").read_text())
    module = report["modules"]["model.layers.3.self_attn.q_a_proj"]
    assert module["tokens"] == 4 * 15  # of each sample all but the last
    assert module["input_min"] < 0 < module["input_max"]


@pytest.mark.parametrize("bench", ["deepseek_v3"], indirect=True)
def test_a_next_token_layer_that_cannot_be_followed_is_planned_without_data(bench: Bench) -> None:
    config = bench.model / "config.json"
    text = config.read_text()
    changed = json.loads(text) | {"model_type": "deepseek_v32", "architectures": ["DeepseekV32"]}
    config.write_text(json.dumps(changed))
    planned = bench.run("--plan", "--json")
    assert planned.code == 0, planned.err
    (note,) = [n for n in planned.json["plan"]["notes"] if "next-token" in n]
    # 8 experts and a shared one, of three matrices each, and four projections of attention
    assert "`model.layers.3.mlp.experts.0.down_proj`" in note
    assert "and 26 more take a scheme that needs no data" in note
    assert not any(
        m.startswith("model.layers.3.") for m in planned.json["plan"]["calibration"]["modules"]
    )


def make_model(folder: Path, architecture: str, config_class: str, table: dict) -> Path:
    import transformers

    config = getattr(transformers, config_class)(**table)
    save(folder, getattr(transformers, architecture)(config), torch.bfloat16, 0)
    write_tokenizer(folder)
    return folder


OUTPUTS = {
    "classifier": ("LlamaForSequenceClassification", "LlamaConfig", COMMON | {"num_labels": 3}),
    "bert": ("BertForSequenceClassification", "BertConfig", COMMON | {"num_labels": 3}),
    "backbone": ("LlamaModel", "LlamaConfig", COMMON),
}
DYNAMIC = """\
target: compressed-tensors
rules:
  - {match: ["*layers.*", "*layer.*"], scheme: w8a8_dynamic}
"""


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_models_that_predict_no_text(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "m", *OUTPUTS[name])
    bench = make_bench(tmp_path, model, DYNAMIC)
    assert bench.run().code == 0
    options = ("--run", "--against", model, "--data", tmp_path / "text.txt", "--samples", 4)
    done = run_cli("verify", bench.out, *options, "--length", 16, "--json")
    assert done.code == 0, done.err
    run = done.json["run"]
    assert run["ppl"] is run["kl"] is run["top1_agreement"] is None
    assert 15 < run["outputs_db"] < 80
    numbers = {"classifier": 3 * 4, "bert": 3 * 4, "backbone": 4 * 16 * 64}
    (check,) = [c for c in done.json["checks"] if c["name"] == "outputs"]
    assert (check["checked"], check["failed"]) == (numbers[name], 0)


def test_a_model_that_takes_no_text_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    table = {
        "vocab_size": 128, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96, "num_mel_bins": 80, "max_source_positions": 64, "pad_token_id": 2,
        "max_target_positions": 64, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    model = make_model(tmp_path / "m", "WhisperForConditionalGeneration", "WhisperConfig", table)
    bench = make_bench(tmp_path, model, RECIPE.replace("ascend", "compressed-tensors"))
    result = bench.run()
    assert result.code == 2
    assert "takes `input_features`, and cannot be run on text" in result.err
    assert "schemes that need no data" in result.err
    assert not any(bench.store.glob("*states-*"))


def test_a_type_of_its_own_for_an_architecture_that_the_library_has(tmp_path: Path) -> None:
    """As Kimi K2 comes: with code, which a calibration does not need."""
    model = make_model(tmp_path / "m", "LlamaForCausalLM", "LlamaConfig", COMMON)
    bench = make_bench(tmp_path, model, RECIPE)
    assert bench.run().code == 0
    config = model / "config.json"
    table = json.loads(config.read_text()) | {"model_type": "a_llama_of_ours"}
    table["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config.write_text(json.dumps(table))
    other = bench.at("other")
    assert other.run().code == 0
    for file in bench.store.glob("layer-*.safetensors"):
        assert (other.store / file.name).read_bytes() == file.read_bytes()
    config.write_text(json.dumps(table | {"architectures": ["OursForCausalLM"]}))
    refused = bench.at("third").run()
    assert refused.code == 2
    assert "--trust-remote-code" in refused.err
