"""config.json that asks for far more than its weights account for: nothing of that size is built."""

import dataclasses
import json
import shutil

import pytest
import torch

from quantcli.calibration.replay import guard, library
from quantcli.calibration.replay.library import build_model
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.core.errors import InputError
from tests.tiny_models import make_tiny

FIX = "check config.json, or fetch it again: it does not belong to these weights"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    make_tiny(folder, "qwen3")
    return folder


@pytest.fixture
def build(tiny, tmp_path):
    """Builds the model after some values of config.json were replaced, and no other check has run."""

    def run(**changes):
        folder = shutil.copytree(tiny, tmp_path / "model")
        checkpoint = open_checkpoint(folder)
        config = checkpoint.config.with_values(**changes)
        (folder / "config.json").write_text(json.dumps(config.plain()))
        changed = dataclasses.replace(checkpoint, config=config)
        return build_model(changed, torch.bfloat16, trust_remote_code=False)

    return run


def test_the_model_as_it_is(build):
    model = build()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    linear = torch.nn.Linear(2, 2)  # outside of the block
    assert linear.weight.device.type == "cpu"


NEO = {
    "architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", "num_heads": 2, "num_layers": 3,
    "attention_types": [[["global"], 3]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_hidden_layers": 60_000, "layer_types": None}, "more than 1,"),
        ({"vocab_size": 2 * 10**9}, "a parameter of 2000000000 x "),
        (NEO | {"max_position_embeddings": 10**6}, "a buffer of 1.0 TB"),
        (NEO | {"max_position_embeddings": 1000}, "buffers of more than 3."),
    ],
    ids=["layers", "vocabulary", "mask", "masks"],
)
def test_what_is_built_is_bounded_by_the_weights(build, monkeypatch, changes, what):
    monkeypatch.setattr(library, "is_outsized", lambda checkpoint: False)
    monkeypatch.setattr(guard, "_PARTS", 1000)
    monkeypatch.setattr(guard, "_ALL_BUFFERS_BYTES", 2**21)
    with pytest.raises(InputError) as caught:
        build(**changes)
    assert caught.value.what.startswith(f"config.json makes a model with {what}")
    assert "but the checkpoint has " in caught.value.what
    assert caught.value.where.endswith("/config.json")
    assert caught.value.fix == FIX


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"num_hidden_layers": 10**9, "layer_types": None}, "1 s of CPU time"),
        ({"num_labels": 10**8}, "135.1 MB of memory"),
    ],
    ids=["layers", "labels"],
)
def test_a_loop_without_end_runs_in_another_process(build, monkeypatch, changes, taken):
    monkeypatch.setattr(library, "_SECONDS", 1 if "num_hidden_layers" in changes else 20)
    monkeypatch.setattr(library, "_MEMORY", 2**27 if "num_labels" in changes else 2**30)
    with pytest.raises(InputError) as caught:
        build(**changes)
    assert caught.value.what.startswith(f"building the model of config.json takes more than {taken}")
    assert caught.value.where.endswith("/config.json")


def test_a_number_of_odd_size_that_harms_nothing(build):
    assert build(initial_seed=2**40, rope_theta=10**12).config.initial_seed == 2**40


@pytest.mark.parametrize(
    ("changes", "outsized"),
    [
        ({}, False),
        (
            {"rope_theta": 10**12, "eos_token_id": [151_643], "max_position_embeddings": 10_485_760},
            False,
        ),
        ({"max_position_embeddings": 10**9}, True),
        ({"vision_config": {"sizes": [1, {"depth": 10**6}]}}, True),
        ({"expand": 1e7}, True),
    ],
    ids=str,
)
def test_numbers_that_may_be_lengths_of_loops(tiny, changes, outsized):
    checkpoint = open_checkpoint(tiny)
    changed = dataclasses.replace(checkpoint, config=checkpoint.config.with_values(**changes))
    assert guard.is_outsized(changed) is outsized
