"""A server's log-probabilities: its ways to answer, and answers that are refused."""

import pytest
import torch

from quantcli.calibration.text.dataset import Batch
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import SILENT
from quantcli.verification.on_text.endpoint import connect
from quantcli.verification.on_text.engine import Engine
from tests.completions_server import completions, random_scores

WINDOWS = [[5, 9, 1, 33], [2, 2, 60, 7], [8, 0, 11, 12]]
MODEL = random_scores()


@pytest.fixture
def server():
    with completions(MODEL) as made:
        yield made


def asked(server, windows=WINDOWS, suffix=""):
    return connect(server.address + suffix).answers(windows, SILENT)


def figures(style, model=MODEL, windows=WINDOWS):
    """The server next to `MODEL` twice: as the reference, and as the replay."""
    with completions(model, style) as server:
        endpoint = connect(f"{server.address}/v1/")
        engine = Engine(endpoint, endpoint.answers(windows, SILENT))
    logits = torch.stack([MODEL(window) for window in windows])
    engine.add(logits, logits, Batch(torch.tensor(windows), None), 0)
    return engine.report([("a", "0")])


@pytest.mark.parametrize("style", ["vllm", "ids", "echo"])
def test_the_same_model_differs_in_nothing(style):
    report = figures(style)
    assert report.ppl.ratio == pytest.approx(1.0, abs=1e-6)
    assert report.mean_abs_logprob_change < 1e-6
    assert report.replay.mean_abs_logprob_change < 1e-6
    if style == "echo":
        assert report.kl is report.top1_agreement is report.covered is report.candidates is None
        return
    assert (report.candidates, report.top1_agreement, report.replay.top1_agreement) == (20, 1.0, 1.0)
    assert report.kl.mean == pytest.approx(0, abs=1e-6)
    assert 0.5 < report.covered < 1
    assert report.texts[0].windows == 3


def test_another_model_differs_and_the_divergence_is_bounded_from_below():
    other = random_scores(seed=1)
    report = figures("vllm", other)
    places = [(MODEL(w)[:-1], other(w)[:-1]) for w in WINDOWS]
    whole = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in places]).mean()
    assert 0.1 * float(whole) < report.kl.mean <= float(whole)
    tokens = [torch.tensor(window[1:]).unsqueeze(1) for window in WINDOWS]
    losses = [
        float((p.gather(1, t) - q.gather(1, t)).mean())
        for (p, q), t in zip(places, tokens, strict=True)
    ]
    assert report.ppl.ratio == pytest.approx(torch.tensor(losses).mean().exp().item(), abs=1e-5)
    assert report.ppl.interval[0] <= report.ppl.ratio <= report.ppl.interval[1]


def test_the_key_is_sent_and_the_model_named(server, monkeypatch):
    monkeypatch.setenv("QUANTCLI_API_KEY", "secret")
    server.models = [{"id": "base"}, {"id": "tiny", "max_model_len": 5}]
    with pytest.raises(InputError, match="has the models base, tiny") as error:
        connect(server.address)
    assert "#NAME" in error.value.fix
    endpoint = connect(f"{server.address}#tiny")
    assert (endpoint.model, endpoint.longest) == ("tiny", 5)
    assert endpoint.answers(WINDOWS, SILENT)
    assert server.keys == ["Bearer secret"] * 2
    with pytest.raises(InputError, match="takes 5 tokens, and windows have 5"):
        endpoint.answers([[1, 2, 3, 4, 5]], SILENT)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("localhost:8000", "not an address"),
        ("ftp://x", "not an address"),
        ("http://x?a=b", "not an address"),
    ],
)
def test_other_addresses(address, what):
    with pytest.raises(InputError, match=what):
        connect(address)


def test_nothing_answers(server):
    address = server.address
    server.status = 503
    with pytest.raises(MachineError, match=r"status 503.*cannot.*serve"):
        asked(server)
    with pytest.raises(MachineError, match="cannot be asked: connection refused"):
        connect(address.rpartition(":")[0] + ":1")
    server.status = 401
    with pytest.raises(InputError, match="refuses access") as error:
        asked(server)
    assert "QUANTCLI_API_KEY" in error.value.fix


def _of_choice(change):
    def edit(answer):
        if "prompt_logprobs" in answer["choices"][0]:
            change(answer["choices"][0])
        return answer

    return edit


def _put(key, value):
    return _of_choice(lambda choice: choice["prompt_logprobs"][1].update({key: value}))


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda a: a | {"usage": {"prompt_tokens": 5}}, "counts 5 tokens of a window of 4"),
        (_of_choice(lambda c: c["prompt_logprobs"].pop()), "scores 3 tokens of a window of 4"),
        (_of_choice(lambda c: c["prompt_logprobs"].reverse()), "are of other tokens"),
        (_of_choice(lambda c: c["prompt_logprobs"].insert(1, None)), "not as vLLM gives them"),
        (_of_choice(lambda c: c.pop("prompt_logprobs")), "has no `prompt_logprobs`; .*does not echo"),
        (_put("9", {"logprob": float("nan")}), "nan is not a log-probability"),
        (_put("9", {"logprob": 3.0}), "3.0 is not a log-probability"),
        (_put("x", {"logprob": -1.0}), "'x' is not a token id"),
        (lambda a: {"choices": []}, "has no `choices`"),
        (lambda a: b"{", "not valid JSON"),
        (lambda a: [], "must hold a JSON object"),
    ],
)
def test_answers_that_are_refused(server, edit, what):
    server.edit = edit
    with pytest.raises(InputError, match=what) as error:
        asked(server)
    assert error.value.where.startswith("--served http://127.0.0.1")


def test_no_log_probabilities_at_all():
    with completions(MODEL, "deaf") as server, pytest.raises(InputError) as error:
        asked(server)
    assert "no log-probabilities of a prompt" in error.value.what
    assert "vLLM" in error.value.fix


def test_a_token_beyond_the_model(server):
    server.edit = _put("64", {"logprob": -0.1})
    endpoint = connect(server.address)
    answers = endpoint.answers(WINDOWS, SILENT)
    with pytest.raises(InputError, match="names token 64, and the model has 50"):
        Engine(endpoint, answers, 50)
    engine = Engine(endpoint, answers)
    logits = torch.stack([MODEL(window) for window in WINDOWS])
    with pytest.raises(InputError, match="names token 64, and the model has 64"):
        engine.add(logits, logits, Batch(torch.tensor(WINDOWS), None), 0)
