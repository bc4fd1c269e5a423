"""gpt-oss served by vLLM: experts decoded from MXFP4, next to quantized attention."""

import pytest

from tests.engine.conftest import CT, convert
from tests.engine.harness import Answer, distance, serve
from tests.tiny_models import make_mxfp4

pytestmark = pytest.mark.engine

ATTENTION = [{"match": "*.self_attn.*_proj", "scheme": "w8a8_dynamic"}]
FLOAT = [{"match": "*", "scheme": "bf16"}]


def test_attention_in_int8_next_to_decoded_experts(environment, tmp_path):
    model = make_mxfp4(tmp_path / "model")
    checkpoints = {
        "float": convert(tmp_path / "float", model, CT, FLOAT),
        "int8": convert(tmp_path / "int8", model, CT, ATTENTION),
    }
    windows = [[(7 * i + 5 * n) % 120 + 3 for i in range(64)] for n in range(4)]
    answers = serve(checkpoints, windows)
    assert all(isinstance(answer, Answer) for answer in answers.values()), answers
    found = distance(answers["int8"], answers["float"])
    assert 0 < found.change < 0.05
    kernels = answers["int8"].kernels
    assert any("UnquantizedFusedMoE" in kernel for kernel in kernels)
    assert any("W8A8Int8" in kernel for kernel in kernels)
