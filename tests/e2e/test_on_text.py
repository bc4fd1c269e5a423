"""Runs on text: several texts at once, and two checkpoints compared window by window."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import quantcli
from quantcli.commands import quantize as commands
from quantcli.core.errors import InputError
from tests.completions_server import completions, random_scores

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-qwen3"
TEXTS = [ROOT / "examples" / "evaluation.txt", ROOT / "examples" / "calibration.txt"]
FIRST, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
RUN: dict[str, Any] = {"against": MODEL, "run": True, "samples": 3, "length": 32}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model in 8 bits and in 4."""
    folder = tmp_path_factory.mktemp("on_text")
    made = []
    for recipe in ("w8a8_dynamic", "vllm_w4a16"):
        path = ROOT / "recipes" / f"{recipe}.yaml"
        commands.quantize(commands.plan(path, model=str(MODEL), out=folder / recipe))
        made.append(folder / recipe)
    return made


def test_texts_and_checkpoints_are_compared(checkpoints: list[Path], tmp_path: Path) -> None:
    junit, page = tmp_path / "junit.xml", tmp_path / "page.html"
    files = {"junit": junit, "report": page}
    options = {**RUN, "samples": 6, "max_kl": 1.0, "not_worse": True}
    done = quantcli.verify([*reversed(checkpoints)], data=TEXTS, **files, **options)
    four, eight = done.checkpoints
    assert done.ok, eight.findings
    run = eight.run
    assert run is not None
    assert [text["text"] for text in run["texts"]] == ["evaluation.txt", "calibration.txt"]
    assert [text["tokens"] for text in run["texts"]] == [6 * 31, 6 * 31]
    assert [window["text"] for window in run["windows"]] == [0] * 6 + [1] * 6
    kl = [text["kl"]["mean"] for text in run["texts"]]
    assert run["kl"]["mean"] == pytest.approx(sum(kl) / 2, abs=1e-6)
    for figures in (run, *run["texts"]):
        assert 30 < figures["outputs_interval"][0] < figures["outputs_db"] < 50
        assert 0 < figures["peir_interval"][0] <= figures["peir"] <= figures["peir_interval"][1] < 0.02
        assert figures["top1_interval"][0] <= figures["top1_agreement"]
    assert four.compared is None
    assert eight.compared is not None
    assert eight.compared["checkpoint"] == str(checkpoints[1])
    figures = {figure["key"]: figure for figure in eight.compared["figures"]}
    assert figures["kl"]["better"] is figures["outputs_db"]["better"] is True
    assert figures["kl"]["change"] == pytest.approx(
        run["kl"]["mean"] - four.run["kl"]["mean"], abs=1e-6
    )
    assert [text["text"] for text in eight.compared["texts"]] == ["evaluation.txt", "calibration.txt"]
    assert "better in " in eight.compared["verdict"]
    assert "calibration.txt: tokens 186; perplexity" in junit.read_text()
    assert "window by window" in page.read_text()
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(quantcli.verify(checkpoints[0]).to_dict()))
    with pytest.raises(InputError, match="has no windows of a run"):  # before anything runs
        quantcli.verify(checkpoints[1], data=TEXTS, baseline=earlier, **options)


def test_a_limit_holds_for_each_text_and_a_text_is_given_once(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    twin = Path(shutil.copy(TEXTS[0], tmp_path / "twin.txt"))
    with pytest.raises(InputError, match=r"the text is the same as `.*evaluation\.txt`"):
        quantcli.verify(checkpoints[0], data=[TEXTS[0], twin], **RUN)
    page, traced = tmp_path / "page.html", [FIRST, DOWN]
    with completions(random_scores(4096)) as server:  # another model
        options = {"max_kl": 1e-6, "report": page, "layer": traced, "served": server.address}
        done = quantcli.verify(checkpoints[0], data=TEXTS, **options, **RUN)
    assert "Each text by itself." in page.read_text()
    check_traces(done.run["traces"])
    assert f"Where the error of <code>{DOWN}</code> comes from" in page.read_text()
    failed = [(each["check"], each["where"]) for each in done.findings if each["severity"] == "error"]
    assert failed[:2] == [("kl", "`evaluation.txt`"), ("kl", "`calibration.txt`")]
    assert failed[2:] == [("served", f"{server.address}/v1")] * 4  # two limits on two texts
    served = done.run["served"]
    assert served["kl"]["mean"] > 1
    assert served["tokens"] == done.run["tokens"]
    assert served["replay"]["mean_abs_logprob_change"] > 1
    assert [text["text"] for text in served["texts"]] == ["evaluation.txt", "calibration.txt"]
    assert [len(body["prompt"]) for body in server.asked] == [32] * 6
    assert "server next to the replay, perplexity" in page.read_text()
    with pytest.raises(InputError, match="--not-worse compares runs"):
        quantcli.verify(checkpoints[0], data=TEXTS, not_worse=True, **RUN)
    for module, what in (("q_projj", "is not a quantized module"), ("lm_head", "not a quantized")):
        with pytest.raises(InputError, match=what):
            quantcli.verify(checkpoints[0], data=TEXTS, layer=module, **RUN)


def test_layers_of_a_rotated_checkpoint_are_compared_in_its_basis(tmp_path: Path) -> None:
    path = ROOT / "recipes" / "w4a4_dynamic_rotated.yaml"
    commands.quantize(commands.plan(path, model=str(MODEL), out=tmp_path / "out"))
    options = {"max_kl": 9.0, "max_ppl_ratio": 9.0, "layer": DOWN}
    done = quantcli.verify(tmp_path / "out", data=TEXTS[0], **options, **RUN)
    assert done.ok, done.findings
    assert not any("quantized, too" in each["what"] for each in done.findings)
    assert all(layer["sqnr_db"] > 10 for layer in done.run["layers"])
    (trace,) = done.run["traces"]
    assert trace["alone_db"] > 30
    assert trace["input_db"] > 8


def check_traces(traces: list[dict[str, Any]]) -> None:
    """The sources of the error of two modules of a checkpoint with int8 weights and inputs."""
    first, down = traces
    assert [first["module"], down["module"]] == [FIRST, DOWN]
    for trace in traces:
        assert trace["tokens"] == 2 * 3 * 32
        noise = {each["source"]: 10 ** (-each["sqnr_db"] / 10) for each in trace["sources"]}
        assert noise["inputs: clipping"] < 1e-19  # each token has its own scale
        assert noise["inputs: rounding"] == noise["inputs"]
        assert noise["weights"] == pytest.approx(noise["weights: rounding"], rel=0.02)
        alone, whole = (10 ** (-trace[key] / 10) for key in ("alone_db", "output_db"))
        assert alone == pytest.approx(noise["weights"] + noise["inputs"], rel=0.1)
        assert whole == pytest.approx(alone + noise["earlier modules"], rel=0.25)
        for key in ("worst_outputs", "worst_inputs", "worst_tokens"):
            shares = [worst["share"] for worst in trace[key]]
            assert len(shares) == 5
            assert 0.3 > shares[0] >= shares[-1] > 0
            assert shares == sorted(shares, reverse=True)
    assert first["input_db"] == 200
    assert 25 < down["output_db"] < down["input_db"] + 5 < 45
    assert all(worst["text"] for worst in down["worst_tokens"])
