"""vLLM's own models and loaders take checkpoints of target modelopt: they find the algorithm of each
module under the name that they build it by, float modules are float, every parameter is filled."""

import json
import re
import subprocess

import pytest

from tests.engine.harness import PYTHON, ROOT, kept_environment
from tests.zoo.make import make
from tests.zoo.pairs import command

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

FAMILIES = (
    "llama_tied", "falcon_h1", "qwen3_5_text", "mixtral", "qwen3_moe", "deepseek_v2", "minimax_m2",
    "exaone_moe", "granite4_hybrid", "lfm2_moe", "llama4", "qwen3_vl_moe_pub",
)  # fmt: skip
EXPERTS = ["expert", "shared_expert", "mlp"]
RULES = {
    "mxfp8": [{"role": ["attention", "ssm", *EXPERTS], "scheme": "mxfp8"}],
    "nvfp4a16": [{"role": ["attention", "ssm", *EXPERTS], "scheme": "nvfp4a16"}],
    "attention": [{"role": ["attention"], "scheme": "mxfp8"}],
    "experts": [{"role": EXPERTS, "scheme": "nvfp4a16"}],
    "mixed": [{"role": ["expert", "shared_expert"], "scheme": "mxfp8", "optional": True},
              {"role": ["mlp"], "scheme": "nvfp4a16", "optional": True},
              {"role": ["attention", "ssm"], "scheme": "fp8_dynamic"}],
}  # fmt: skip
# Loaders that do not report what they have filled from single experts.
UNREPORTED = {"granite4_hybrid"}
FARTHEST = 0.11  # a row of four-bit codes; a matrix in another's place is 1.4 off


@pytest.fixture(scope="module")
def answers(environment, tmp_path_factory):
    """What vLLM holds, by checkpoint, after loading it; all in one process."""
    root = tmp_path_factory.mktemp("loaders")
    recipes = {}
    for form, rules in RULES.items():
        recipes[form] = root / f"{form}.yaml"
        recipes[form].write_text(json.dumps({"target": "modelopt", "rules": rules}))
    request = {}
    for name in FAMILIES:
        request[name] = {"float": str(make(name, root / name))}
        for form, recipe in recipes.items():
            out = root / f"{name}-{form}"
            code, _, said = command("quantize", recipe, "--model", root / name, "--out", out)
            assert code == 0, said
            request[name][form] = str(out)
    (root / "request.json").write_text(json.dumps(request))
    script = ROOT / "tests" / "engine" / "load_models.py"
    done = subprocess.run(
        [PYTHON, script, root / "request.json", root / "answers.json"],
        env=kept_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((root / "answers.json").read_text())


@pytest.mark.parametrize("form", RULES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_filled_with_what_the_float_model_has(answers, name, form):
    assert answers[name]["float"]["error"] is None
    found = answers[name][form]
    assert found["error"] is None
    assert found["changed"] == []
    # a place for the input scale of older exports of weights alone
    assert [one for one in found["empty"] if not one.endswith("input_scale")] == []
    if name not in UNREPORTED:
        left = re.findall(r"'([^']+)'", found["untracked"] or "")
        assert [one for one in left if not one.endswith("input_scale")] == []
    assert found["apart"]
    assert 1e-4 < max(found["apart"].values()) < FARTHEST
