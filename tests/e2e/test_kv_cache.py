"""A cache of keys and values: converted, verified, damaged, taken over, packed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.calibrating import LENGTH, SAMPLES, Bench, make_bench, write_tokenizer
from tests.e2e.conftest import Result, run_cli, snapshot
from tests.tiny_models import make_tiny

A = "model.layers.1.self_attn"
CALIBRATION = f"calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}}}\n"
TARGETS = {
    "compressed-tensors": ("fp8", "fp8_dynamic"),
    "modelopt": ("fp8", "fp8_dynamic"),
    "fp8": ("fp8", "fp8_tensor"),
    "ascend": ("c8", "w8a8_dynamic"),
}


def recipe(target: str, cache: str, scheme: str) -> str:
    rules = f'rules: [{{match: "*_proj", scheme: {scheme}}}]\n'
    return f"target: {target}\nkv_cache: {cache}\n{CALIBRATION}{rules}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "llama"
    make_tiny(folder, "llama", head_dim=32)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    """One checkpoint for each target."""
    benches = {}
    for target, (cache, scheme) in TARGETS.items():
        bench = make_bench(tmp_path_factory.mktemp(target), model, recipe(target, cache, scheme))
        done = bench.run()
        assert done.code == 0, done.err
        benches[target] = bench
    return benches


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def failed(folder: Path, *more: object) -> list[str]:
    done = run_cli("verify", folder, "--json", *more)
    assert done.code in (0, 1), done.err
    found = json.loads(done.out)["findings"]
    return [f"{f['check']}: {f['what']}" for f in found if f["severity"] == "error"]


@pytest.mark.parametrize(
    ("target", "name", "shape"),
    [
        ("compressed-tensors", f"{A}.k_scale", (1,)),
        ("modelopt", f"{A}.k_proj.k_scale", ()),
        ("fp8", f"{A}.k_scale", (1,)),
        ("ascend", f"{A}.k_proj.kv_cache_scale", (64,)),
    ],
)
def test_names_and_shapes(converted: dict[str, Bench], target: str, name: str, shape: Any) -> None:
    stored = tensors_of(converted[target].out)
    assert stored[name].shape == shape
    assert stored[name].dtype == torch.float32
    assert bool((stored[name] > 0).all())
    config = json.loads((converted[target].out / "config.json").read_text())
    scheme = config.get("quantization_config", {}).get("kv_cache_scheme")
    expected = {"num_bits": 8, "type": "float", "dynamic": False}
    if target == "compressed-tensors":
        assert scheme == expected | {"strategy": "tensor", "symmetric": True}
    if target == "modelopt":
        own = json.loads((converted[target].out / "hf_quant_config.json").read_text())
        assert (scheme, own["quantization"]["kv_cache_quant_algo"]) == (expected, "FP8")
    if target == "ascend":
        table = json.loads((converted[target].out / "quant_model_description.json").read_text())
        assert (table[name], table["kv_cache_type"], table["kv_quant_type"]) == ("C8", "C8", "C8")
        assert not stored[f"{A}.v_proj.kv_cache_offset"].any()


def test_the_scale_is_that_of_the_text(converted: dict[str, Bench], model: Path) -> None:
    """By transformers' own cache over the same windows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bench = converted["compressed-tensors"]
    ids = AutoTokenizer.from_pretrained(model)((bench.root / "text.txt").read_text())["input_ids"]
    runs = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.no_grad():
        cache = llama(runs, use_cache=True).past_key_values
    most = float(cache.layers[1].keys.abs().max()) / 448
    found = float(tensors_of(bench.out)[f"{A}.k_scale"])
    assert 0.5 * most < found <= 1.01 * most  # of some of these windows


@pytest.mark.parametrize("target", TARGETS)
def test_sound_at_every_depth(converted: dict[str, Bench], target: str) -> None:
    bench = converted[target]
    more = ("--data", bench.root / "text.txt", "--samples", 4, "--length", LENGTH)
    calibration = ("--calibration", bench.store)
    assert failed(bench.out, "--full", "--against", bench.model, *calibration, "--run", *more) == []


def test_workers_change_no_byte(converted: dict[str, Bench], tmp_path: Path) -> None:
    bench = converted["ascend"]
    other = make_bench(tmp_path, bench.model, bench.recipe.read_text())
    assert other.run("--workers", 3).code == 0
    assert snapshot(other.out) == snapshot(bench.out)


def test_weights_are_the_same_with_a_cache_and_without(
    converted: dict[str, Bench], tmp_path: Path
) -> None:
    bench = converted["compressed-tensors"]
    text = bench.recipe.read_text().replace("kv_cache: fp8\n", "").replace(CALIBRATION, "")
    plain = make_bench(tmp_path, bench.model, text)
    assert plain.run().code == 0
    cached = tensors_of(bench.out)
    for name, tensor in tensors_of(plain.out).items():
        assert torch.equal(cached[name].view(torch.uint8), tensor.view(torch.uint8)), name


# -- refused before a byte is read ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "cache", "said", "fix"),
    [
        ("ascend", "fp8", "fp8_e4m3 per tensor", "use `kv_cache: c8` or `target: compressed-tensors`"),
        ("fp8", "fp8_per_head", "fp8_e4m3 per head", "use `kv_cache: fp8` or `target: compressed-"),
        (
            "compressed-tensors",
            "c8",
            "int8 per channel",
            "`kv_cache: fp8_per_head` or `target: ascend`",
        ),
        ("gptq", "fp8", "fp8_e4m3 per tensor", "use `target: compressed-tensors` or `target: fp8`"),
    ],
)
def test_what_a_target_cannot_hold(
    model: Path, tmp_path: Path, target: str, cache: str, said: str, fix: str
) -> None:
    done = make_bench(tmp_path, model, recipe(target, cache, "keep")).run("--plan")
    assert done.code == 2
    assert f"target `{target}` has no place for scales of a cache in {said}" in done.err
    assert fix in done.err  # what works, for this target first
    assert "recipe.yaml:2" in done.err


def test_a_cache_needs_text(model: Path, tmp_path: Path) -> None:
    text = recipe("compressed-tensors", "fp8", "keep")
    start, _, rest = text.partition("calibration:")
    done = make_bench(tmp_path, model, start + rest[rest.index("rules:") :]).run("--plan")
    assert done.code == 2
    assert "`kv_cache` needs calibration data, and the recipe names none" in done.err


def test_narrow_heads_are_refused_for_ascend(tmp_path: Path) -> None:
    narrow = make_tiny(tmp_path / "narrow", "llama")
    write_tokenizer(narrow)
    done = make_bench(tmp_path, narrow, recipe("ascend", "c8", "w8a8_dynamic")).run("--plan")
    assert done.code == 2
    assert "heads in multiples of 32; one is 16" in done.err


def test_the_plan_shows_the_cache(converted: dict[str, Bench]) -> None:
    bench = converted["fp8"]
    shown = bench.at("other").run("--plan", "--calibration", bench.store)
    assert "kv_cache: scales measured" in shown.out
    assert "--kv-cache-dtype fp8" in shown.err + shown.out
    table = bench.at("other").run("--plan", "--calibration", bench.store, "--json").json["plan"]
    assert table["kv_cache"]["layers"] == [f"model.layers.{n}.self_attn" for n in range(3)]
    assert table["kv_cache"]["bytes"] == 3 * 2 * 4


# -- damage -----------------------------------------------------------------------------------------

Change = Callable[[dict[str, torch.Tensor]], object]


def damaged(bench: Bench, folder: Path, change: Change) -> Path:
    shutil.copytree(bench.out, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "quantcli_manifest.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("change", "depth", "said"),
    [
        (lambda t: t.pop(f"{A}.v_scale"), (), "cache: v_scale of this layer is missing"),
        (lambda t: t.update({f"{A}.k_scale": torch.ones(2)}), (), "cache: is F32 [2]"),
        (lambda t: t.update({f"{A}.k_scale": torch.zeros(1)}), ("--full",), "values: a scale is not"),
        (lambda t: t.update({f"{A}.k_proj.k_scale": torch.ones(1)}), (), "there is no"),
        (
            lambda t: t.update({"model.layers.9.self_attn.k_scale": torch.ones(1)}),
            (),
            "cache: `model.l",
        ),
    ],
    ids=["lost", "shape", "zero", "twice", "of no layer"],
)
def test_damage_is_named(
    converted: dict[str, Bench], tmp_path: Path, change: Change, depth: Any, said: str
) -> None:
    folder = damaged(converted["compressed-tensors"], tmp_path / "copy", change)
    found = failed(folder, *depth)
    if said == "there is no":
        assert any("is there as well" in error for error in found), found
    else:
        assert any(error.startswith(said) for error in found), found


def test_offsets_of_an_int8_cache(converted: dict[str, Bench], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{A}.k_proj.kv_cache_offset"][3] = 2.0

    folder = damaged(converted["ascend"], tmp_path / "copy", change)
    assert any("is not 0: the engine adds it" in error for error in failed(folder))


def test_a_scale_of_another_layer(converted: dict[str, Bench], tmp_path: Path) -> None:
    """It shows when a text is run, and next to the sound checkpoint; its bits, once recomputed."""
    bench = converted["compressed-tensors"]
    folder = damaged(bench, tmp_path / "copy", lambda t: t[f"{A}.k_scale"].mul_(1 / 16))
    more = ("--data", bench.root / "text.txt", "--samples", 4, "--length", LENGTH)
    run = failed(folder, "--against", bench.model, "--run", *more)
    assert any(error.startswith("rounded cache: keys come out of the cache with") for error in run), run
    assert any("times the other model's" in e for e in failed(folder, "--against", bench.out))
    shutil.copy(bench.out / "quantcli_manifest.json", folder)
    again = failed(folder, "--against", bench.model, "--calibration", bench.store)
    assert any(error.startswith("recomputed:") for error in again), again


# -- scales of a source -----------------------------------------------------------------------------


def again(source: Path, folder: Path, target: str, scheme: str) -> tuple[Bench, Result]:
    bench = make_bench(
        folder, source, f'target: {target}\nrules: [{{match: "*_proj", scheme: {scheme}}}]\n'
    )
    return bench, bench.run()


@pytest.mark.parametrize(("source", "name"), [("modelopt", "k_proj.k_scale"), ("fp8", "k_scale")])
def test_scales_of_a_source_are_taken_over(
    converted: dict[str, Bench], tmp_path: Path, source: str, name: str
) -> None:
    bench, done = again(converted[source].out, tmp_path, "compressed-tensors", "w8a8_dynamic")
    assert done.code == 0, done.err
    assert "scales of the cache are taken over (fp8_e4m3 per tensor)" in done.out
    before, after = tensors_of(converted[source].out), tensors_of(bench.out)
    assert float(after[f"{A}.k_scale"]) == float(before[f"{A}.{name}"])
    assert failed(bench.out, "--against", converted[source].out) == []


def test_a_scale_of_queries_is_dropped_with_a_note(converted: dict[str, Bench], tmp_path: Path) -> None:
    """llm-compressor has one with an attention scheme; the others are taken over."""
    source = damaged(
        converted["fp8"], tmp_path / "copy", lambda t: t.update({f"{A}.q_scale": torch.ones(1)})
    )
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][f"{A}.q_scale"] = "model-00001-of-00001.safetensors"
    index.write_text(json.dumps(table))
    bench, done = again(source, tmp_path, "compressed-tensors", "w8a8_dynamic")
    assert done.code == 0, done.err
    assert f"dropped `{A}.q_scale`: the target has no place" in " ".join(done.out.split())
    stored = tensors_of(bench.out)
    assert f"{A}.q_scale" not in stored
    assert f"{A}.k_scale" in stored


def test_scales_without_a_place_are_dropped_with_a_note(
    converted: dict[str, Bench], tmp_path: Path
) -> None:
    bench, done = again(converted["fp8"].out, tmp_path, "ascend", "w8a8_dynamic")
    assert done.code == 0, done.err
    assert "dropped 6 scales of the cache of keys and values, such as" in done.out
    assert not any("cache" in name or name.endswith("k_scale") for name in tensors_of(bench.out))


def test_packing_carries_them_over(converted: dict[str, Bench], tmp_path: Path) -> None:
    bench = converted["modelopt"]
    done = run_cli("pack", bench.out, "--target", "compressed-tensors", "--out", tmp_path / "p")
    assert done.code == 0, done.err
    before, after = tensors_of(bench.out), tensors_of(tmp_path / "p")
    assert float(after[f"{A}.v_scale"]) == float(before[f"{A}.v_proj.v_scale"])
    assert failed(tmp_path / "p", "--against", bench.out) == []
    refused = run_cli(
        "pack", converted["ascend"].out, "--target", "compressed-tensors", "--out", tmp_path / "q"
    )
    assert refused.code == 2
    assert "the cache is quantized, too, and target `compressed-tensors` has no place" in refused.err
