"""Fused experts of several families, from the command line: as each target's engine takes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import make_model, tensor
from tests.e2e.calibrating import LENGTH, SAMPLES, Bench, Models, make_bench
from tests.e2e.conftest import Result, run_cli
from tests.e2e.test_stacked import RUN, checked, done, tensors_of
from tests.tiny_models import make_tiny

E, H, I = 8, 64, 48  # noqa: E741
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """Where a family has the experts of a layer, and the stacks that hold them."""

    block: str  # of layer 1
    experts: str
    transposed: bool = False
    router: str = "gate"
    split: bool = False  # gate and up in a stack each

    def matrices(self, source: dict[str, Tensor]) -> dict[str, Tensor]:
        """The float matrices of all experts of layer 1 [e, n, k], by projection."""
        if self.split:
            stacks = [source[f"{self.block}.{name}.weight"] for name in PROJECTIONS]
        else:
            prefix = f"{self.block}.{self.experts}"
            fused, down = (source[f"{prefix}.{name}"] for name in ("gate_up_proj", "down_proj"))
            if self.transposed:
                stacks = [fused[:, :, :I].mT, fused[:, :, I:].mT, down.mT]
            else:
                stacks = [fused[:, :I], fused[:, I:], down]
        assert [stack.shape for stack in stacks] == [(E, I, H), (E, I, H), (E, H, I)]
        return dict(zip(PROJECTIONS, stacks, strict=True))


FAMILIES = {
    "llama4_text": Family("model.layers.1.feed_forward", "experts", transposed=True, router="router"),
    "gemma4_text": Family("model.layers.1", "experts", router="router.proj"),
    "qwen3_vl_moe": Family("model.language_model.layers.1.mlp", "experts", transposed=True),
    "qwen3_5_moe": Family("model.language_model.layers.1.mlp", "experts"),
    "step3p7": Family("model.layers.1.moe", "experts", split=True),
}
LISTED = ("gemma4_text", "qwen3_vl_moe", "qwen3_5_moe")  # by vLLM-Ascend
DYNAMIC = """\
target: {target}
rules:
  - match: "*_proj"
    scheme: {scheme}
"""
KEPT = """\
target: {target}
rules:
  - match: "*.layers.{layers}.*experts.*"
    scheme: keep
  - match: "*_proj"
    scheme: {scheme}
"""
CALIBRATED = f"""\
target: compressed-tensors
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, uncalibrated: dynamic}}
smooth: {{alpha: 0.7, within: 1}}
rules:
  - match: "*.experts.*"
    scheme: {{name: w8a8_dynamic, weight_rounding: gptq}}
  - match: "*_proj"
    scheme: {{name: w8a8_static, observer: minmax}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(tmp_path: Path, models: Models) -> Callable[..., Bench]:
    def made(recipe: str, family: str, **parts: str) -> Bench:
        values = {"target": "compressed-tensors", "scheme": "w8a8_dynamic", "layers": "*", **parts}
        text = recipe if recipe == CALIBRATED else recipe.format(**values)
        return make_bench(tmp_path, models(family), text)

    return made


def verify(bench: Bench, *more: object) -> Any:
    """The JSON report of a verification without errors."""
    found = run_cli("verify", bench.out, "--full", "--against", bench.model, "--json", *more)
    assert found.code == 0, found.out + found.err
    return found.json


def kept_stacks(out: dict[str, Tensor]) -> list[str]:
    return [name for name, t in out.items() if t.dim() == 3 and "conv" not in name]


def refused(result: Result, bench: Bench, what: str) -> None:
    assert result.code == 2
    assert what in result.err
    assert not bench.out.exists()
    assert not bench.partial.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_written_one_by_one(make: Callable[..., Bench], family: str) -> None:
    """Under the names that vLLM takes, each from its own rows or columns; routers stay float."""
    bench, where = make(DYNAMIC, family), FAMILIES[family]
    done(bench.run())
    source, out = tensors_of(bench.model), tensors_of(bench.out)
    for projection, matrices in where.matrices(source).items():
        for expert, matrix in enumerate(matrices.float()):
            module = f"{where.block}.{where.experts}.{expert}.{projection}"
            codes = out[f"{module}.weight"]
            assert codes.dtype == torch.int8
            served = codes.float() * out[f"{module}.weight_scale"].float()
            assert served.shape == matrix.shape
            assert 1e-4 < float((served - matrix).norm() / matrix.norm()) < 0.01
    assert kept_stacks(out) == []
    router = f"{where.block}.{where.router}.weight"
    assert torch.equal(out[router], source[router])
    report = verify(bench, *RUN, "--max-kl", 1, "--max-ppl-ratio", 2)
    assert checked(report, "recomputed") == len(out)
    assert checked(report, "experts") == 4 * E * 3


@pytest.mark.parametrize("family", ["llama4_text", "gemma4_text"])
def test_static_inputs_smoothing_and_gptq(make: Callable[..., Bench], family: str) -> None:
    """Also of experts that multiply all tokens at once: each sees those that the router gave it."""
    bench = make(CALIBRATED, family)
    done(bench.run())
    report = verify(bench, "--calibration", bench.store, *RUN, "--max-kl", 1, "--max-ppl-ratio", 2)
    assert checked(report, "edits") > 8
    args = (bench.recipe, "--model", bench.model, "--out", bench.store, "--json")
    calibrated = json.loads(run_cli("calibrate", *args).out)
    experts = {name: m for name, m in calibrated["modules"].items() if ".experts." in name}
    assert len(experts) == 4 * E * 3
    chosen = 1 if family == "llama4_text" else 2
    tokens = sum(module["tokens"] for module in experts.values())
    assert tokens == 4 * 3 * chosen * SAMPLES * LENGTH
    seen = [m for m in experts.values() if m["tokens"]]
    better = [m["output_error"] < m["output_error_nearest"] for m in seen]
    assert sum(better) > 0.9 * len(better)


@pytest.mark.parametrize("family", FAMILIES)
def test_float_experts_are_copied_as_they_are(make: Callable[..., Bench], family: str) -> None:
    bench = make(KEPT, family)
    done(bench.run())
    source, out = tensors_of(bench.model), tensors_of(bench.out)
    stacks = kept_stacks(source)
    assert len(stacks) == 4 * (3 if FAMILIES[family].split else 2)
    assert kept_stacks(out) == stacks
    assert all(torch.equal(out[name], source[name]) for name in stacks)
    verify(bench)


@pytest.mark.parametrize("family", FAMILIES)
def test_float_experts_of_one_layer(make: Callable[..., Bench], family: str) -> None:
    """The loader of Llama 4 reads all experts as stacks once it has seen one: there is none then."""
    bench, where = make(KEPT, family, layers="1"), FAMILIES[family]
    done(bench.run())
    source, out = tensors_of(bench.model), tensors_of(bench.out)
    stacks = [name for name in kept_stacks(source) if ".layers.1." in name]
    if family != "llama4_text":
        assert kept_stacks(out) == stacks
    else:
        assert kept_stacks(out) == []
        for projection, matrices in where.matrices(source).items():
            for expert, matrix in enumerate(matrices):
                name = f"{where.block}.{where.experts}.{expert}.{projection}.weight"
                assert torch.equal(out[name], matrix)
    verify(bench)


def test_stacks_that_the_engine_would_turn_over_are_not_copied(
    make: Callable[..., Bench], tmp_path: Path
) -> None:
    """transformers saves Qwen3-VL as [out, in]; vLLM takes every stack of it for [in, out]."""
    bench, where = make(KEPT, "qwen3_vl_moe"), FAMILIES["qwen3_vl_moe"]
    published = tensors_of(bench.model)
    bench.model = make_tiny(tmp_path / "saved", "qwen3_vl_moe", num_hidden_layers=4, published=False)
    done(bench.run())
    out = tensors_of(bench.out)
    assert kept_stacks(out) == []
    for projection, matrices in where.matrices(published).items():
        for expert, matrix in enumerate(matrices):
            name = f"{where.block}.{where.experts}.{expert}.{projection}.weight"
            assert torch.equal(out[name], matrix)
    verify(bench)


def test_gate_and_up_share_the_scale_of_a_whole_weight(make: Callable[..., Bench]) -> None:
    """vLLM rounds codes again if they do not; each expert has its own."""
    bench, where = make(DYNAMIC, "qwen3_vl_moe", target="fp8", scheme="fp8_tensor"), "qwen3_vl_moe"
    done(bench.run())
    source, out = tensors_of(bench.model), tensors_of(bench.out)
    floats, scales = FAMILIES[where].matrices(source), []
    for expert in range(E):
        prefix = f"{FAMILIES[where].block}.experts.{expert}"
        gate, up, down = (out[f"{prefix}.{name}.weight_scale"] for name in PROJECTIONS)
        assert torch.equal(gate, up)
        both = torch.stack([floats[name][expert].float() for name in PROJECTIONS[:2]])
        assert float(gate) == pytest.approx(float(both.abs().max()) / 448, rel=1e-3)
        assert not torch.equal(gate, down)
        scales.append(float(gate))
    assert len(set(scales)) > 1
    verify(bench)


@pytest.mark.parametrize("family", LISTED)
def test_ascend_looks_experts_up_one_by_one(make: Callable[..., Bench], family: str) -> None:
    """Also those that are float and stay in their stack; without their entries it stops."""
    bench, where = make(KEPT, family, target="ascend", layers="1"), FAMILIES[family]
    done(bench.run())
    verify(bench)
    path = bench.out / "quant_model_description.json"
    description = json.loads(path.read_text())
    first = f"{where.block}.{where.experts}.0"
    for projection in PROJECTIONS:
        assert description[f"{first}.{projection}.weight"] == "FLOAT"
        other = f"{first}.{projection}.weight".replace("layers.1", "layers.2")
        assert description[other] == "W8A8_DYNAMIC"
    path.write_text(json.dumps({k: v for k, v in description.items() if not k.startswith(first)}))
    (bench.out / "quantcli_manifest.json").unlink()
    found = run_cli("verify", bench.out, "--json")
    assert found.code == 1
    (error,) = [f for f in found.json["findings"] if f["severity"] == "error"]
    assert error["check"] == "loader"
    assert f"does not describe `{first}.gate_proj.weight`" in error["what"]


FEW, WIDTH, INNER = 2, 8, 6  # experts, hidden states, inner width
GPT_OSS = {
    "gate_up_proj": (FEW, WIDTH, 2 * INNER), "gate_up_proj_bias": (FEW, 2 * INNER),
    "down_proj": (FEW, INNER, WIDTH), "down_proj_bias": (FEW, WIDTH),
}  # fmt: skip
DBRX = dict.fromkeys(("w1", "v1", "w2"), (FEW * INNER, WIDTH))
MISREAD = {
    "gpt_oss": ("model.layers.0.mlp.experts.", GPT_OSS, "gpt_oss.py:1167-1286"),
    "openai_privacy_filter": ("model.layers.0.mlp.experts.", GPT_OSS, "uninitialised memory"),
    "dbrx": ("transformer.blocks.0.ffn.experts.mlp.", DBRX, "dbrx.py:88-141,386-420"),
}


@pytest.mark.parametrize("target", ["compressed-tensors", "fp8", "ascend"])
@pytest.mark.parametrize("family", MISREAD)
def test_families_that_the_engine_would_misread_are_refused(
    tmp_path: Path, target: str, family: str
) -> None:
    """The message gives the reason and says what works. No byte of a weight is read before."""
    prefix, shapes, says = MISREAD[family]
    table = {prefix + name: tensor("BF16", *shape, fill=255) for name, shape in shapes.items()}
    table["a.q_proj.weight"] = tensor("BF16", 8, 8, fill=255)
    config = {"model_type": family, "hidden_size": WIDTH, "num_local_experts": FEW, "d_model": WIDTH,
              "ffn_config": {"moe_num_experts": FEW, "ffn_hidden_size": INNER}}  # fmt: skip
    model = make_model(tmp_path / "m", {"model.safetensors": table}, config=config)
    scheme = "fp8_tensor" if target == "fp8" else "w8a8_dynamic"
    recipe = f"target: {target}\nrules: [{{role: [attention, mlp, expert], scheme: {scheme}}}]\n"
    bench = make_bench(tmp_path, model, recipe)
    result = bench.run()
    refused(result, bench, says)
    assert f"{prefix.rpartition('experts.')[0]}experts" in result.err
    assert "`scheme: keep` for its experts" in result.err
