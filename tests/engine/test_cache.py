"""vLLM serves fp8 caches of keys and values, per tensor and per head, by measured scales."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from quantcli.commands import quantize as commands
from tests.engine.conftest import CALIBRATION, MODEL, text
from tests.engine.harness import Answer, distance, serve

pytestmark = pytest.mark.engine

FACTOR = 300.0  # of keys: the largest are then some 1,500, over the 448 of a scale of 1
FORMATS = {"tensor": "fp8", "head": "fp8_per_head"}
RULES = [{"match": "*", "scheme": "keep"}]


def with_large_keys(folder):
    """The bundled model with larger keys and smaller queries: the same function."""
    shutil.copytree(MODEL, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("k_norm.weight"):
                tensors[name] = (tensor.float() * FACTOR).bfloat16()
            if name.endswith("q_norm.weight"):
                tensors[name] = (tensor.float() / FACTOR).bfloat16()
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def convert(folder, model, cache):
    recipe = folder.with_suffix(".yaml")
    table = {"target": "compressed-tensors", "calibration": CALIBRATION, "rules": RULES}
    recipe.write_text(yaml.safe_dump({**table, "kv_cache": cache}))
    commands.quantize(commands.plan(recipe, model=str(model), out=folder))
    return folder


def of_one(folder, checkpoint):
    """The checkpoint with scales of 1."""
    shutil.copytree(checkpoint, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(("k_scale", "v_scale")):
            tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def served(environment, tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    folders = {"float": with_large_keys(root / "float")}
    for name, cache in FORMATS.items():
        folders[name] = convert(root / name, folders["float"], cache)
        folders[f"{name} of 1"] = of_one(root / f"{name}-1", folders[name])
    answers = serve(folders, text(4))
    assert all(isinstance(answer, Answer) for answer in answers.values()), answers
    return answers


@pytest.mark.parametrize("name", FORMATS)
def test_measured_scales_halve_the_error(served, name):
    measured = distance(served[name], served["float"])
    ones = distance(served[f"{name} of 1"], served["float"])
    assert 0.02 < measured.change < 0.1, measured  # the cache is rounded, and not more than fp8 does
    assert measured.change < ones.change / 2, (measured, ones)
    assert abs(measured.ratio - 1) < 0.015


def test_the_attention_of_cpus_takes_the_largest_scale_of_the_heads(served):
    """That is the one for all: vllm 0.32.0, compressed_tensors.py:1253-1259."""
    assert served["tensor"].log_probs == served["head"].log_probs


@pytest.mark.parametrize("name", FORMATS)
def test_the_config_is_enough(served, name):
    """No option asks for it: config.json alone makes the cache fp8, and texts repeat."""
    assert served[name].log_probs != served["float"].log_probs
    assert served[name].continued == served[name].again
