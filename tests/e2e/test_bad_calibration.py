"""Calibrations that cannot be: the documented exit code, one message, and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli.calibration import session
from tests.e2e.calibrating import (
    DYNAMIC,
    LENGTH,
    RECIPE,
    SAMPLES,
    SMOOTH,
    TEXT,
    Bench,
    Models,
    change_tensors,
    make_bench,
    seal_again,
)
from tests.e2e.conftest import Result, run_cli, snapshot

Arguments = list[object]
Setup = Callable[[Bench], Arguments]
CALIBRATION = RECIPE.splitlines()[1]


@dataclass(frozen=True)
class Case:
    """Something wrong, and what must be said about it.

    planned: whether `quantize --plan` finds it too. only: the one command that it concerns.
    """

    setup: Setup
    what: str
    where: str | None = None
    fix: str | None = None
    code: int = 2
    planned: bool = True
    only: str | None = None


CASES: dict[str, Case] = {}


def case(name: str, *words: str | None, **more: Any) -> Callable[[Setup], Setup]:
    def register(setup: Setup) -> Setup:
        assert name not in CASES
        CASES[name] = Case(setup, *words, **more)  # type: ignore[arg-type]
        return setup

    return register


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def finished(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole calibration of `RECIPE`."""
    bench = make_bench(tmp_path_factory.mktemp("finished"), models("qwen3"), RECIPE)
    assert bench.calibrate().code == 0
    return bench.store


@pytest.fixture
def bench(tmp_path: Path, models: Models, finished: Path) -> Bench:
    made = make_bench(tmp_path, models("qwen3"), RECIPE)
    shutil.copytree(finished, made.root / "finished")
    return made


def there(bench: Bench) -> Path:
    """A whole calibration where `quantize` looks for one."""
    (bench.root / "finished").rename(bench.store)
    return bench.store


# the data


@case(
    "no data",
    "`model.layers.0.mlp.down_proj` needs calibration data",
    "recipe.yaml:2",
    "--data FILE",
)
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace("data: text.txt, ", ""))
    return []


@case("no calibration block", "and the recipe names none", "recipe.yaml", "calibration: {data: FILE}")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace(CALIBRATION + "\n", ""))
    return []


@case(
    "smoothing without data",
    "smoothing needs calibration data",
    "recipe.yaml",
    "--data FILE",
)
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(DYNAMIC + "smooth: {alpha: 0.5}\n")
    return []


@case(
    "data is missing",
    "/text.txt` does not exist",
    "recipe.yaml:2",
    "one in a recipe starts where that is",
)
def _(bench: Bench) -> Arguments:
    (bench.root / "text.txt").unlink()
    return []


@case(
    "data of --set is missing",
    "text `no.txt` does not exist",
    "--set calibration.data=no.txt",
)
def _(bench: Bench) -> Arguments:
    return ["--set", "calibration.data=no.txt"]


@case("data is a directory", "is a directory", "recipe.yaml:2", "name a file in it")
def _(bench: Bench) -> Arguments:
    (bench.root / "text.txt").unlink()
    (bench.root / "text.txt").mkdir()
    return []


@case(
    "a tokenizer whose pattern goes back for ever",
    "reading this text with the model's tokenizer crashes the library that does it: Onig: ",
    "tokenizer.json",
    "fetch the model's tokenizer again from its author",
    planned=False,
)
def _(bench: Bench) -> Arguments:
    path = bench.own_model() / "tokenizer.json"
    pattern = {"Regex": "(([a-z]|.)+)+\\n$\\b"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split}))
    return []


@case("data is empty", "is empty", "recipe.yaml:2", "UTF-8 text")
def _(bench: Bench) -> Arguments:
    (bench.root / "text.txt").write_text("")
    return []


@case("data is binary", "binary, not text (NUL at byte 4)", "text.txt", "UTF-8 text")
def _(bench: Bench) -> Arguments:
    (bench.root / "text.txt").write_bytes(b"abcd\0" * 1000)
    return []


@case("data is no UTF-8", "not UTF-8 (byte 3)", "text.txt", "UTF-8 text", planned=False)
def _(bench: Bench) -> Arguments:
    (bench.root / "text.txt").write_bytes(b"abc\xff" * 1000)
    return []


@case("bad JSON", "not valid JSON", "records.jsonl:3", '{"text": "..."}', planned=False)
def _(bench: Bench) -> Arguments:
    (bench.root / "records.jsonl").write_text('{"text": "one"}\n\n{"text": "two"\n')
    bench.edit_recipe(RECIPE.replace("text.txt", "records.jsonl"))
    return []


@case(
    "too little text",
    "gives 93 samples of 16 tokens; 94 are asked for",
    "recipe.yaml:2",
    "samples",
    planned=False,
)
def _(bench: Bench) -> Arguments:
    assert len(TEXT) // LENGTH == 93
    bench.edit_recipe(RECIPE.replace(f"samples: {SAMPLES}", "samples: 94"))
    return []


@case("too few records", "gives 2 records; 4 are asked for", "recipe.yaml:2", "samples", planned=False)
def _(bench: Bench) -> Arguments:
    (bench.root / "records.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    bench.edit_recipe(RECIPE.replace("text.txt", "records.jsonl, pack: false"))
    return []


@case(
    "too long samples",
    "samples of 257 tokens are longer than the model's 256 positions",
    ":2",
    "256 or less",
)
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace(f"length: {LENGTH}", "length: 257"))
    return []


# the model


@case("no tokenizer", "the model has no tokenizer", "own", "tokenizer.json")
def _(bench: Bench) -> Arguments:
    model = bench.own_model()
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    return []


@case(
    "tokenizer without its vocabulary",
    "tokenizer cannot be loaded",
    "own",
    "fetch its files",
    planned=False,
)
def _(bench: Bench) -> Arguments:
    (bench.own_model() / "tokenizer.json").unlink()
    return []


@case(
    "tokenizer is no JSON", "tokenizer cannot be loaded", "own", "fetch its files again", planned=False
)
def _(bench: Bench) -> Arguments:
    (bench.own_model() / "tokenizer.json").write_text("{")
    return []


@case(
    "tokenizer of a larger model",
    "is beyond the model's 64 tokens",
    "own",
    "trained with",
    planned=False,
)
def _(bench: Bench) -> Arguments:
    change_config(bench.own_model(), vocab_size=64)
    return []


@case("no config.json", "model has no config.json", "own", "whole model folder")
def _(bench: Bench) -> Arguments:
    (bench.own_model() / "config.json").unlink()
    return []


@case("unknown model", "model type `qwen99`", "own/config.json", "newer transformers", planned=False)
def _(bench: Bench) -> Arguments:
    change_config(bench.own_model(), model_type="qwen99", architectures=["Qwen99ForCausalLM"])
    return []


@case("config of another size", "`hidden_size` should be a whole number", "own/config.json")
def _(bench: Bench) -> Arguments:
    change_config(bench.own_model(), hidden_size="wide")
    return []


@case(
    "a tensor is missing",
    "no tensor for parameter `model.layers.2.mlp.up_proj.weight`",
    "own",
    planned=False,
)
def _(bench: Bench) -> Arguments:
    change_tensors(bench.own_model(), lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    return []


def change_config(model: Path, **changes: object) -> None:
    table = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(table | changes))


# the recipe


@case("option misspelt", "unknown key `obsever`", "recipe.yaml:5", "`observer`")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace("observer", "obsever"))
    return []


@case("unknown observer", "`observer`: input should be 'minmax'", "recipe.yaml:5", "docs/recipe.md")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace("minmax", "minmix"))
    return []


@case("percentile too small", "`percentile`: input should be greater than 50", "recipe.yaml:5")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace("minmax", "percentile, percentile: 20"))
    return []


@case("percentile without effect", "has no effect without `observer: percentile`", "recipe.yaml:5")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace("minmax", "minmax, percentile: 99"))
    return []


@case("calibration key misspelt", "unknown key `calibration.sample`", "recipe.yaml:2", "`samples`")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace("samples", "sample"))
    return []


@case("policy misspelt", "`calibration.uncalibrated`", "recipe.yaml:2")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace("data:", "uncalibrated: ignore, data:"))
    return []


@case("no samples", "`calibration.samples`: input should be greater than 0", "recipe.yaml:2")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE.replace(f"samples: {SAMPLES}", "samples: 0"))
    return []


@case("alpha over 1", "`smooth.alpha`: input should be less than or equal to 1", "recipe.yaml:6")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(SMOOTH.replace("0.5", "1.5"))
    return []


@case("smooth rule says both", "give either `alpha` or `skip: true`", "recipe.yaml:8")
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(RECIPE + "smooth:\n  rules:\n  - {match: '*', alpha: 1.0, skip: true}\n")
    return []


@case("static experts", "the engine has no W8A8 for experts", "experts.0.down_proj` (", "w8a8_dynamic")
def _(bench: Bench) -> Arguments:
    bench.model = Models(bench.root / "made")("qwen3_moe")
    return []


@case(
    "a calibration for nothing",
    "nothing in this recipe needs a calibration",
    "--calibration",
    "leave",
    only="quantize",
)
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(DYNAMIC)
    return ["--calibration", bench.root / "finished"]


@case(
    "nothing to calibrate",
    "nothing in this recipe needs a calibration",
    "recipe.yaml",
    "quantize",
    only="calibrate",
)
def _(bench: Bench) -> Arguments:
    bench.edit_recipe(DYNAMIC)
    return []


# the calibration that is there


@case("calibration of another model", "there is of another model", "out.calibration", "to make it anew")
def _(bench: Bench) -> Arguments:
    there(bench)
    change_tensors(bench.own_model(), double)
    return []


def double(tensors: dict[str, torch.Tensor]) -> None:
    """Other weights of the same shapes."""
    tensors["model.layers.2.mlp.up_proj.weight"] *= 2


@case(
    "calibration with other edits",
    "there is of other edits: made without `smooth`; this recipe has it (smooth.alpha 0.5)",
    "out.calibration",
    "to make it anew",
)
def _(bench: Bench) -> Arguments:
    there(bench)
    bench.edit_recipe(SMOOTH)
    return []


@case(
    "calibration of other samples",
    f"is of other inputs: calibration.samples was {SAMPLES}, is {SAMPLES - 1}",
    "out.calibration",
    "to make it anew",
)
def _(bench: Bench) -> Arguments:
    there(bench)
    return ["--set", f"calibration.samples={SAMPLES - 1}"]


@case("calibration of other text", "there is of other data", "out.calibration", "to make it anew")
def _(bench: Bench) -> Arguments:
    there(bench)
    (bench.root / "text.txt").write_text(TEXT[1:])
    return []


@case(
    "calibration by another tokenizer", "there is of other data", "out.calibration", "to make it anew"
)
def _(bench: Bench) -> Arguments:
    there(bench)
    (bench.own_model() / "special_tokens_map.json").write_text("{}")
    return []


@case(
    "foreign folder", "is not a calibration: it holds `thesis.tex`", "out.calibration", "another folder"
)
def _(bench: Bench) -> Arguments:
    bench.store.mkdir()
    (bench.store / "thesis.tex").write_text("years of work")
    return []


@case(
    "foreign folder, fresh",
    "is not a calibration: it holds `thesis.tex`",
    "out.calibration",
    only="calibrate",
)
def _(bench: Bench) -> Arguments:
    (there(bench) / "thesis.tex").write_text("years of work")
    return ["--fresh"]


@case(
    "calibration elsewhere is foreign",
    "is not a calibration",
    "theirs",
    "another folder",
    only="quantize",
)
def _(bench: Bench) -> Arguments:
    (bench.root / "theirs").mkdir()
    (bench.root / "theirs" / "thesis.tex").write_text("years of work")
    return ["--calibration", bench.root / "theirs"]


@case(
    "calibration elsewhere is a file", "is not a directory", "text.txt", "move it away", only="quantize"
)
def _(bench: Bench) -> Arguments:
    return ["--calibration", bench.root / "text.txt"]


@case(
    "calibration is a broken link", "exists and is not a directory", "out.calibration", "move it away"
)
def _(bench: Bench) -> Arguments:
    bench.store.symlink_to(bench.root / "nowhere")
    return []


@case("calibration below a file", "not a directory", "text.txt", "--calibration", only="quantize")
def _(bench: Bench) -> Arguments:
    return ["--calibration", bench.root / "text.txt" / "deep"]


@case(
    "calibration in the model",
    "the model directory",
    "own/calibration",
    "another folder",
    only="quantize",
)
def _(bench: Bench) -> Arguments:
    return ["--calibration", bench.own_model() / "calibration"]


@case("calibration is the output", "the output directory", "out", "another folder", only="quantize")
def _(bench: Bench) -> Arguments:
    return ["--calibration", bench.out]


@case(
    "calibration in out.partial",
    "the folder of an unfinished run",
    "out.partial",
    "another folder",
    only="quantize",
)
def _(bench: Bench) -> Arguments:
    return ["--calibration", bench.partial / "deep"]


@case("output in the calibration", "the output directory", "deep", "another folder", only="quantize")
def _(bench: Bench) -> Arguments:
    return ["--calibration", bench.root / "deep", "--out", bench.root / "deep" / "out"]


@case("calibration where nothing can be written", "stores no files", "/proc", code=3, only="quantize")
def _(bench: Bench) -> Arguments:
    return ["--calibration", "/proc/calibration"]


@case("name too long", "file name is too long", "xxx", "another folder", only="quantize")
def _(bench: Bench) -> Arguments:
    return ["--calibration", bench.root / ("x" * 256)]


@case("truncated layer", "file is truncated", "layer-00001.safetensors", "to make it anew")
def _(bench: Bench) -> Arguments:
    path = there(bench) / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return []


@case(
    "missing layer",
    "a file of the calibration is missing",
    "layer-00001.safetensors",
    "to make it anew",
)
def _(bench: Bench) -> Arguments:
    (there(bench) / "layer-00001.safetensors").unlink()
    return []


def damage(name: str, file: str, change: Callable[[str], str], what: str) -> None:
    def setup(bench: Bench) -> Arguments:
        path = there(bench) / file
        path.write_text(change(path.read_text()))
        return []

    CASES[name] = Case(setup, what, file, "out.calibration to make it anew")


def key_removed(key: str) -> Callable[[str], str]:
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key})


damage("damaged report", "layer-00002.json", lambda text: text[:-20], "not valid JSON")
damage("report is a list", "layer-00002.json", lambda _: "[]", "must hold a JSON object")
damage("report is empty", "layer-00002.json", lambda _: "{}", "`edits` is missing")
for lost in ("modules", "edits", "uncalibrated"):
    damage(f"report without {lost}", "layer-00002.json", key_removed(lost), f"`{lost}` is missing")
damage(
    "groups are not listed",
    "layer-00002.json",
    lambda text: text.replace('"uncalibrated": []', '"uncalibrated": [],\n "smoothed": 4'),
    "`smoothed` should be a list, not the number 4",
)
damage(
    "report without numbers",
    "layer-00002.json",
    lambda text: text.replace('"tokens": 64', '"tokens": "many"'),
    ".tokens` should be a whole number, not text",
)


@case("edit added to a report", "has changed since", "layer-00002.safetensors", "to make it anew")
def _(bench: Bench) -> Arguments:
    report = there(bench) / "layer-00002.json"
    added = '"edits": {"lm_head.weight": {"rows": "00009"}}'
    report.write_text(report.read_text().replace('"edits": {}', added))
    return []


@case(
    "edits that are not objects, sealed", "`edits.x` should be an object, not text", "layer-00002.json"
)
def _(bench: Bench) -> Arguments:
    seal_again(there(bench), 2, lambda report: report.update(edits={"x": "y"}))
    return []


@case("flipped bit", "has changed since", "layer-00001.safetensors", "to make it anew")
def _(bench: Bench) -> Arguments:
    tensors = there(bench) / "layer-00001.safetensors"
    raw = bytearray(tensors.read_bytes())
    raw[-6] ^= 1  # of a number, which stays one
    tensors.write_bytes(raw)
    return []


damage("damaged head", "calibration.json", lambda text: text[:-20], "not valid JSON")


@case(
    "head of a later version",
    "this quantcli reads version 2",
    "out.calibration",
    "pip install --upgrade",
)
def _(bench: Bench) -> Arguments:
    head = there(bench) / "calibration.json"
    head.write_text(head.read_text().replace('"version": 2', '"version": 3'))
    return []


@case("head of an earlier version", "is of an earlier version", "out.calibration", "to make it anew")
def _(bench: Bench) -> Arguments:
    head = there(bench) / "calibration.json"
    head.write_text(json.dumps({"version": 1, "layers": 4, "model": "", "recipe": {}, "data": ""}))
    return []


damage("head without its key", "calibration.json", key_removed("edits"), "`edits` is missing")


@case("no head", "is not a calibration", "out.calibration", "another folder")
def _(bench: Bench) -> Arguments:
    (there(bench) / "calibration.json").unlink()
    return []


@case(
    "begun by other versions",
    "was begun by other versions",
    "out.calibration",
    "to make it anew",
    planned=False,
)
def _(bench: Bench) -> Arguments:
    head = there(bench) / "calibration.json"
    head.write_text(head.read_text().replace(torch.__version__, "1.0"))
    (bench.store / "layer-00003.json").unlink()
    return []


# the command line


@case(
    "far too little memory",
    "one decoder layer and its work take",
    "--max-memory",
    "fewer --workers",
    planned=False,
)
def _(bench: Bench) -> Arguments:
    return ["--max-memory", "1KB"]


@case("memory is no size", "expected a size such as", "--max-memory nonsense", "8GB")
def _(bench: Bench) -> Arguments:
    return ["--max-memory", "nonsense"]


@case(
    "memory without its unit",
    "`--max-memory`: a size of 8 bytes is below the smallest, 1KB: write the unit, such as 8GB",
    "--max-memory 8",
)
def _(bench: Bench) -> Arguments:
    return ["--max-memory", "8"]


@case("no memory", "expected a size such as", "--max-memory 0", "8GB")
def _(bench: Bench) -> Arguments:
    return ["--max-memory", "0"]


@case("unknown device", "unknown device `gpu`", "--device gpu", "cpu, cuda or npu")
def _(bench: Bench) -> Arguments:
    return ["--device", "gpu"]


@case("device that computes nothing", "unknown device `meta`", "--device meta", "cpu, cuda or npu")
def _(bench: Bench) -> Arguments:
    return ["--device", "meta"]


def check_message(result: Result, expected: Case) -> None:
    """One message in three lines: what, where, how to fix it."""
    assert result.code == expected.code, result
    what, *others = result.later.splitlines()
    assert what.startswith("error: ")
    assert expected.what in what
    assert not what.endswith(".")
    assert 1 <= len(others) <= 2, result.err
    said = {line[:6].strip(" :"): line for line in others}
    for key, wanted in (("-->", expected.where), ("fix", expected.fix)):
        assert wanted is None or wanted in said[key], result.err


@pytest.mark.parametrize("name", CASES)
def test_refused(bench: Bench, name: str) -> None:
    expected = CASES[name]
    arguments = expected.setup(bench)
    before = snapshot(bench.root)
    commands: dict[str, Callable[..., Result]] = {"calibrate": bench.calibrate, "quantize": bench.run}
    for command in (expected.only,) if expected.only else commands:
        result = commands[command](*arguments, "--quiet")
        check_message(result, expected)
        assert result.out == ""
        table = commands[command](*arguments, "--quiet", "--json")
        assert table.json["exit_code"] == expected.code
        assert table.json["error"]["what"] == result.err.splitlines()[0].removeprefix("error: ")
    if expected.only != "calibrate":
        planned = bench.run(*arguments, "--quiet", "--plan")
        wanted = (result.code, result.err) if expected.planned else (0, "")
        assert (planned.code, planned.err) == wanted
    assert snapshot(bench.root) == before, "something was left behind"


def test_there_are_many() -> None:
    assert len(CASES) >= 60


def test_anew_as_the_message_says(bench: Bench) -> None:
    """The fix of a damaged calibration, followed to the letter."""
    whole = snapshot(there(bench))
    (bench.store / "layer-00001.safetensors").write_bytes(b"")
    said = bench.run("--quiet").err
    assert f"delete {bench.store} to make it anew" in said
    assert bench.calibrate("--fresh").code == 0
    assert snapshot(bench.store) == whole
    assert bench.run().code == 0


# what only the numbers show


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_layer_that_yields_nan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, workers: int, smooth: bool
) -> None:
    monkeypatch.setattr(session, "BATCH_TOKENS", LENGTH)
    bench.edit_recipe(SMOOTH if smooth else RECIPE)
    model = bench.own_model()
    change_tensors(model, lambda t: t["model.layers.2.mlp.down_proj.weight"][5].fill_(float("inf")))
    for _ in range(2):  # going on does not make it good
        result = bench.run("--quiet", "--workers", workers)
        assert result.code == 2
        what, where, fix = result.later.splitlines()
        assert what == "error: `model.layers.2` yields NaN or Inf for sample 0, counted from 0"
        assert where == f"  --> {model}"
        assert "calibration.dtype" in fix
        assert not bench.out.exists()
        assert not bench.partial.exists()
    assert "layer 2/4" not in bench.calibrate().err, "what was sound is kept"


def test_nan_for_one_sample(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is named by its place among the samples, in whatever batch it is."""
    text = "".join("abcdefgh"[n % 8] for n in range(LENGTH * SAMPLES))
    at = 2 * LENGTH + 3
    (bench.root / "text.txt").write_text(text[:at] + "Z" + text[at + 1 :])
    token = 4 + 1 + ord("Z") - 32
    change_tensors(
        bench.own_model(), lambda t: t["model.embed_tokens.weight"][token].fill_(float("nan"))
    )
    for tokens in (LENGTH, 2 * LENGTH, 2048):
        monkeypatch.setattr(session, "BATCH_TOKENS", tokens)
        result = bench.calibrate("--quiet", "--fresh")
        assert result.code == 2
        assert result.err.startswith(
            "error: `model.layers.0` yields NaN or Inf for sample 2, counted from 0\n"
        )


def test_inf_in_a_norm(bench: Bench) -> None:
    change_tensors(
        bench.own_model(), lambda t: t["model.layers.1.input_layernorm.weight"][5].fill_(float("inf"))
    )
    result = bench.calibrate("--quiet")
    assert result.code == 2
    assert result.err.startswith(
        "error: `model.layers.1` yields NaN or Inf for sample 0, counted from 0\n"
    )


# the machine


@pytest.mark.parametrize("writes", range(4))
def test_full_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    monkeypatch.setattr(session, "BATCH_TOKENS", LENGTH)
    bench.edit_recipe(SMOOTH)
    wanted = bench.at("wanted")
    assert wanted.run().code == 0
    real, left = os.pwrite, writes

    def pwrite(fd: int, data: Any, at: int) -> int:
        nonlocal left
        if "states-" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        result = bench.run("--quiet")
    assert result.code == 3
    what, where, fix = result.later.splitlines()
    assert what == "error: no space left on device"
    assert where == f"  --> {bench.store}/.states-0000{writes}.safetensors.writing"
    assert fix == (
        "  fix: free some space and run the same command again: it continues where it stopped"
    )
    assert not bench.out.exists()
    again = bench.run()
    assert again.code == 0, again.err
    assert ("layer 1/4" in again.err) == (writes < 2)
    assert snapshot(bench.store) == snapshot(wanted.store)
    assert snapshot(bench.out) == snapshot(wanted.out)


def test_no_permission(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(bench.root)
    real = os.access
    with monkeypatch.context() as patch:  # root may write anywhere
        patch.setattr(os, "access", lambda path, mode: Path(path) != bench.root and real(path, mode))
        for arguments in (["calibrate"], ["quantize", "--plan"], ["quantize"]):
            more = ["--out", bench.root / "deep" / "out", "--quiet"]
            result = run_cli(arguments[0], bench.recipe, "--model", bench.model, *arguments[1:], *more)
            assert result.code == 3
            what, where, fix = result.later.splitlines()
            assert (what, where) == ("error: no permission to write here", f"  --> {bench.root}")
            assert fix.startswith("  fix: choose another ")
    real_mkdir = os.mkdir

    def mkdir(path: Any, *arguments: Any) -> None:
        if str(path) == str(bench.store):
            raise PermissionError(errno.EACCES, "Permission denied")
        real_mkdir(path, *arguments)

    monkeypatch.setattr(os, "mkdir", mkdir)
    for run in (bench.calibrate, bench.run):
        result = run("--quiet")
        assert result.code == 3
        what, where, fix = result.later.splitlines()
        assert (what, where) == ("error: permission denied", f"  --> {bench.store}")
        assert "permissions of the folder" in fix
    assert snapshot(bench.root) == before


def test_a_whole_calibration_may_be_read_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    store = there(bench)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != store and real(path, mode))
    before = snapshot(store)
    assert bench.run().code == 0
    assert snapshot(store) == before


@pytest.fixture
def locked(bench: Bench) -> Iterator[Bench]:
    """Another run is at work on the calibration; it has done three layers."""
    (there(bench) / "layer-00003.json").unlink()
    with (bench.store / ".lock").open("w") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield bench


def test_another_run_is_at_work(locked: Bench) -> None:
    before = snapshot(locked.root)
    for run, more in (
        (locked.calibrate, ()),
        (locked.calibrate, ("--fresh",)),
        (locked.run, ()),
        (locked.run, ("--plan",)),
    ):
        result = run(*more, "--quiet")
        assert (result.code, result.out) == (3, "")
        assert result.err.splitlines() == [
            "error: another run is writing here",
            f"  --> {locked.store}",
            "  fix: wait for it, or stop it",
        ]
    assert snapshot(locked.root) == before


def test_another_run_begins_meanwhile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found nothing there; the lock decides."""
    real = session.load_dataset
    files = []

    def load(*arguments: Any, **options: Any) -> Any:
        bench.store.mkdir()
        files.append((bench.store / ".lock").open("w"))
        fcntl.flock(files[0].fileno(), fcntl.LOCK_EX)
        return real(*arguments, **options)

    monkeypatch.setattr(session, "load_dataset", load)
    try:
        result = bench.calibrate("--quiet")
    finally:
        files[0].close()
    assert result.code == 3
    assert result.err.startswith("error: another run is writing here\n")
    assert [path.name for path in bench.store.iterdir()] == [".lock"]
