"""Checkpoints for vLLM loaded by transformers with the library that defines the format: what our
tensors mean to an implementation that is not ours."""

from pathlib import Path

import pytest
import torch

from quantcli.calibration.replay.served import Served
from tests.e2e.conftest import run_cli

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-qwen3"
DATA = f"calibration: {{data: {ROOT / 'examples' / 'calibration.txt'}, samples: 4, length: 32}}\n"


def all_of(scheme):
    return f'rules: [{{match: "*_proj", scheme: {{name: {scheme}}}}}]\n'


# Recipe, and the relative error that a module's output may have from ours on the same inputs: rounding
# of float32, but where the library gives tokens another scale (amax / 127.5) than engines do.
EXACT, TOKENS_INT8, TOKENS_FP8 = 1e-6, 0.012, 0.06
CASES = {
    "int8_dynamic": (all_of("w8a8_dynamic"), TOKENS_INT8),
    "int8_static": (DATA + all_of("w8a8_static, observer: minmax"), EXACT),
    "int8_static_symmetric": (DATA + all_of("w8a8_static, observer: minmax, symmetric: true"), EXACT),
    "fp8_dynamic": (all_of("fp8_dynamic"), TOKENS_FP8),
    "fp8_static": (DATA + all_of("fp8_static, observer: minmax"), EXACT),
    "w4a16": (all_of("w4a16"), EXACT),
    "w4a16_channel": (all_of("w4a16, group_size: channel"), EXACT),
    "w8a16": (all_of("w8a16"), EXACT),
    "mixed": (
        'rules:\n  - {match: "*.0.*_proj", scheme: {name: w4a16, group_size: 32}}\n'
        '  - {match: "*.1.*_proj", scheme: keep}\n  - {match: "*.mlp.*_proj", scheme: fp8_block}\n'
        '  - {match: ["*_proj", lm_head], scheme: w8a8_dynamic}\n',
        TOKENS_FP8,
    ),
}
IDS = (torch.arange(5, 69) * 7 % 4096)[None]


def logits(folder, calls=None):
    """Of one model in float32; calls: inputs and outputs of its linears, by name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if calls is not None and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, x, y, name=name: calls.__setitem__(name, (x[0].detach(), y.detach()))
            )
    with torch.no_grad():
        return model, model(IDS).logits.log_softmax(-1)


@pytest.fixture(scope="module")
def reference():
    return logits(MODEL)[1]


@pytest.mark.parametrize("case", CASES)
def test_the_library_means_what_we_mean(case, tmp_path, reference):
    recipe, most = CASES[case]
    (tmp_path / "recipe.yaml").write_text(f"target: compressed-tensors\n{recipe}")
    out = tmp_path / "out"
    made = run_cli("quantize", tmp_path / "recipe.yaml", "--model", MODEL, "--out", out)
    assert made.code == 0, made.err
    calls = {}
    model, found = logits(out, calls)
    kl = (reference.exp() * (reference - found)).sum(-1).mean()
    assert 1e-5 < float(kl) < 0.06
    served, modules = Served.open(out), dict(model.named_modules())
    names = [name for name in calls if f"{name}.weight_scale" in served.checkpoint.tensors]
    assert len(names) == (36 if case == "mixed" else 42)
    for name in names:
        scheme, parts = served.quantizer(name, torch.zeros(0), None)
        assert torch.equal(modules[name].weight.data, scheme.dequantize(parts)), name
        x, theirs = calls[name]
        ours = scheme.forward(x, parts)
        assert float((ours - theirs).norm() / theirs.norm()) < most, name
