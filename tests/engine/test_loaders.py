"""vLLM's own models and loaders take converted checkpoints of the zoo: every parameter is filled, float
ones as in the float model, codes with scales near its weights."""

import json
import subprocess

import pytest

from tests.engine.harness import PYTHON, ROOT, kept_environment
from tests.zoo.make import make
from tests.zoo.pairs import command

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

# Families whose float model vLLM builds on a CPU.
DENSE = ("llama_tied", "gemma3_text", "falcon_h1", "nemotron_h", "lfm2", "gpt_neox", "qwen3_5_text")
MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "deepseek_v2", "deepseek_v3",
    "glm4_moe", "glm4_moe_lite", "minimax_m2", "jamba", "olmoe", "ernie4_5_moe", "hunyuan_moe",
    "exaone_moe", "granitemoe", "granitemoeshared", "granite4_hybrid", "dots1", "lfm2_moe",
    "flex_olmo", "llama4", "qwen3_vl_moe_pub", "qwen3_5_moe_pub",
)  # fmt: skip
# Their loaders do not report what they have filled from single experts or a shared one, so that vLLM
# itself cannot tell; whether an element is empty still can.
UNREPORTED = {"granite4_hybrid", "dots1"}


@pytest.fixture(scope="module")
def answers(environment, tmp_path_factory):
    """What vLLM holds, by checkpoint, after loading it; all in one process."""
    root = tmp_path_factory.mktemp("loaders")
    request, refused = {}, {}
    for name in (*DENSE, *MIXTURES):
        model, out = make(name, root / name), root / f"{name}-int8"
        code, _, said = command("quantize", "vllm_int8_dynamic", "--model", model, "--out", out)
        if code != 0:
            refused[name] = {"float": {"error": said}}
        else:
            request[name] = {"float": str(model), "int8": str(out)}
    (root / "request.json").write_text(json.dumps(request))
    script = ROOT / "tests" / "engine" / "load_models.py"
    done = subprocess.run(
        [PYTHON, script, root / "request.json", root / "answers.json"],
        env=kept_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((root / "answers.json").read_text()) | refused


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_every_parameter_is_filled_with_what_the_float_model_has(answers, name):
    found = answers[name]
    assert found["float"]["error"] is None
    assert found["float"]["empty"] == []
    converted = found["int8"]
    assert converted["error"] is None
    assert (converted["untracked"] is not None) == (name in UNREPORTED)
    assert converted["empty"] == []
    assert converted["changed"] == []
    if name in MIXTURES:
        experts = [error for key, error in converted["apart"].items() if "w13_weight" in key]
        assert experts
    assert len(converted["apart"]) >= 3
    assert 1e-4 < max(converted["apart"].values()) < 0.02  # a matrix in another's place is 1.4 off
