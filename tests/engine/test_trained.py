"""The bundled model, converted and served by vLLM: its own answers against those to the float model."""

import math

import pytest
import torch

from quantcli.calibration.replay.served import Served
from tests.engine.conftest import CONVERTED, ours
from tests.engine.harness import Answer, Refused, distance, serve

pytestmark = pytest.mark.engine

# perplexity over float, from and to; share of places with the same likeliest token, at least; mean
# |change of log-probability|, from and to: a format that was not quantized at all changes nothing
NUMBERS = {
    "int8-dynamic": ((0.998, 1.002), 0.97, (0.015, 0.032)),
    "int8-static": ((0.997, 1.006), 0.95, (0.02, 0.07)),
    "int8-symmetric": ((0.997, 1.006), 0.95, (0.02, 0.07)),
    "fp8-dynamic": ((0.997, 1.005), 0.95, (0.03, 0.06)),
    "w4a16": ((1.0, 1.03), 0.90, (0.07, 0.13)),
    "w4a16-channel": ((1.0, 1.03), 0.89, (0.08, 0.14)),
    "w4a16-asymmetric": ((1.0, 1.03), 0.91, (0.06, 0.12)),
    "mixed": ((0.997, 1.01), 0.93, (0.02, 0.08)),
    "fp8-static": ((0.995, 1.01), 0.93, (0.03, 0.10)),
    "fp8-tensor": ((0.997, 1.006), 0.94, (0.03, 0.06)),
    "fp8-block": ((0.997, 1.005), 0.95, (0.03, 0.06)),
    "mxfp8": ((0.997, 1.003), 0.96, (0.018, 0.04)),
    "nvfp4": ((1.005, 1.05), 0.85, (0.12, 0.18)),
    "nvfp4a16": ((1.0, 1.02), 0.91, (0.06, 0.09)),
    "mxfp4": ((1.01, 1.08), 0.80, (0.16, 0.24)),
    "mxfp4-fp8": ((1.0, 1.04), 0.87, (0.09, 0.13)),
}
# vLLM's class for each, and how many fused linears of the 24 it computes
CLASSES = {
    "int8-dynamic": {"W8A8Int8": 24},
    "int8-static": {"W8A8Int8": 24},
    "int8-symmetric": {"W8A8Int8": 24},
    "fp8-dynamic": {"W8A8Fp8": 24},
    "w4a16": {"WNA16": 24},
    "w4a16-channel": {"WNA16": 24},
    "w4a16-asymmetric": {"WNA16": 24},
    "mixed": {"W8A8Int8": 10, "WNA16": 5, "W8A8Fp8": 5, "UnquantizedLinear": 4},
    "fp8-static": {"W8A8Fp8": 24},
    "fp8-tensor": {"W8A8Fp8": 24},
    "fp8-block": {"W8A8Fp8": 24},
    "mxfp8": {"W8A8Mxfp8": 24},
    "nvfp4": {"W4A4Fp4": 24},
    "nvfp4a16": {"W4A4Fp4": 24},
    "mxfp4": {"W4A4Mxfp4": 24},
    "mxfp4-fp8": {"W4A8Mxfp4": 24},
}
# what vLLM's CPU build has no operator for without AMX: the loader is vLLM's, the arithmetic a stand-in
STOOD_IN = {"fp8-static", "fp8-tensor", "fp8-block", "nvfp4a16", "mxfp4", "mxfp4-fp8"}
# vLLM's emulation of formats with scales of eight bits, or ours of what that lacks
EMULATED = ("mxfp8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4-fp8")


# at least this correlated are the changes of single log-probabilities, vLLM's and ours: all but one
# where weights alone are coarse; inputs are rounded again wherever bfloat16 around them rounded
CORRELATED = {"w4a16": 0.97, "w4a16-channel": 0.97, "w4a16-asymmetric": 0.97, "nvfp4a16": 0.97,
              "mixed": 0.6}  # fmt: skip
OTHERS_CORRELATED = 0.35
# how far perplexities may be apart; inputs of four bits are rounded otherwise at many places
APART = {"nvfp4": 1.5e-2, "mxfp4": 1.5e-2}


@pytest.fixture(scope="module")
def replayed(trained):
    """quantcli's own log-probabilities of the float model."""
    return ours(trained.folders["float"], trained.ids)


def tensor(answer):
    return torch.tensor(answer.log_probs)


def test_every_format_has_its_numbers():
    assert set(NUMBERS) == set(CLASSES) == set(CONVERTED)


def test_float_is_served_as_the_harness_believes(trained, replayed):
    """The same numbers as quantcli's replay, but for bfloat16: windows, tokens, places are the same."""
    answer = trained.answer("float")
    assert float((tensor(answer) - replayed).abs().mean()) < 0.02
    assert abs(answer.perplexity / math.exp(-float(replayed.mean())) - 1) < 1e-3


@pytest.mark.parametrize("name", CONVERTED)
def test_close_to_float(trained, name):
    far = distance(trained.answer(name), trained.answer("float"))
    (low, high), agreement, (least, most) = NUMBERS[name]
    assert low <= far.ratio <= high, far
    assert far.agreement >= agreement, far
    assert least <= far.change <= most, far


@pytest.mark.parametrize("name", CONVERTED)
def test_generates_text_and_the_same_again(trained, name):
    answer, base = trained.answer(name), trained.answer("float")
    assert answer.continued == answer.again
    assert all(len(tokens) == 16 for tokens in answer.continued)
    assert all(text.strip() for text in answer.texts)
    assert sum(a[0] == b[0] for a, b in zip(answer.continued, base.continued, strict=True)) >= 3


@pytest.mark.parametrize("name", CONVERTED)
def test_served_by_the_kernels_of_its_format(trained, name):
    """Not taken for float, not another format's arithmetic; the head and embeddings stay float."""
    answer = trained.answer(name)
    kinds = {kind for classes in CLASSES.values() for kind in classes}
    found = {kind: sum(n for words, n in answer.kernels.items() if kind in words) for kind in kinds}
    assert {kind: n for kind, n in found.items() if n} == CLASSES[name]
    assert answer.kernels["UnquantizedEmbeddingMethod"] == 2
    if name not in STOOD_IN:
        assert not answer.stand_ins


@pytest.mark.parametrize("name", CONVERTED)
def test_computes_what_verify_run_computes(trained, replayed, name):
    """quantcli's arithmetic for the format moves the same tokens' log-probabilities the same way."""
    answer, scores = trained.answer(name), ours(trained.folders[name], trained.ids)
    theirs = tensor(answer) - tensor(trained.answer("float"))
    both = torch.stack([theirs.flatten(), (scores - replayed).flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > CORRELATED.get(name, OTHERS_CORRELATED)
    ratio = answer.perplexity / math.exp(-float(scores.mean()))
    assert ratio == pytest.approx(1, abs=APART.get(name, 2.5e-3))


@pytest.mark.parametrize("name", EMULATED)
def test_changes_as_much_as_verify_run_predicts(trained, name):
    """Within a tenth, in the dtype in which `verify --run` computes both models."""
    served = Served.open(trained.folders[name])
    base, scores = (ours(trained.folders[n], trained.ids, served.dtype) for n in ("float", name))
    predicted = float((scores - base).abs().mean())
    assert distance(trained.answer(name), trained.answer("float")).change == pytest.approx(
        predicted, rel=0.1
    )


def test_damage_is_seen(trained):
    """One scale of 42 doubled shows in every figure; a lost scale is refused, not served as garbage."""
    far = distance(trained.answer("doubled"), trained.answer("float"))
    assert far.ratio > 1.02
    assert far.agreement < 0.9
    assert far.change > 0.15
    lost = trained.answers["lost"]
    assert isinstance(lost, Refused)
    assert "down_proj.weight_scale" in lost.error


def test_served_with_avx512_alone(trained):
    """vLLM has three libraries for x86; the other ones hold AMX instructions, or no AVX-512."""
    served = [answer for answer in trained.answers.values() if isinstance(answer, Answer)]
    assert {answer.libraries for answer in served} == {("_C_AVX512",)}


def test_a_cpu_that_lists_amx_answers_alike(trained):
    """Where it is listed but not granted, the first AMX instruction would end the process."""
    names = ("float", "int8-symmetric", "fp8-dynamic", "fp8-static", "fp8-block", "w4a16")
    few = 2
    answers = serve({name: trained.folders[name] for name in names}, trained.ids[:few], cpu="listed")
    for name, answer in answers.items():
        before = trained.answer(name)
        assert isinstance(answer, Answer), answer
        assert (answer.kernels, answer.stand_ins) == (before.kernels, before.stand_ins)
        # other windows in the batch make sums round otherwise; a format's own change is four times this
        assert float((tensor(answer) - tensor(before)[:few]).abs().mean()) < 0.01
