"""Checkpoints for vLLM loaded by transformers with the library that defines the format: what our
tensors mean to an implementation that is not ours."""

from pathlib import Path

import pytest
import torch

from quantcli.calibration.replay.served import Served
from quantcli.targets.fp8.kinds import BLOCK, layout_of, numerics_of
from tests.e2e.conftest import run_cli
from tests.tiny_models import LAYOUTS, make_layout

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-qwen3"
DATA = f"calibration: {{data: {ROOT / 'examples' / 'calibration.txt'}, samples: 4, length: 32}}\n"


def all_of(scheme):
    return f'rules: [{{match: "*_proj", scheme: {{name: {scheme}}}}}]\n'


# Recipe, and the relative error that a module's output may have from ours on the same inputs: rounding
# of float32, but where the library gives tokens another scale (amax / 127.5) than engines do.
EXACT, TOKENS_INT8, TOKENS_FP8 = 1e-6, 0.012, 0.06
# ... and but where it computes in bfloat16, which it makes of weights with scales of eight bits; and
# gives groups of inputs other scales, in the last bits or by rounding the global one.
IN_BFLOAT16, NVFP4A16_BF16, GROUPS_BF16, NVFP4_BF16 = 1e-4, 1e-3, 0.02, 0.04
BFLOAT16 = {IN_BFLOAT16, NVFP4A16_BF16, GROUPS_BF16, NVFP4_BF16}
CASES = {
    "int8_dynamic": (all_of("w8a8_dynamic"), TOKENS_INT8),
    "int8_static": (DATA + all_of("w8a8_static, observer: minmax"), EXACT),
    "int8_static_symmetric": (DATA + all_of("w8a8_static, observer: minmax, symmetric: true"), EXACT),
    "fp8_dynamic": (all_of("fp8_dynamic"), TOKENS_FP8),
    "fp8_static": (DATA + all_of("fp8_static, observer: minmax"), EXACT),
    "mxfp8": (all_of("mxfp8"), IN_BFLOAT16),
    "nvfp4": (DATA + all_of("nvfp4"), NVFP4_BF16),
    "nvfp4a16": (all_of("nvfp4a16"), NVFP4A16_BF16),
    "mxfp4": (all_of("mxfp4"), IN_BFLOAT16),
    "mxfp4a16": (all_of("mxfp4a16"), IN_BFLOAT16),
    "mxfp4_fp8": (all_of("mxfp4_fp8"), GROUPS_BF16),
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


def logits(folder, calls=None, dtype=torch.float32):
    """Log-probabilities of one model; calls: inputs and outputs of its linears, by name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for name, module in model.named_modules():
        if calls is not None and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, x, y, name=name: calls.__setitem__(name, (x[0].detach(), y.detach()))
            )
    with torch.no_grad():
        return model, model(IDS).logits.float().log_softmax(-1)


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
    model, found = logits(out, calls, torch.bfloat16 if most in BFLOAT16 else torch.float32)
    kl = (reference.exp() * (reference - found)).sum(-1).mean()
    assert 1e-5 < float(kl) < (0.2 if case in {"nvfp4", "mxfp4"} else 0.06)
    served, modules = Served.open(out), dict(model.named_modules())
    names = [name for name in calls if f"{name}.weight_scale" in served.checkpoint.tensors]
    assert len(names) == (36 if case == "mixed" else 42)
    for name in names:
        scheme, parts = served.quantizer(name, torch.zeros(0), None)
        parts.pop("float_inputs", None)  # the library rounds inputs as the checkpoint says
        theirs, ours = modules[name].weight.data.float(), scheme.dequantize(parts)
        if case.startswith("nvfp4"):  # two scales in bfloat16
            torch.testing.assert_close(theirs, ours, rtol=2**-8, atol=0)
        else:
            assert torch.equal(theirs, ours), name
        x, theirs = calls[name]
        ours = scheme.forward(x, parts)
        assert float((ours - theirs).float().norm() / theirs.float().norm()) < most, name


# -- names of modules that stay float ------------------------------------------------------------------

KEPT = """\
rules:
  - match: ["*vision*", "*visual*", "*multi_modal*", "*lm_head", "*.gate", "*layers.0.self_attn.*",
            "*layers.1.mlp.*", "*layers.1.block_sparse_moe.*"]
    scheme: keep
    optional: true
  - {match: ["*_proj", "*.w1", "*.w2", "*.w3"], scheme: %s}
"""
SCHEMES = {"fp8": "fp8_block", "compressed-tensors": "fp8_dynamic"}
EXPERTS = {"qwen3_moe", "mixtral"}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """By layout: its folder, the class that loads it, the float model's logits; each made once."""
    made = {}

    def get(layout):
        if layout not in made:
            folder = tmp_path_factory.mktemp(layout)
            loads = make_layout(folder, layout)
            model = loads.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                made[layout] = folder, loads, model(input_ids=IDS % 60).logits
        return made[layout]

    return get


def in_torch(module, x):
    """The product of transformers' linear with fp8 blocks, whose kernel needs an accelerator."""
    stored = {"weight": module.weight, "weight_scale_inv": module.weight_scale_inv}
    weight = layout_of(numerics_of("dynamic", BLOCK)).dequantize(stored)
    return torch.nn.functional.linear(x.float(), weight, module.bias).to(x.dtype)


@pytest.fixture
def fp8_without_accelerator(monkeypatch):
    """transformers keeps fp8 linears as they are, instead of dequantizing all weights that have a scale
    whatever the names to skip say."""
    from transformers.integrations.finegrained_fp8 import FP8Linear
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(FP8Linear, "forward", in_torch)


@pytest.mark.parametrize("target", SCHEMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_that_stay_float_are_float_in_transformers(
    layout, target, tmp_path, layouts, fp8_without_accelerator
):
    """A name that does not match makes it draw a scale for a float module, and compute NaN."""
    from transformers import FineGrainedFP8Config

    model, loads, reference = layouts(layout)
    (tmp_path / "recipe.yaml").write_text(f"target: {target}\n{KEPT % SCHEMES[target]}")
    out = tmp_path / "out"
    made = run_cli("quantize", tmp_path / "recipe.yaml", "--model", model, "--out", out)
    assert made.code == 0, made.err
    found = run_cli("verify", out, "--json").json["findings"]
    assert [f["what"] for f in found if "tokenizer" not in f["what"]] == []
    served, said = loads.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    if layout in EXPERTS and target == "fp8":  # the kernel of experts has no stand-in
        plain = FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True)
        served = loads.from_pretrained(out, quantization_config=plain)
    with torch.no_grad():
        logits = served.eval()(input_ids=IDS % 60).logits.float()
    error = float((logits - reference).norm() / reference.norm())
    assert 1e-4 < error <= 0.05
