"""Other architectures, tiny and random: biases, tied embeddings, experts."""

import pytest
import torch

from tests.engine.conftest import FAMILIES, ours
from tests.engine.harness import Answer, distance

pytestmark = pytest.mark.engine

CASES = [(family, name) for family, formats in FAMILIES.items() for name in formats]
# mean |change of log-probability| from float, from and to; and what share of it vLLM and quantcli may
# be apart beyond bfloat16: inputs round again wherever bfloat16 rounded before them, weights do not
NUMBERS = {
    "int8-dynamic": ((0.02, 0.07), 0.8),
    "fp8-dynamic": ((0.06, 0.2), 0.8),
    "w4a16": ((0.15, 0.5), 0.05),
}
# layers of these add less than half of what attention gives to the hidden states, and one has none;
# experts stay float in all forms but int8-dynamic
OF_ATTENTION = {"granitemoe": 0.4, "granitemoehybrid": 0.2}


def apart(answer, scores):
    return float((torch.tensor(answer.log_probs) - scores).abs().mean())


@pytest.fixture(scope="module")
def floats(families):
    """How far vLLM in bfloat16 is from quantcli's replay, for each float model."""
    answers = {family: families.answers[family] for family in FAMILIES}
    assert all(isinstance(answer, Answer) for answer in answers.values()), answers
    return {
        family: apart(answer, ours(families.folders[family], families.ids))
        for family, answer in answers.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_float_answers_are_those_of_transformers(floats, family):
    assert floats[family] < 0.02


@pytest.mark.parametrize(("family", "form"), CASES)
def test_converted_answers_are_ours(families, floats, family, form):
    """All tensors arrive: biases are added, fused siblings keep their own scales."""
    name = f"{family}-{form}"
    answer = families.answers[name]
    assert isinstance(answer, Answer), answer
    far = distance(answer, families.answers[family])
    (least, most), share = NUMBERS[form]
    weight = OF_ATTENTION.get(family, 1.0) if form != "int8-dynamic" else 1.0
    assert least * weight < far.change < most * weight
    scores = ours(families.folders[name], families.ids)
    assert apart(answer, scores) < floats[family] + share * far.change
