"""An int8 cache of latents for vLLM-Ascend: converted, verified, damaged, refused, taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.calibrating import LENGTH, SAMPLES, Bench, make_bench, write_tokenizer
from tests.e2e.conftest import run_cli, snapshot
from tests.e2e.test_kv_cache import CALIBRATION, damaged, failed, tensors_of
from tests.tiny_models import make_tiny

A = "model.layers.1.self_attn"
HEADS, RANK, PLAIN = 4, 32, 16
DESCRIPTION = "quant_model_description.json"
QUANTIZED = '  - {match: "*_proj*", scheme: w8a8_dynamic}\n'
MIXED = '  - {match: "*q_b_proj", scheme: keep}\n' + QUANTIZED


def recipe(cache: str = "c8", rules: str = QUANTIZED, target: str = "ascend") -> str:
    kept = '  - {match: "*kv_b_proj", scheme: keep}\n'
    return f"target: {target}\nkv_cache: {cache}\n{CALIBRATION}rules:\n{kept}{rules}"


def make(folder: Path, **changes: Any) -> Path:
    make_tiny(folder, "deepseek_v3", **{"kv_lora_rank": RANK, **changes})
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "deepseek")


@pytest.fixture(scope="module")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(tmp_path_factory.mktemp("latents"), model, recipe())
    done = bench.run()
    assert done.code == 0, done.err
    return bench


def test_names_shapes_and_description(converted: Bench) -> None:
    stored = tensors_of(converted.out)
    table = json.loads((converted.out / DESCRIPTION).read_text())
    assert table["fa_quant_type"] == "FAKQuant"
    assert "kv_cache_type" not in table
    ours = {name for name in stored if ".fa_" in name}
    assert {name for name, kind in table.items() if kind == "FAQuant"} == ours
    assert len(ours) == 3 * 6
    for side, heads in (("q", HEADS), ("k", 1), ("v", 1)):
        scale, offset = stored[f"{A}.fa_{side}.scale"], stored[f"{A}.fa_{side}.offset"]
        assert (scale.dtype, scale.shape) == (torch.float32, (heads, 1))
        assert (offset.dtype, offset.shape) == (torch.int8, (heads, 1))
        assert torch.equal(scale, scale.bfloat16().float())
        assert not offset.any()


def test_scales_are_those_of_the_text(converted: Bench) -> None:
    """By transformers' own forward over the same windows, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(converted.model)((converted.root / "text.txt").read_text())
    runs = torch.tensor(ids["input_ids"][: len(ids["input_ids"]) // LENGTH * LENGTH]).view(-1, LENGTH)
    attention = AutoModelForCausalLM.from_pretrained(converted.model, dtype=torch.float32)
    inner = attention.model.layers[1].self_attn
    seen: dict[str, torch.Tensor] = {}
    inner.kv_a_layernorm.register_forward_hook(lambda m, a, y: seen.update(k=y))
    inner.q_b_proj.register_forward_hook(lambda m, a, y: seen.update(q=y))
    with torch.no_grad():
        attention(runs)
        queries = seen["q"].unflatten(-1, (HEADS, -1))[..., :PLAIN]
        keys = inner.kv_b_proj.weight.view(HEADS, -1, RANK)[:, :PLAIN]
        absorbed = torch.einsum("bthp,hpr->bthr", queries, keys).abs().amax((0, 1, 3))
    stored = tensors_of(converted.out)
    most = {"k": seen["k"].abs().amax().view(1), "q": absorbed}
    for side, amax in most.items():  # of all windows; calibration saw some of them
        ratio = stored[f"{A}.fa_{side}.scale"].flatten() / (amax / 127)
        assert 0.5 < float(ratio.min()) <= float(ratio.max()) < 1.02, side
    assert torch.equal(stored[f"{A}.fa_v.scale"], stored[f"{A}.fa_k.scale"])


def test_sound_at_every_depth(converted: Bench) -> None:
    more = ("--data", converted.root / "text.txt", "--samples", SAMPLES, "--length", LENGTH)
    calibration = ("--calibration", converted.store)
    assert (
        failed(converted.out, "--full", "--against", converted.model, *calibration, "--run", *more)
        == []
    )


def test_workers_change_no_byte(converted: Bench, tmp_path: Path) -> None:
    other = make_bench(tmp_path, converted.model, recipe())
    assert other.run("--workers", 3).code == 0
    assert snapshot(other.out) == snapshot(converted.out)


def test_scales_of_a_source_are_taken_over(converted: Bench, tmp_path: Path) -> None:
    text = recipe().replace("kv_cache: c8\n", "").replace(CALIBRATION, "")
    bench = make_bench(tmp_path, converted.out, text)
    done = bench.run()
    assert done.code == 0, done.err
    assert "scales of the cache are taken over (int8 per tensor)" in done.out
    before, after = tensors_of(converted.out), tensors_of(bench.out)
    for name in before:
        if ".fa_" in name:
            assert (after[name].dtype, after[name].tolist()) == (
                before[name].dtype,
                before[name].tolist(),
            )
    assert failed(bench.out, "--against", converted.out) == []


# -- refused before a byte is read ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text", "said"),
    [
        ({}, recipe(rules=""), "q_a_proj, q_b_proj, kv_a_proj_with_mqa has none with a weight_scale"),
        ({}, recipe(rules=MIXED), "from int8 weights, and q_b_proj has none"),
        ({"kv_lora_rank": 16}, recipe(), "latents in multiples of 32; kv_lora_rank is 16"),
        ({"q_lora_rank": None}, recipe(), "only if queries have a latent, too (q_lora_rank)"),
        (
            {},
            recipe("fp8", target="compressed-tensors"),
            "vLLM 0.32 loads no scale for a cache of latents",
        ),
        ({}, recipe().replace("ascend", "{name: ascend, device: 310P}"), "no int8 cache on the 310P"),
    ],
    ids=["float", "some float", "narrow", "no latent of queries", "vllm", "310P"],
)
def test_what_the_engine_does_not_have(
    tmp_path: Path, changes: dict[str, Any], text: str, said: str
) -> None:
    done = make_bench(tmp_path, make(tmp_path / "m", **changes), text).run("--plan")
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "minicpm3"}, "this is minicpm3"),
        ({"index_topk": 8}, "an indexer makes sparse"),
        ({"qk_nope_head_dim": 24}, "is not of the sizes in config.json"),
    ],
    ids=["family", "sparse", "sizes"],
)
def test_verify_names_models_that_the_engine_does_not_serve_so(
    converted: Bench, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = damaged(converted, tmp_path / "copy", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    found = json.loads(run_cli("verify", folder, "--json").out)["findings"]
    kind = {f["severity"] for f in found if said in f["what"]}
    assert kind == {"note" if "qk_nope_head_dim" in change else "error"}, found


# -- damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "depth", "said"),
    [
        (lambda t: t.pop(f"{A}.fa_v.scale"), (), "cache: v_scale of this layer is missing"),
        (lambda t: t.pop(f"{A}.fa_q.offset"), (), "cache: q_offset of this layer is missing"),
        (lambda t: t.update({f"{A}.fa_k.scale": torch.ones(2, 1)}), (), "cache: is F32 [2, 1]"),
        (lambda t: t.update({f"{A}.fa_q.scale": torch.ones(1, 1)}), (), "cache: is F32 [1, 1]"),
        (lambda t: t.update({f"{A}.fa_v.offset": torch.zeros(1, 1)}), (), "cache: is F32 [1, 1], and"),
        (lambda t: t[f"{A}.fa_k.offset"].add_(3), (), "cache: is not 0: the engine adds it"),
        (lambda t: t[f"{A}.fa_k.scale"].zero_(), ("--full",), "values: a scale is not"),
    ],
    ids=["v lost", "offset lost", "shape", "queries", "dtype", "offset", "zero"],
)
def test_damage_is_named(
    converted: Bench, tmp_path: Path, change: Any, depth: tuple[str, ...], said: str
) -> None:
    folder = damaged(converted, tmp_path / "copy", change)
    found = failed(folder, *depth)
    assert any(error.startswith(said) for error in found), found


def test_a_layer_may_stay_float(converted: Bench, tmp_path: Path) -> None:
    """The engine takes the layers that the description has."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{A}.fa_")]:
            del tensors[name]

    folder = damaged(converted, tmp_path / "copy", change)
    for file, key in ((DESCRIPTION, None), ("model.safetensors.index.json", "weight_map")):
        table = json.loads((folder / file).read_text())
        entries = table if key is None else table[key]
        for name in [name for name in entries if name.startswith(f"{A}.fa_")]:
            del entries[name]
        (folder / file).write_text(json.dumps(table))
    assert failed(folder) == []


@pytest.mark.parametrize("value", [None, "FAQuant"])
def test_a_cache_that_is_not_declared(converted: Bench, tmp_path: Path, value: str | None) -> None:
    folder = damaged(converted, tmp_path / "copy", lambda tensors: None)
    table = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(table | {"fa_quant_type": value}))
    found = failed(folder)
    assert any('there is no "fa_quant_type": "FAKQuant"' in error for error in found), found
    assert any("the engine knows FAKQuant alone" in error for error in found) == (value is not None)


def test_a_scale_of_another_layer(converted: Bench, tmp_path: Path) -> None:
    """It shows when a text is run, and next to the sound checkpoint; its bits, once recomputed."""
    folder = damaged(converted, tmp_path / "copy", lambda t: t[f"{A}.fa_k.scale"].mul_(1 / 16))
    more = ("--data", converted.root / "text.txt", "--samples", SAMPLES, "--length", LENGTH)
    run = failed(folder, "--against", converted.model, "--run", *more)
    assert any(error.startswith("rounded cache: latents come out of the cache") for error in run), run
    assert any("times the other model's" in e for e in failed(folder, "--against", converted.out))
    again = damaged(converted, tmp_path / "again", lambda t: t[f"{A}.fa_q.scale"].mul_(2))
    (again / "quantcli_manifest.json").write_bytes(
        (converted.out / "quantcli_manifest.json").read_bytes()
    )
    found = failed(again, "--against", converted.model, "--calibration", converted.store)
    assert any(error.startswith("recomputed:") for error in found), found


def test_latents_in_fp8_of_other_producers_are_not_checked(converted: Bench, tmp_path: Path) -> None:
    """Their offsets are float32; a scale is max / 448, so that int8 would clip."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".fa_" in name]:
            offset = name.endswith("offset")
            tensors[name] = tensors[name].float() if offset else tensors[name] * (127 / 448)

    folder = damaged(converted, tmp_path / "copy", change)
    more = ("--data", converted.root / "text.txt", "--samples", SAMPLES, "--length", LENGTH)
    assert failed(folder, "--full", "--against", converted.model, "--run", *more) == []
    found = json.loads(run_cli("verify", folder, "--json").out)["findings"]
    assert [f["severity"] for f in found if "latents in fp8" in f["what"]] == ["note"]
