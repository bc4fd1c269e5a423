"""`quantcli verify` as a user meets it: the bundled trained model, depths, limits, files for CI."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.calibration.replay.served import Served, log_probs
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.core.events import SILENT
from quantcli.verification.on_text.corpus import read_texts, text_sources
from quantcli.verification.options import VerifyOptions
from tests.e2e.conftest import Result, run_cli
from tests.hub_cache import COMMIT, cache_model
from tests.tiny_models import make_tiny

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-qwen3"
TEXT = ROOT / "examples" / "evaluation.txt"
RUN = ("--against", MODEL, "--run")
FEW = ("--samples", "4", "--length", "128")
DOWN = "model.layers.3.mlp.down_proj"


def convert(recipe: str, out: Path, *sets: str) -> Path:
    job = commands.plan(ROOT / "recipes" / f"{recipe}.yaml", model=str(MODEL), out=out, overrides=sets)
    commands.quantize(job)
    return out


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("w8a8_dynamic", tmp_path_factory.mktemp("verify") / "dynamic")


@pytest.fixture
def copy(dynamic: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dynamic, tmp_path / "copy"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of a checkpoint of one shard; the manifest is taken away, which would tell."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "quantcli_manifest.json").unlink()


def verify(*words: Any) -> Result:
    return run_cli("verify", *map(str, words))


def test_a_sound_one(dynamic: Path) -> None:
    plain = verify(dynamic)
    first, *following = plain.err.splitlines()
    assert (plain.code, first) == (0, f"verifying {dynamic}: structure")
    assert all(line.startswith("next: ") for line in following)
    assert plain.out.splitlines()[-1].startswith(f"passed: {dynamic}: structure")
    deep = verify(dynamic, "--full", "--against", MODEL, "--tp", "1,2", "--json")
    assert deep.code == 0, deep.out
    assert deep.json["depths"] == ["structure", "full", "against"]
    assert deep.json["tensors"] == {"edited": 0, "equal": 27, "quantized": 42}
    assert deep.json["findings"] == []
    assert len(deep.json["modules"]) == 42
    worst = deep.json["modules"][0]
    assert 38 < worst["sqnr_db"] < 44
    assert worst["limit_db"] == 20
    assert worst["sqnr_db"] == min(module["sqnr_db"] for module in deep.json["modules"])


def test_run_is_what_the_two_models_say(dynamic: Path) -> None:
    done = verify(dynamic, "--against", MODEL, "--run", "--data", TEXT, *FEW, "--json")
    assert done.code == 0, done.out
    found = done.json["run"]
    model = open_checkpoint(MODEL)
    options = VerifyOptions(
        dynamic, against=str(MODEL), run=True, data=[str(TEXT)], samples=4, length=128
    )
    batches = read_texts(text_sources(options), model, SILENT).batches
    base = torch.cat(log_probs(model, batches)).double()
    made = torch.cat(log_probs(Served.open(dynamic), batches)).double()
    assert found["tokens"] == base.numel() == 4 * 127
    assert found["ppl"]["reference"] == pytest.approx(math.exp(-base.mean()), abs=1e-3)
    assert found["ppl"]["checkpoint"] == pytest.approx(math.exp(-made.mean()), abs=1e-3)
    change = float((made - base).abs().mean())
    assert found["mean_abs_logprob_change"] == pytest.approx(change, abs=1e-5)
    assert 0.005 < change < 0.05
    assert 1e-4 < found["kl"]["mean"] < 0.002 < found["kl"]["max"] < 0.05
    assert 0.95 < found["top1_agreement"] < 1
    assert [layer["ok"] for layer in found["layers"]] == [True] * 6
    assert all(30 < layer["sqnr_db"] < 50 for layer in found["layers"])
    assert len(found["windows"]) == 4


def test_against_itself_nothing_differs(dynamic: Path) -> None:
    words = ("--against", dynamic, "--run", "--data", TEXT, *FEW, "--json")
    done = verify(dynamic, *words)
    assert done.code == 0
    assert all(module["sqnr_db"] == 200 for module in done.json["modules"])
    assert all(module["codes_differ"] == 0 for module in done.json["modules"])
    assert all(module["scale_ratio"] == [1.0, 1.0] for module in done.json["modules"])
    run = done.json["run"]
    assert (run["kl"]["max"], run["top1_agreement"], run["ppl"]["ratio"]) == (0.0, 1.0, 1.0)


def test_against_another_quantized_one(dynamic: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "static.yaml"
    recipe.write_text(
        f"target: ascend\ncalibration: {{data: {TEXT}, samples: 8, length: 64}}\nrules:\n"
        "  - {match: '*.down_proj', scheme: {name: w8a8_dynamic, clip: none}}\n"
        "  - {match: '*_proj', scheme: {name: w8a8_static, clip: none}}\n"
    )
    static = tmp_path / "static"
    commands.quantize(commands.plan(recipe, model=str(MODEL), out=static))
    done = verify(static, "--against", dynamic, "--json")
    assert done.code == 0, done.out
    modules = {module["module"]: module for module in done.json["modules"]}
    assert modules[DOWN]["codes_differ"] == 0  # dynamic in both
    assert modules["model.layers.3.mlp.up_proj"]["codes_differ"] > 0
    low, high = modules["model.layers.3.mlp.up_proj"]["scale_ratio"]
    assert 0.98 < low < high < 1.02
    assert "quantized, too" in done.out


def test_several_with_a_report_of_before(dynamic: Path, copy: Path, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text(verify(dynamic, "--json").out)
    (copy / "tokenizer.json").unlink()
    done = verify(dynamic, copy, "--baseline", before, "--json")
    assert done.code == 1
    assert (done.json["ok"], done.json["exit_code"]) == (False, 1)
    assert done.json["error"]["where"] == str(copy)
    good, bad = done.json["checkpoints"]
    assert (good["ok"], bad["ok"]) == (True, False)
    errors = {figure["name"]: figure for figure in bad["baseline"]["figures"]}["errors"]
    assert (errors["before"], errors["better"]) == (0, False)
    assert errors["now"] == sum(finding["severity"] == "error" for finding in bad["findings"])
    assert all(figure["better"] is None for figure in good["baseline"]["figures"])


def bad_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].flip(0)


def test_one_bad_layer_is_found(copy: Path, tmp_path: Path) -> None:
    change(copy, bad_layer)
    assert verify(copy, "--full").code == 0, "no header and no number tells"
    junit, page = tmp_path / "out.xml", tmp_path / "out.html"
    words = ("--against", MODEL, "--run", "--data", TEXT, *FEW, "--junit", junit, "--report", page)
    done = verify(copy, *words)
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0].startswith("FAILED       sqnr: SQNR is ")
    assert DOWN in lines[1]
    assert lines[-1].startswith(f"FAILED: {copy}: ")
    (row,) = (line for line in lines if line.startswith("FAILED  "[:8]) and f" {DOWN} " in line)
    assert "20.0 dB" in row
    cases = {case.get("name"): case for case in ElementTree.parse(junit).iter("testcase")}
    assert cases[DOWN].find("failure") is not None
    assert cases["model.layers.3.mlp.up_proj"].find("failure") is None
    assert DOWN in page.read_text()
    told = verify(copy, *words[:-4], "--json").json
    layers = {layer["layer"]: layer for layer in told["run"]["layers"]}
    assert min(layers.values(), key=lambda layer: layer["sqnr_db"])["layer"] == "model.layers.3"
    assert told["modules"][0]["module"] == DOWN


def blow_up(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"][:] = 3e38


def test_a_layer_that_overflows_is_no_error_of_the_tool(copy: Path) -> None:
    change(copy, blow_up)
    done = verify(copy, *RUN, "--data", TEXT, *FEW, "--json")
    assert done.code == 1
    assert done.json["run"] is None
    said = {f["check"]: f["what"] for f in done.json["findings"]}
    assert said["layer outputs"].startswith("`model.layers.3` yields NaN or Inf")


@pytest.mark.parametrize(
    ("words", "check"),
    [
        (("--min-sqnr", "60"), "sqnr"),
        (("--max-ppl-ratio", "0.5"), "perplexity"),
        (("--max-kl", "0.0000001"), "kl"),
    ],
)
def test_limits(dynamic: Path, words: tuple[str, ...], check: str) -> None:
    done = verify(dynamic, "--against", MODEL, "--run", "--data", TEXT, *FEW, *words, "--json")
    assert done.code == 1
    assert {finding["check"] for finding in done.json["findings"]} == {check}


def test_limits_of_the_recipe(tmp_path: Path) -> None:
    out = convert("w8a8_dynamic", tmp_path / "out", "verify={min_sqnr: 60.5}")
    done = verify(out, "--against", MODEL, "--json")
    assert done.code == 1
    assert done.json["limits"]["min_sqnr"] == 60.5
    assert verify(out, "--against", MODEL, "--min-sqnr", "30").code == 0, "the command line wins"


def coarser(tensors: dict[str, torch.Tensor]) -> None:
    """Every code of a module off by 8: about 14 dB, and no single number by much."""
    codes = tensors[f"{DOWN}.weight"]
    off = torch.where(torch.arange(codes.numel()).view(codes.shape) % 3 == 0, 8, -8)
    tensors[f"{DOWN}.weight"] = (codes.int() + off).clamp(-127, 127).to(torch.int8)


@pytest.mark.parametrize("limit", ["-.inf", "5"])
def test_a_checkpoint_cannot_loosen_limits(copy: Path, tmp_path: Path, limit: str) -> None:
    change(copy, coarser)
    recipe = copy / "quantcli_recipe.yaml"
    recipe.write_text(recipe.read_text() + f"verify: {{min_sqnr: {limit}}}\n")
    done = verify(copy, "--against", MODEL)
    assert done.code == 1
    assert "the limit 20.00 dB" in done.out
    hint = (
        f"the checkpoint's own `min_sqnr` is {float(limit.replace('.', '')):g}, looser than the default"
    )
    assert hint in done.out
    assert "--recipe FILE" in done.out
    own = tmp_path / "own.yaml"
    own.write_text("target: ascend\nrules: [{match: '*', scheme: w8a16}]\nverify: {min_sqnr: 10}\n")
    loose = verify(copy, "--against", MODEL, "--recipe", own, "--json")
    assert (loose.code, loose.json["limits"]["min_sqnr"]) == (0, 10), loose.out
    assert verify(copy, "--against", MODEL, "--recipe", own, "--min-sqnr", "60").code == 1


def test_the_run_keeps_its_limits(copy: Path, tmp_path: Path) -> None:
    change(copy, bad_layer)
    recipe = copy / "quantcli_recipe.yaml"
    recipe.write_text(recipe.read_text() + "verify: {max_ppl_ratio: .inf, max_kl: 1000.0}\n")
    words = ("--against", MODEL, "--run", "--data", TEXT, *FEW, "--json")
    done = verify(copy, *words)
    assert done.json["limits"] == {"min_sqnr": None, "max_ppl_ratio": 1.05, "max_kl": 0.1}
    fixes = {f["check"]: f["fix"] for f in done.json["findings"] if f["severity"] == "error"}
    assert "the checkpoint's own `max_ppl_ratio` is inf" in fixes["perplexity"]
    assert "the checkpoint's own `max_kl` is 1000" in fixes["kl"]
    own = tmp_path / "own.yaml"
    own.write_text("target: ascend\nrules: [{match: '*', scheme: w8a16}]\n"
                   "verify: {max_ppl_ratio: 1000, max_kl: 1000}\n")  # fmt: skip
    loose = verify(copy, *words, "--recipe", own)
    checks = {f["check"] for f in loose.json["findings"] if f["severity"] == "error"}
    assert checks == {"sqnr", "layer outputs"}


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_checkpoint_and_a_model_on_the_hub(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    """By its id, as fetched earlier; the client does not ask the network for what is in its cache."""
    import huggingface_hub

    hub = tmp_path / "hub"
    for number, folder in enumerate((copy, Path(shutil.copytree(MODEL, tmp_path / "model")))):
        place = cache_model(folder, hub / str(number))
        place.parents[1].rename(hub / f"models--org--{number}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(hub))
    done = verify(f"org/0{revision}", "--against", f"org/1{revision}", "--json")
    assert done.code == 0, done.out + done.err
    assert done.json["checkpoint"] == str(hub / "models--org--0" / "snapshots" / COMMIT)
    assert done.json["against"] == str(hub / "models--org--1" / "snapshots" / COMMIT)
    assert done.json["tensors"]["quantized"] == 42
    inside = hub / "models--org--0" / "snapshots" / COMMIT / "junit.xml"
    refused = verify(f"org/0{revision}", "--junit", inside)
    assert (refused.code, "become part of the checkpoint" in refused.err) == (2, True)


def test_a_revision_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    done = verify("org/name@v9")
    assert done.code == 3
    assert "`org/name@v9` is neither a directory nor complete in the Hub cache" in done.err


@pytest.mark.parametrize(
    ("file", "check", "what"),
    [
        ("modeling_evil.py", "manifest", "it holds code"),
        ("tokenizer.model", "manifest", "it belongs to a tokenizer"),
        ("model-extra.safetensors", "manifest", "it holds weights"),
        ("NOTES.md", None, "it was added later"),
    ],
)
def test_a_file_that_was_added(copy: Path, file: str, check: str | None, what: str) -> None:
    source = next(copy.glob("*.safetensors"))
    (copy / file).write_bytes(source.read_bytes() if file.endswith(".safetensors") else b"x")
    done = verify(copy, "--json")
    assert done.code == (1 if check else 0)
    (finding,) = (f for f in done.json["findings"] if f["where"] == file and f["check"] == "manifest")
    assert what in finding["what"]


def test_the_other_model_has_more_and_less(copy: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(MODEL, tmp_path / "source"))
    file = next(iter(sorted(source.glob("*.safetensors"))))
    tensors = load_file(file)
    name = next(iter(sorted(tensors)))
    tensors["model.layers.5.extra.weight"] = torch.ones(2, 2)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    for index in source.glob("*.index.json"):
        table = json.loads(index.read_text())
        table["weight_map"]["model.layers.5.extra.weight"] = file.name
        index.write_text(json.dumps(table))
    (copy / "tokenizer_config.json").write_text("{}")
    done = verify(copy, "--against", source, "--json")
    assert done.code == 1
    said = {(f["check"], f["what"]) for f in done.json["findings"]}
    missing = "`model.layers.5.extra.weight` of the other model is missing"
    assert ("source", missing) in said
    assert ("source", "file differs from the other model's") in said


def test_tensors_that_cannot_be_compared_by_rows(copy: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(MODEL, tmp_path / "source"))
    table = "model.layers.5.position_table"  # two dimensions, but not a module
    index = json.loads((source / "model.safetensors.index.json").read_text())
    file = source / index["weight_map"][f"{DOWN}.weight"]
    tensors = load_file(file) | {table: torch.ones(4, 4), f"{DOWN}.weight": torch.ones(7)}
    save_file(tensors, file, metadata={"format": "pt"})
    index["weight_map"][table] = file.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    change(copy, lambda tensors: tensors.update({table: torch.zeros(4, 4)}))
    description = json.loads((copy / "quant_model_description.json").read_text())
    (copy / "quant_model_description.json").write_text(json.dumps(description | {table: "FLOAT"}))
    done = verify(copy, "--against", source, "--json")
    assert done.code == 1, done.err
    errors = {f["where"]: (f["check"], f["what"]) for f in done.json["findings"] if f["fix"]}
    assert errors[f"`{table}`"] == ("copies", "differs from the other model, first at [0, 0]")
    assert errors[f"`{DOWN}`"] == ("source", "is [256, 768], in the other model [7]")


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (("--run",), "--run compares two models", "--against MODEL"),
        (RUN, "--run needs text", "--data FILE"),
        (("--data", TEXT), "--data has no effect without --run", "add --run"),
        (("--max-kl", "3"), "--max-kl has no effect without --run", "add --run"),
        (("--max-ppl-ratio", "3"), "--max-ppl-ratio has no effect without --run", "add --run"),
        (("--min-sqnr", "30"), "--min-sqnr has no effect without --against", "add --against MODEL"),
        (("--recipe", "r.yaml"), "--recipe has no effect without --against", "add --against MODEL"),
        (("--against", MODEL, "--recipe", "no.yaml"), "the recipe does not exist", "quantcli recipes"),
        (("--against", MODEL, "--recipe", "w8a16"), "the recipe sets no limit", "leave out --recipe"),
        (("--min-sqnr", "-5"), "-5.0 is not a limit", "number"),
        (("--junit", "/dev/null"), "`/dev/null` is not a regular file", "new file"),
        (("--tp", "1,x"), "tensor parallel sizes are whole numbers", "--tp 1,2,4"),
        (("--max-kl", "-1"), "-1.0 is not a limit", "number"),
        (("--min-sqnr", "nan"), "nan is not a limit", "number"),
        (("--junit", "/no/such/folder/x.xml"), "`/no/such/folder` does not exist", "create"),
        (("--report", "."), "is a directory", "give a file"),
        (("--against", "/no/such/model"), "no such model directory", "path"),
        (
            ("--against", MODEL, "--run", "--data", "/no/text"),
            "text `/no/text` does not exist",
            "check the path",
        ),
        (
            ("--against", MODEL, "--run", "--data", TEXT, "--samples", "999999"),
            "data gives",
            "lower --samples or --length",
        ),
        (
            ("--against", MODEL, "--run", "--data", TEXT, "--length", "99999"),
            "longer than",
            "set --length to",
        ),
    ],
)
def test_bad_options(dynamic: Path, words: tuple[Any, ...], what: str, fix: str | None) -> None:
    done = verify(dynamic, *words)
    assert done.code == 2, done.out
    assert "\nerror: " in f"\n{done.later}", done.err
    assert what in done.err
    assert fix is None or fix in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_a_report_is_no_part_of_the_checkpoint(copy: Path, tmp_path: Path) -> None:
    done = verify(copy, "--junit", copy / "junit.xml")
    assert (done.code, "become part of the checkpoint" in done.err) == (2, True)
    link, target = tmp_path / "link.xml", tmp_path / "target.xml"
    link.symlink_to(target)
    assert verify(copy, "--junit", link).code == 0
    assert link.is_symlink()
    assert target.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("run", [False, True])
def test_another_model(copy: Path, tmp_path: Path, run: bool) -> None:
    """One line says so, and not a hundred."""
    other = make_tiny(tmp_path / "other", "llama")
    words = ("--run", "--data", TEXT, *FEW) if run else ()
    shutil.copy(MODEL / "tokenizer.json", other)
    shutil.copy(MODEL / "tokenizer_config.json", other)
    done = verify(copy, "--against", other, *words, "--json")
    assert done.code in ({1, 2} if run else {1}), done.err
    if done.code == 1:
        errors = [f["what"] for f in done.json["findings"] if f["severity"] == "error"]
        assert errors[0].startswith("these are different models: ")
        assert len(errors) <= 2


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_full_disk_behind_stdout(dynamic: Path, words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "quantcli", "verify", str(dynamic), *words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "no space left" in done.stderr


@pytest.mark.parametrize("what", ["nothing", "a float model", "an empty folder", "a file"])
def test_nothing_to_verify(tmp_path: Path, what: str) -> None:
    places = {"nothing": tmp_path / "no", "a float model": MODEL, "an empty folder": tmp_path}
    (tmp_path / "file").touch()
    done = verify(places.get(what, tmp_path / "file"))
    assert done.code == 2
    assert done.later.startswith("error: ")
    assert "fix: " in done.err


def test_quantize_does_not_publish_what_does_not_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that forgets an entry of the description is a bug, and is seen before the rename."""
    from quantcli.targets.ascend.target import Ascend

    whole = Ascend._description

    def lossy(self: Ascend, output: Any) -> dict[str, object]:
        table = whole(self, output)
        del table[f"{DOWN}.weight"]
        return table

    monkeypatch.setattr(Ascend, "_description", lossy)
    with pytest.raises(AssertionError, match=f"does not describe `{DOWN}.weight`"):
        convert("w8a8_dynamic", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantize_says_what_the_model_itself_lacks(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 999}))
    out = tmp_path / "out"
    recipe = ROOT / "recipes" / "w8a8_dynamic.yaml"
    done = run_cli("quantize", recipe, "--model", model, "--out", out)
    assert done.code == 0, done.err
    assert "note: the model, sizes: `vocab_size` is 999" in done.err
    assert verify(out).code == 1
