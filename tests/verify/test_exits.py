"""What people see: exit codes and words of `quantcli verify`."""

import pytest

from tests import quantized
from tests.builders import make_model
from tests.e2e.conftest import run_cli
from tests.verify.damage import CONFIG, DESCRIPTION, Copy, edit, flip, good_of, lose, raw, to_int8

ROUTER = "model.layers.1.mlp.gate"


def copy_of(stock, tmp_path, name, damage=None):
    copy = Copy(good_of(stock, name), tmp_path / "copy")
    if damage is not None:
        damage(copy)
    return copy


def test_sound(stock, tmp_path):
    copy = copy_of(stock, tmp_path, "dynamic")
    result = run_cli("verify", copy.path, "--full", "--against", copy.source, "--tp", "1,2")
    assert result.code == 0, result.out
    assert "passed" in result.out
    assert "FAILED" not in result.out


@pytest.mark.parametrize(
    ("name", "damage", "options", "words"),
    [
        ("dynamic", lose(DESCRIPTION), (), ("there is no quant_model_description.json", "fix:")),
        ("dynamic", raw(1, lambda data: data[:-1]), (), ("headers", "truncated", "fix:")),
        ("dynamic", edit(CONFIG, quantization_config={}), (), ("remove it", "quantization_config")),
        ("moe", to_int8(ROUTER), (), ("routers as float", ROUTER)),
        ("dynamic", flip("tokenizer.json", 60), ("--full",), ("changed since it was written",)),
        ("dynamic", None, ("--tp", "3"), ("4 attention heads", "--tp 3")),
    ],
    ids=["description", "truncated", "quantization_config", "router", "flip", "tp"],
)
def test_the_answer_is_no(stock, tmp_path, name, damage, options, words):
    copy = copy_of(stock, tmp_path, name, damage)
    result = run_cli("verify", copy.path, *options)
    assert result.code == 1
    for word in ("FAILED", *words):
        assert word in result.out + result.err


def test_json(stock, tmp_path):
    copy = copy_of(stock, tmp_path, "dynamic", lose(DESCRIPTION))
    copy.seal()
    result = run_cli("verify", copy.path, "--json")
    assert result.code == 1
    assert result.json["ok"] is False
    assert [finding["check"] for finding in result.json["findings"]] == ["description"]


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("nowhere", (), "no such model directory"),
        ("source", (), "this is a float model: nothing in it is quantized"),
        ("copy", ("--run",), "--run compares two models"),
        ("copy", ("--tp", "0"), "tensor parallel sizes are whole numbers"),
        ("copy", ("--against", "nowhere/at/all"), "nowhere/at/all"),
    ],
    ids=["nothing there", "float", "run alone", "tp 0", "against nothing"],
)
def test_fix_your_input(stock, tmp_path, path, options, words):
    copy = copy_of(stock, tmp_path, "dynamic")
    place = {"copy": copy.path, "source": copy.source, "nowhere": tmp_path / "nowhere"}[path]
    result = run_cli("verify", place, *options)
    assert result.code == 2
    assert words in result.err
    assert "fix:" in result.err


def test_a_format_that_is_not_known(tmp_path):
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32}
    shards = {"model.safetensors": quantized.awq("a", 16, 64)[0]}
    make_model(tmp_path, shards, config={"quantization_config": settings})
    result = run_cli("verify", tmp_path)
    assert result.code == 2
    assert "no quantized checkpoint of a format that this version verifies: awq" in result.err
