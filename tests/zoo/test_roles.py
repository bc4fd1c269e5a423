"""Roles are those of the modules that transformers builds."""

import pytest

from tests.zoo.roles import LEAST, LESS, compare_type

TYPES = (
    "bert", "deepseek_v3", "falcon_h1", "gpt_neox", "granitemoehybrid", "jamba", "lfm2", "mamba2",
    "mpt", "nemotron_h", "qwen3_5_moe", "qwen3_next", "t5", "whisper",
)  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_of_a_model_type(model_type):
    found = compare_type(model_type)
    assert found.wrong == []
    assert found.share >= LEAST
    assert model_type not in LESS
