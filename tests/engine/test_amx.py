"""What vLLM computes in another way with AMX. Left out where a process cannot use AMX.

All other tests pin vLLM to AVX-512: see pin() in serve.py.
"""

import pytest
import torch

from quantcli.calibration.replay.served import Served, log_probs
from quantcli.calibration.text.dataset import Batch
from tests.engine.conftest import CONVERTED, FAMILIES, MODEL, Families, convert, ours, text
from tests.engine.harness import Answer, distance, flags, no_amx, serve

pytestmark = pytest.mark.engine

FORMATS = ("int8-dynamic", "int8-symmetric", "fp8-static", "fp8-block", "w4a16")
EXPERTS = {"qwen3_moe": {"int8-dynamic": FAMILIES["qwen3_moe"]["int8-dynamic"]}}
KERNELS = {
    "fp8-static": "CPUFp8PerTensorScaledMMLinearKernel",
    "fp8-block": "CPUFp8BlockScaledMMKernel",
}


class WeightsAlone(Served):
    """A checkpoint whose inputs stay float."""

    def quantizer(self, module, rows, bias):
        return None


class WithAmx:
    """The bundled model in the formats of above: the text, folders, and what vLLM answers with AMX."""

    def __init__(self, root):
        self.ids = text()
        self.folders = {"float": MODEL}
        for name in FORMATS:
            self.folders[name] = convert(root / name, MODEL, *CONVERTED[name])
        self.answers = serve(self.folders, self.ids, cpu="own")

    def changes(self, name):
        """Of every token's log-probability from the float model's, flat."""
        answer, base = self.answers[name], self.answers["float"]
        assert isinstance(answer, Answer), answer
        return (torch.tensor(answer.log_probs) - torch.tensor(base.log_probs)).flatten()


@pytest.fixture(scope="module")
def usable(environment):
    if reason := no_amx():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def served(usable, tmp_path_factory):
    return WithAmx(tmp_path_factory.mktemp("amx"))


@pytest.fixture(scope="module")
def replayed(served):
    """quantcli's own log-probabilities of the float model."""
    return ours(MODEL, served.ids)


def correlated(changes, scores, base):
    """Changes that vLLM makes with those that a replay makes."""
    return float(torch.corrcoef(torch.stack([changes, (scores - base).flatten()]))[0, 1])


def test_static_symmetric_int8_takes_a_scale_per_token(served, replayed):
    """The stored scale is not read: the answers are those of the dynamic format."""
    static, dynamic = served.changes("int8-symmetric"), served.changes("int8-dynamic")
    assert float((static - dynamic).abs().mean()) < 0.005
    assert correlated(static, ours(served.folders["int8-dynamic"], served.ids), replayed) > 0.35
    assert correlated(static, ours(served.folders["int8-symmetric"], served.ids), replayed) < 0.2


@pytest.mark.parametrize("name", KERNELS)
def test_fp8_weights_meet_inputs_that_stay_bfloat16(served, replayed, name):
    """One scale a tensor, or blocks: nearer to the float model than the format's own arithmetic."""
    if "amx_fp8" in flags():
        pytest.skip("this CPU's AMX multiplies fp8 itself: inputs are quantized")
    answer = served.answers[name]
    assert sum(n for words, n in answer.kernels.items() if KERNELS[name] in words) == 24
    assert "block_scaled_mm" not in answer.stand_ins
    far = distance(answer, served.answers["float"])
    assert 0.997 <= far.ratio <= 1.005, far
    assert far.agreement >= 0.96, far
    assert 0.02 <= far.change <= 0.036, far
    batches = [Batch(part, None) for part in torch.tensor(served.ids).split(8)]
    weights = torch.cat(log_probs(WeightsAlone.open(served.folders[name]), batches))
    assert correlated(served.changes(name), weights, replayed) > 0.8


def test_int4_is_the_same(served, replayed):
    """By another kernel; with VLLM_CPU_INT4_W4A8=0, as the tests set it, inputs stay bfloat16."""
    scores = ours(served.folders["w4a16"], served.ids)
    assert correlated(served.changes("w4a16"), scores, replayed) > 0.97


def test_int8_experts_need_no_stand_in(usable, tmp_path):
    experts = Families(tmp_path, EXPERTS, cpu="own")
    base, answer = experts.answers["qwen3_moe"], experts.answers["qwen3_moe-int8-dynamic"]
    assert isinstance(answer, Answer), answer
    assert answer.stand_ins == ()
    assert "CompressedTensorsW8A8Int8MoEMethod" in " ".join(answer.kernels)
    assert 0.02 < distance(answer, base).change < 0.07
    scores = ours(experts.folders["qwen3_moe-int8-dynamic"], experts.ids)
    assert float((torch.tensor(answer.log_probs) - scores).abs().mean()) < 0.055
