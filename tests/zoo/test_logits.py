"""Outputs that transformers computes with converted checkpoints; `make zoo` compares all of the zoo."""

import pytest

from tests.zoo.logits import BARS, run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("name", "recipes"), [
    ("olmo2", ["vllm_int8_dynamic", "vllm_fp8_dynamic"]),
    ("qwen3_moe", ["vllm_fp8_dynamic", "fp8_block", "vllm_w4a16"]),
    ("whisper", ["vllm_int8_dynamic"]),
])  # fmt: skip
def test_outputs_are_near_those_of_the_float_model(name, recipes):
    for found in run(name, None, recipes):
        assert found.error is not None, found.why
        assert 1e-4 < found.error <= BARS[found.recipe]
