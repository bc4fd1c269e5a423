"""The bundled model in the format of Model-Optimizer: vLLM answers as to the same numbers in that of
llm-compressor."""

import pytest

from tests.engine.conftest import ALL, CT, KEEP, MODEL, convert, text
from tests.engine.harness import Answer, distance, serve

pytestmark = pytest.mark.engine

# rules; "mixed" leaves a layer's attention float, and has a quantized head
RULES = {
    "fp8": [{"match": ALL, "scheme": "fp8_static"}],
    "fp8-channel": [{"match": ALL, "scheme": "fp8_dynamic"}],
    "fp8-block": [{"match": ALL, "scheme": "fp8_block"}],
    "mxfp8": [{"match": ALL, "scheme": "mxfp8"}],
    "nvfp4": [{"match": ALL, "scheme": "nvfp4"}],
    "nvfp4a16": [{"match": ALL, "scheme": "nvfp4a16"}],
    "mixed": [*KEEP, {"match": ["*.mlp.*", "lm_head"], "scheme": "mxfp8"},
              {"match": "*.o_proj", "scheme": "nvfp4"}, {"match": ALL, "scheme": "fp8_dynamic"}],
}  # fmt: skip
KERNELS = {
    "fp8": {"PerTensorTorchFP8ScaledMMLinearKernel": 24},
    "fp8-channel": {"ChannelWiseTorchFP8ScaledMMLinearKernel": 24},
    "fp8-block": {"BlockScaledMM": 24},
    "mxfp8": {"EmulationMxfp8LinearKernel": 24},
    "nvfp4": {"EmulationNvFp4LinearKernel": 24},
    "nvfp4a16": {"NvFp4FloatInputs": 24},
    "mixed": {"EmulationMxfp8LinearKernel": 11, "EmulationNvFp4LinearKernel": 5,
              "ChannelWiseTorchFP8ScaledMMLinearKernel": 5},
}  # fmt: skip
# its method for float inputs has a parameter for the input_scale of older exports, which then is empty
UNTRACKED = ("nvfp4a16-modelopt",)
NO_HEAD = {"mixed"}  # compressed-tensors writes a head that vLLM does not load in MXFP8


@pytest.fixture(scope="module")
def answers(environment, tmp_path_factory):
    root = tmp_path_factory.mktemp("modelopt")
    folders = {"float": MODEL}
    for name, rules in RULES.items():
        for target in ("modelopt", *([CT] if name not in NO_HEAD else [])):
            folders[f"{name}-{target}"] = convert(root / f"{name}-{target}", MODEL, target, rules)
    return serve(folders, text(4), untracked=UNTRACKED)


@pytest.mark.parametrize("name", RULES)
def test_served(answers, name):
    answer = answers[f"{name}-modelopt"]
    assert isinstance(answer, Answer), answer
    linears = {k.rpartition(" > ")[2]: n for k, n in answer.kernels.items() if "ModelOptLinear" in k}
    assert linears == KERNELS[name]
    far = distance(answer, answers["float"])
    assert 0.02 < far.change < 0.2
    assert far.ratio < 1.05


@pytest.mark.parametrize("name", sorted(RULES.keys() - NO_HEAD))
def test_answers_are_those_to_the_same_numbers_in_compressed_tensors(answers, name):
    assert answers[f"{name}-modelopt"].log_probs == answers[f"{name}-{CT}"].log_probs
