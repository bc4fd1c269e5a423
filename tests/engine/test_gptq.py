"""Target gptq served by vLLM: the same numbers as compressed-tensors, by the kernels of its format."""

import pytest

from tests.engine.conftest import CT, SAME
from tests.engine.harness import Answer, Refused

pytestmark = pytest.mark.engine

# how many of the 25 fused linears and the head each recipe leaves float
FLOAT_LINEARS = {"mixed": 4, "head": 0}


def both(answers, prefix=""):
    found = [answers[f"{prefix}{target}"] for target in ("gptq", CT)]
    assert all(isinstance(answer, Answer) for answer in found), found
    return found


@pytest.mark.parametrize("name", SAME)
def test_the_same_answers_as_compressed_tensors(twice, name):
    ours, theirs = both(twice.answers, f"{name}-")
    assert ours.log_probs == theirs.log_probs
    assert ours.continued == theirs.continued
    assert 30 < ours.perplexity < 45


@pytest.mark.parametrize("name", SAME)
def test_rules_by_name_are_those_that_were_meant(twice, name):
    """What `dynamic` excludes is float, all else has codes, also the head."""
    kernels = twice.answers[f"{name}-gptq"].kernels
    floats, heads = FLOAT_LINEARS[name], int(name == "head")
    assert kernels["AutoGPTQLinearMethod > CPUWNA16LinearKernel"] == 24 + heads - floats
    assert kernels.get("UnquantizedLinearMethod", 0) == floats
    assert kernels["UnquantizedEmbeddingMethod"] == 2 - heads


def test_float_experts_next_to_codes(twice):
    ours, theirs = both(twice.experts)
    assert ours.log_probs == theirs.log_probs
    assert any("UnquantizedFusedMoE" in kernel for kernel in ours.kernels)
    assert any("AutoGPTQ" in kernel for kernel in ours.kernels)


def test_eight_bits_are_for_gpus(twice):
    """As the plan says: vLLM's CPU build has no kernel for them."""
    refused = twice.answers["int8"]
    assert isinstance(refused, Refused)
    assert "weight_bits = uint8b128" in refused.error
