"""gpt-oss from the command line: experts from MXFP4 and bfloat16, as stacks alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.calibrating import Bench, change_tensors, make_bench, write_tokenizer
from tests.e2e.conftest import run_cli
from tests.tiny_models import make_mxfp4, make_tiny

FLOAT = 'target: compressed-tensors\nrules: [{match: "*", scheme: bf16}]\n'
ATTENTION = """\
target: compressed-tensors
rules:
  - match: "*.self_attn.*_proj"
    scheme: w8a8_dynamic
"""
ALL = 'target: compressed-tensors\nrules: [{match: "*_proj", scheme: w8a8_dynamic}]\n'
STACK = "model.layers.2.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gpt_oss")
    made = {"mxfp4": make_mxfp4(root / "mxfp4"), "bf16": make_tiny(root / "bf16", "gpt_oss")}
    for folder in made.values():
        write_tokenizer(folder)
    return made


@pytest.fixture
def make(tmp_path: Path, models: dict[str, Path]) -> Callable[..., Bench]:
    return lambda recipe, kind="mxfp4": make_bench(tmp_path, models[kind], recipe)


def parameters(folder: Path, **more: object) -> dict[str, torch.Tensor]:
    """What transformers makes of a checkpoint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more)
    return dict(model.named_parameters())


def test_decoded_it_is_what_the_library_decodes(make: Callable[..., Bench]) -> None:
    from transformers import Mxfp4Config

    bench = make(FLOAT)
    result = bench.run()
    assert result.code == 0, result.err
    assert "decoded from mxfp4 in groups of 32: 8 modules" in result.out
    expected = parameters(bench.model, quantization_config=Mxfp4Config(dequantize=True))
    found = parameters(bench.out)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert found[STACK].shape == (8, 64, 192)
    assert bool(found[STACK].any())


def test_bytes_do_not_depend_on_workers(make: Callable[..., Bench]) -> None:
    bench, other = make(FLOAT), make(FLOAT).at("other")
    assert bench.run("--workers", 1).code == other.run("--workers", 3).code == 0
    names = [file.name for file in bench.out.glob("*.safetensors")]
    assert names
    for name in names:
        assert (bench.out / name).read_bytes() == (other.out / name).read_bytes()


@pytest.mark.parametrize("kind", ["mxfp4", "bf16"])
def test_attention_is_quantized_and_experts_stay_stacks(make: Callable[..., Bench], kind: str) -> None:
    bench = make(ATTENTION, kind)
    result = bench.run()
    assert result.code == 0, result.err
    (file,) = bench.out.glob("*.safetensors")
    tensors = load_file(file)
    assert tensors[STACK].dtype == torch.bfloat16
    assert not [name for name in tensors if ".experts.0." in name or "_blocks" in name]
    assert tensors["model.layers.2.self_attn.q_proj.weight"].dtype == torch.int8
    if kind == "bf16":
        assert torch.equal(tensors[STACK], load_file(bench.model / "model.safetensors")[STACK])
    found = run_cli("verify", bench.out, "--full", "--against", bench.model, "--json")
    assert found.code == 0, found.err
    assert len(found.json["modules"]) == 4 * 4


@pytest.mark.parametrize("kind", ["mxfp4", "bf16"])
def test_quantized_experts_are_refused_with_what_works(make: Callable[..., Bench], kind: str) -> None:
    bench = make(ALL, kind)
    refused = bench.run()
    assert refused.code == 2
    assert "experts of `gpt_oss` cannot be quantized" in refused.err
    assert "gpt_oss.py:1167-1286" in refused.err
    assert "scheme: keep" in refused.err
    assert not bench.out.exists()


def test_a_damaged_stack_is_found(make: Callable[..., Bench]) -> None:
    bench = make(ATTENTION)
    assert bench.run().code == 0
    (bench.out / "model-00001-of-00001.safetensors").rename(bench.out / "model.safetensors")
    for name in ("model.safetensors.index.json", "quantcli_manifest.json"):
        (bench.out / name).unlink()

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[STACK][5, 10, 7] += 8.0

    change_tensors(bench.out, damage)
    found = run_cli("verify", bench.out, "--against", bench.model, "--json")
    assert found.code == 1
    errors = [f for f in found.json["findings"] if f["severity"] == "error"]
    assert any("experts.5.gate_up_proj" in f"{e['where']}{e['what']}" for e in errors)
