"""Names in config.json by which transformers would fetch code and run it never reach it."""

import json
import socket

import pytest
import torch

from quantcli.calibration.replay.library import build_model
from quantcli.checkpoint.checkpoint import CONFIG, open_checkpoint
from quantcli.core.errors import InputError
from tests.tiny_models import make_tiny

EVIL = "evil/kernel"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("loaders") / "m", "qwen3_moe")


@pytest.fixture
def reached(monkeypatch):
    """What was called of the ways out of the process: the loader of kernels, and the network."""
    from transformers import modeling_utils
    from transformers.integrations import hub_kernels

    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise AssertionError(f"reached with {args}")

    monkeypatch.setattr(hub_kernels, "get_kernel", refuse)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return calls


def built(model, folder, **changes):
    """The model of the same tensors with other values in config.json."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / CONFIG).read_bytes()) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    return build_model(open_checkpoint(folder), torch.float32, trust_remote_code=False)


@pytest.mark.parametrize("value", [EVIL, f"paged|{EVIL}", f"{EVIL}@v1", {"": EVIL}, "msa|evil/msa@v0"])
def test_no_kernel_that_config_json_names(model, tmp_path, reached, value):
    keys = ("attn_implementation", "experts_implementation")
    prefixes, ends = ("", "_"), ("", "_internal")
    changes = {f"{prefix}{key}{end}": value for key in keys for prefix in prefixes for end in ends}
    found = built(model, tmp_path / "m", **changes, use_kernels=True, kernel_config={"a": EVIL})
    assert found.config._attn_implementation == "sdpa"
    assert found.config._experts_implementation in ("eager", "grouped_mm")
    assert reached == []


def test_the_loader_would_be_reached(model, tmp_path, reached, monkeypatch):
    """Without what clears the names, the test above fails."""
    from quantcli.calibration.replay import library

    monkeypatch.setattr(library, "_choose_implementations", lambda config: None)
    with pytest.raises(InputError, match="reached with"):
        built(model, tmp_path / "m", attn_implementation=EVIL)
    assert reached[0][0] == EVIL


def test_nothing_is_fetched_meanwhile(model, tmp_path, reached):
    """Code of a model that is not trusted, and a name of another repository."""
    code = {"AutoConfig": "evil/repo--configuration.Config", "AutoModelForCausalLM": "evil/repo--m.M"}
    assert built(model, tmp_path / "m", auto_map=code, _name_or_path="evil/repo") is not None
    with pytest.raises(InputError, match="comes with code of its own"):
        built(model, tmp_path / "n", auto_map=code, model_type="evil", architectures=["Evil"])
    assert reached == []
