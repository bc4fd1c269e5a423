"""vLLM serves families of the zoo, float and with int8: towers, stacks of experts, state spaces."""

import pytest
import torch

from tests.engine.harness import Answer, distance, serve
from tests.tiny_models import make_tiny
from tests.zoo.make import make
from tests.zoo.pairs import command

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

# Int8 experts are computed by a stand-in (stand_ins.py) if the CPU has no AMX; all else is vLLM's own.
EXPERTS = {"qwen3_moe", "qwen3_5_moe_stacks", "granitemoe"}
SERVED = ("gemma3", "falcon_h1", *sorted(EXPERTS))
MOST = 0.05  # mean |difference| of log-probabilities, in nats a token


@pytest.fixture(scope="module")
def answers(environment, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    folders = {}
    for name in SERVED:
        out = root / f"{name}-int8"
        if name == "gemma3":  # that of the zoo shares large embeddings with its head
            folders[name] = make_tiny(root / name, name, hidden_size=128, head_dim=32)
        else:
            folders[name] = make(name, root / name)
        code, _, said = command("quantize", "vllm_int8_dynamic", "--model", folders[name], "--out", out)
        assert code == 0, said
        folders[out.name] = out
    generator = torch.Generator().manual_seed(0)
    return serve(folders, torch.randint(4, 100, (4, 48), generator=generator).tolist())


@pytest.mark.parametrize("name", SERVED)
def test_int8_answers_are_near_those_of_the_float_model(answers, name):
    plain, converted = answers[name], answers[f"{name}-int8"]
    assert isinstance(plain, Answer), plain
    assert isinstance(converted, Answer), converted
    far = distance(converted, plain)
    assert 1e-4 < far.change <= MOST
    assert set(converted.stand_ins) <= ({"experts_int8"} if name in EXPERTS else set())
