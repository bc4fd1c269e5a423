"""What recipes make of the trained model, with the engine's arithmetic, in perplexity."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml

from quantcli.calibration.replay.served import Served, log_probs
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
MODEL = ROOT / "examples" / "tiny-qwen3"
FEWER = ("calibration.samples=24", "calibration.length=128")


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/perplexity.py: the same text and the same outliers as in the README."""
    spec = importlib.util.spec_from_file_location("perplexity", ROOT / "benchmarks/perplexity.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["perplexity"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(benchmark):
    return benchmark.windows(MODEL, ROOT / "examples" / "evaluation.txt", 8, 256)


@pytest.fixture(scope="module")
def plain(text):
    return torch.cat(log_probs(open_checkpoint(MODEL), text, workers=2))


@pytest.fixture(scope="module")
def outliers(benchmark, tmp_path_factory):
    """The same function with four outlier channels behind every norm."""
    return benchmark.inject(MODEL, tmp_path_factory.mktemp("outliers") / "model")


def against_float(path, model, text, base, out):
    """Perplexity over float, and the mean change of a token's log-probability."""
    job = commands.plan(path, model=str(model), out=out, overrides=FEWER)
    commands.quantize(job)
    scores = torch.cat(log_probs(Served.open(out), text, workers=2))
    return math.exp(base.mean() - scores.mean()), float((scores - base).abs().mean())


def test_static_is_as_good_as_float(tmp_path, text, plain):
    ratio, change = against_float(RECIPES / "w8a8_static.yaml", MODEL, text, plain, tmp_path / "out")
    assert 0.998 <= ratio <= 1.004
    assert 0.005 <= change <= 0.045


def test_outliers_spoil_static_and_smoothing_mends_it(tmp_path, text, plain, outliers):
    base = torch.cat(log_probs(open_checkpoint(outliers), text, workers=2))
    assert float((base - plain).abs().mean()) < 1e-3, "injecting has changed the function"
    path = RECIPES / "w8a8_static_smooth.yaml"
    table = yaml.safe_load(path.read_text())
    del table["smooth"]
    table["calibration"]["data"] = str(ROOT / "examples" / "calibration.txt")
    (tmp_path / "static.yaml").write_text(yaml.safe_dump(table))
    static, _ = against_float(tmp_path / "static.yaml", outliers, text, base, tmp_path / "static")
    smooth, change = against_float(path, outliers, text, base, tmp_path / "smooth")
    assert static > 1.05
    assert 0.998 <= smooth <= 1.004
    assert change <= 0.045
