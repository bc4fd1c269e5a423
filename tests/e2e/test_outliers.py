"""`quantcli inspect --outliers`: the table, the document, and a rule that a recipe takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.builders import make_model, write_safetensors
from tests.e2e.conftest import CONFIG, Box, bf16, llama, make_llama, run_cli

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-qwen3"
INT8, FP8, INT4 = "int8 per channel", "fp8_e4m3 per channel", "int4 per channel"
MXFP8, MXFP4, GROUPS = "fp8_e4m3 e8m0 per group", "fp4_e2m1 e8m0 per group", "int4 per group"
Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.3.mlp.down_proj"


def floats(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    bits = np.frombuffer(data, "<u2").astype("<u4") << 16
    return bits.view("<f4").reshape(shape).copy()


def spoilt(folder: Path) -> Path:
    """Five layers; a column of one q_proj is huge, and one weight in each row of one down_proj."""
    tensors = llama(layers=5, side=64)
    for name in (Q, DOWN):
        dtype, shape, data = tensors[f"{name}.weight"]
        w = floats(data, shape)
        if name == Q:
            w[:, 11] *= 100
        else:
            w[np.arange(64), 2 * np.arange(64)] = 100
        tensors[f"{name}.weight"] = dtype, shape, bf16(w)
    return make_model(folder, {"model.safetensors": tensors}, config=CONFIG)


def test_the_bundled_model() -> None:
    done = run_cli("inspect", "--outliers", TINY)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == [
        "module", "shape", *INT8.split(), *FP8.split(), *MXFP4.split(), *MXFP8.split(),
        *GROUPS.split(), *INT4.split(), "amax/rms", "kurtosis", "channel", "of", "the", "median",
    ]  # fmt: skip
    assert len(lines[1:21]) == 20
    assert lines[21] == ""
    assert lines[1].split() == [
        "model.layers.4.mlp.down_proj", "[256,", "768]", "42.1", "dB", "31.6", "dB", "19.0", "dB",
        "31.5", "dB", "20.2", "dB", "19.3", "dB", "5.2", "0.07", "545", "1.23",
    ]  # fmt: skip
    assert lines[22] == "more          24 modules; --json lists all"
    assert "schemes       int8 per channel: w8a16, w8a8_dynamic, w8a8_mix, w8a8_static" in lines
    assert (
        "left out      25 tensors, no weight matrix: model.layers.{0..5}.input_layernorm, " in done.out
    )
    not_hard = "not hard to quantize: of 44 weights the worst keeps 42.1 dB in int8 per channel"
    assert lines[-2] == f"verdict       {not_hard}"
    assert lines[-1] == "advice        none: no module is far below the median of its kind"
    first, *shards = done.err.splitlines()
    assert first == f"ranking the weights of {TINY}"
    assert [line.partition(" · ")[0] for line in shards if line.startswith("shard")] == [
        f"shard {n}/4: model-0000{n}-of-00004.safetensors {size}"
        for n, size in enumerate(("2.1 MB", "3.7 MB", "3.9 MB", "3.9 MB"), start=1)
    ]


def test_the_document_of_the_bundled_model() -> None:
    account = run_cli("inspect", "--outliers", TINY, "--json").json
    assert list(account)[4:] == [
        "path",
        "ranked_by",
        "operands",
        "modules",
        "left_out",
        "verdict",
        "advice",
    ]
    modules = {module["module"]: module for module in account["modules"]}
    assert len(modules) == 44  # 6 layers of 7, embeddings and head
    assert account["left_out"][0]["tensors"] == 25
    head = modules["lm_head"]
    assert list(head) == [
        "module", "shape", "amax_over_rms", "kurtosis", "channel_ratio", "channel", "sqnr_db",
        "not_finite",
    ]  # fmt: skip
    assert head["shape"] == [4096, 256]
    assert head["channel"] == 6
    assert head["channel_ratio"] == pytest.approx(2.3226, abs=1e-3)
    assert head["kurtosis"] == pytest.approx(2.5402, abs=1e-3)
    assert head["amax_over_rms"] == pytest.approx(9.1522, abs=1e-3)
    most = {FP8: 31.691, MXFP8: 31.6, INT8: 43.175, MXFP4: 19.0, GROUPS: 20.3, INT4: 19.5}
    assert head["sqnr_db"] == pytest.approx(most, abs=1)


def test_advice_is_a_rule_that_the_planner_takes(tmp_path: Path, box: Box) -> None:
    model = spoilt(tmp_path / "spoilt")
    done = run_cli("inspect", "--outliers", model)
    rule = done.out[done.out.index("  - match:") :]
    attention = [f"model.layers.1.self_attn.{name}_proj" for name in "kqv"]
    assert yaml.safe_load(rule) == [{"match": [DOWN, *attention], "scheme": "keep"}]
    assert [line.split()[0] for line in done.out.splitlines()[1:3]] == [DOWN, Q]
    assert f"far below     {Q}: " in done.out
    assert "advice        keep 4 modules float, with modules that need the same scheme" in done.out

    box.edit_recipe(box.recipe.read_text().replace("rules:\n", f"rules:\n{rule}"))
    planned = run_cli("quantize", box.recipe, "--model", model, "--out", box.out, "--plan", "--json")
    assert planned.code == 0
    assert planned.json["plan"]["quantized_modules"] == 5 * 7 - 4
    kept = {entry["reason"]: entry["names"] for entry in planned.json["plan"]["kept"]}
    assert kept["rules.0: keep"] == sorted([DOWN, *attention])
    # what it takes along is needed
    box.edit_recipe(box.recipe.read_text().replace(f'      - "{attention[0]}"\n', ""))
    refused = run_cli("quantize", box.recipe, "--model", model, "--out", box.out, "--plan")
    assert refused.code == 2
    assert "the engine fuses these siblings" in refused.err


def test_sqnr_is_that_of_what_quantize_writes(tmp_path: Path) -> None:
    model = spoilt(tmp_path / "spoilt")
    found = {m["module"]: m for m in run_cli("inspect", "--outliers", model, "--json").json["modules"]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('target: ascend\nrules: [{match: "*_proj", scheme: w8a8_dynamic}]\n')
    assert run_cli("quantize", recipe, "--model", model, "--out", tmp_path / "out", "-q").code == 0
    (file,) = (tmp_path / "out").glob("model-*.safetensors")
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])

    def stored(name: str, dtype: str) -> np.ndarray:
        begin, end = header[name]["data_offsets"]
        return np.frombuffer(raw[start + begin : start + end], dtype).reshape(header[name]["shape"])

    tensors = llama(layers=5, side=64)
    for name in ("model.layers.2.mlp.up_proj", "model.layers.0.self_attn.o_proj"):
        _, shape, data = tensors[f"{name}.weight"]
        w = floats(data, shape).astype(np.float64)
        made = stored(f"{name}.weight", "i1") * stored(f"{name}.weight_scale", "<f4").astype(np.float64)
        decibels = 10 * np.log10((w**2).sum() / ((made - w) ** 2).sum())
        assert found[name]["sqnr_db"][INT8] == pytest.approx(decibels, abs=1e-4)


def test_damage_is_named_and_first(tmp_path: Path) -> None:
    tensors = llama()
    w = floats(tensors["model.embed_tokens.weight"][2], (32, 16))
    w[30, 5] = np.nan
    tensors["model.embed_tokens.weight"] = "BF16", (32, 16), bf16(w)
    model = make_model(tmp_path, {"model.safetensors": tensors}, config=CONFIG)
    done = run_cli("inspect", "--outliers", model)
    assert done.code == 0
    first = done.out.splitlines()[1].split()
    assert first == ["model.embed_tokens", "[32,", "16]", *["nan"] * 6, "-", "-", "-", "-"]
    assert (
        "damaged       `model.embed_tokens`[30, 5] is nan: fetch the model again"
        in done.out.splitlines()
    )


def test_a_small_model_shows_all(tmp_path: Path) -> None:
    tensors = llama()
    tensors["zeros.weight"] = "BF16", (4, 4), bytes(32)
    model = make_model(tmp_path, {"model.safetensors": tensors}, config=CONFIG)
    done = run_cli("inspect", "--outliers", model)
    assert done.code == 0
    assert "more " not in done.out
    lines = done.out.splitlines()
    assert len(lines[1 : lines.index("")]) == 9
    last = lines[lines.index("") - 1].split()
    assert last == ["zeros", "[4,", "4]", *["exact"] * 6, "-", "-", "-", "-"]


def test_names_may_hold_quotes(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "m")
    write_safetensors(model / "model.safetensors", {'a"b.weight': ("BF16", (1, 2), bf16(np.ones(2)))})
    account = run_cli("inspect", "--outliers", model, "--json").json
    assert [m["module"] for m in account["modules"]] == ['a"b']


def test_a_quantized_checkpoint_is_decoded(box: Box) -> None:
    assert box.run("--quiet").code == 0
    floats = run_cli("inspect", "--outliers", box.model, "--json").json["modules"]
    codes = run_cli("inspect", "--outliers", box.out, "--json").json["modules"]
    assert {m["module"] for m in floats} == {m["module"] for m in codes}
    ratio = {m["module"]: m["amax_over_rms"] for m in floats}
    for module in codes:
        assert module["amax_over_rms"] == pytest.approx(ratio[module["module"]], rel=0.01)
        quantized = module["module"].endswith("_proj")
        assert (module["sqnr_db"]["int8 per channel"] > 60) == quantized  # codes of these very scales


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_format_that_is_not_known_is_refused(tmp_path: Path, flags: list[str]) -> None:
    model = make_llama(tmp_path / "m")
    write_safetensors(model / "model.safetensors", {"a.weight": ("U8", (1, 2), bytes(2))})
    done = run_cli("inspect", "--outliers", model, *flags)
    assert done.code == 2
    assert "error: model is already quantized: unnamed, U8, 1 module" in done.err
    assert "fix: start from the float checkpoint (bfloat16, float16 or float32)" in done.err
    assert done.out == "" or done.json["exit_code"] == 2


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "model-00003-of-00004.safetensors").unlink()
    done = run_cli("inspect", "--outliers", model)
    assert done.code == 2
    assert "shard `model-00003-of-00004.safetensors` is missing" in done.err


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["--outliers"], "argument MODEL is missing", "quantcli inspect MODEL"),
        (["--outliers", "M", "--tensors", "*"], "--outliers does not take --tensors", "--outliers M"),
        (["--outliers", "--support"],
         "--support takes neither a model nor an option other than --for and --json",
         "quantcli inspect --support"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(arguments: list[str], what: str, fix: str) -> None:
    done = run_cli("inspect", *arguments)
    assert done.code == 2
    assert f"error: {what}" in done.err
    assert fix in done.err


def test_only_this_option_imports_torch() -> None:
    code = (
        "import sys\n"
        "from quantcli.__main__ import main\n"
        "try:\n"
        f"    main(['inspect', {str(TINY)!r}, *sys.argv[1:]])\n"
        "except SystemExit as left:\n"
        "    assert not left.code, left.code\n"
        "sys.stdout.write('torch' if 'torch' in sys.modules else 'light')\n"
    )
    for flags, expected in (([], "light"), (["--outliers"], "torch")):
        words = [sys.executable, "-c", code, *flags]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected
