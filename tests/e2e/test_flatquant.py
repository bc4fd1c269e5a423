"""W4A4 FlatQuant as a user meets it: both recipes, what the engine reads, what it cannot take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcli.core.numerics import decompose
from tests.e2e.calibrating import LENGTH, SAMPLES, Bench, Models, make_bench, write_tokenizer
from tests.e2e.conftest import run_cli, snapshot

LABEL = "W4A4_FLATQUANT_DYNAMIC"
RECIPE = f"""\
target: ascend
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, dtype: float32}}
rules:
  - match: "*_proj"
    scheme: {{name: w4a4_flatquant, epochs: 1, batch: 2}}
"""
ONE_DEVICE = RECIPE.replace("target: ascend", "target: {name: ascend, tp: 1}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(tmp_path: Path, models: Models) -> Callable[..., Bench]:
    def made(recipe: str = RECIPE, family: str = "qwen3") -> Bench:
        return make_bench(tmp_path, models(family), recipe)

    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Bench:
    """The recipe for any number of devices, converted."""
    bench = make_bench(tmp_path_factory.mktemp("written"), models("qwen3"), RECIPE)
    result = bench.run()
    assert result.code == 0, result.err
    assert "layer 1/4: model.layers.0" in result.err
    assert ", loss " in result.err
    return bench


def tensors_of(bench: Bench) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(bench.out.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_the_engine_finds_what_it_registers(written: Bench) -> None:
    tensors = tensors_of(written)
    for module in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ):
        name = f"model.layers.2.{module}"
        assert written.described(name) == LABEL
        mine = {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{name}.")}
        n, k = mine["weight"].shape
        left, right = decompose(k)
        assert {key: (t.dtype, tuple(t.shape)) for key, t in mine.items()} == {
            "weight": (torch.int8, (n, k)),
            "weight_scale": (torch.float32, (n, 1)),
            "weight_offset": (torch.float32, (n, 1)),
            "left_trans": (torch.bfloat16, (left, left)),
            "right_trans": (torch.bfloat16, (right, right)),
            "clip_ratio": (torch.float32, (1,)),
        }
        assert -8 <= int(mine["weight"].min()) < 0 < int(mine["weight"].max()) <= 7
        assert not mine["weight_offset"].any()
        assert 0 < float(mine["clip_ratio"]) <= 1
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        assert written.described(f"model.layers.2.{module}") == "W8A8_DYNAMIC"
        assert f"model.layers.2.{module}.left_trans" not in tensors


def test_siblings_are_equal_to_the_bit(written: Bench) -> None:
    """The engine keeps what it reads last; layers do not share."""
    tensors = tensors_of(written)
    for suffix in ("left_trans", "right_trans", "clip_ratio"):
        for layer in range(4):
            q, k, v = (tensors[f"model.layers.{layer}.self_attn.{m}_proj.{suffix}"] for m in "qkv")
            assert torch.equal(q, k)
            assert torch.equal(q, v)
            gate, up = (tensors[f"model.layers.{layer}.mlp.{m}_proj.{suffix}"] for m in ("gate", "up"))
            assert torch.equal(gate, up)
    first, second = (tensors[f"model.layers.{n}.mlp.up_proj.left_trans"] for n in (0, 1))
    assert not torch.equal(first, second)


def test_verification_at_every_depth(written: Bench) -> None:
    """Codes, edits and the engine's arithmetic; 12 dB are what 4 bits of a random model keep."""
    text = written.root / "text.txt"
    result = run_cli(
        *("verify", written.out, "--full", "--against", written.model, "--run", "--data", text),
        *(
            "--samples",
            4,
            "--length",
            16,
            "--tp",
            "1,2",
            "--max-kl",
            1,
            "--max-ppl-ratio",
            1.5,
            "--json",
        ),
    )
    assert result.code == 0, result.out + result.err
    found = result.json
    assert not [f for f in found["findings"] if f["severity"] == "error"]


def test_the_plan_says_what_is_replaced_and_why(make: Callable[..., Bench]) -> None:
    result = make().run("--plan", "--json")
    notes = result.json["plan"]["notes"]
    (note,) = [n for n in notes if "take w8a8_dynamic" in n]
    assert "model.layers.{0..3}.self_attn.o_proj" in note
    assert "model.layers.{0..3}.mlp.down_proj" in note
    assert "(8 modules)" in note
    assert "split over devices" in note
    rules = {(r["scheme"], r["modules"]) for r in result.json["plan"]["rules"]}
    assert rules == {("w4a4_flatquant", 20), ("w8a8_dynamic", 8)}


def test_one_device_takes_inputs_that_others_would_share(make: Callable[..., Bench]) -> None:
    """All of them but down_proj's 96, which decompose into 8 x 12."""
    bench = make(ONE_DEVICE)
    result = bench.run()
    assert result.code == 0
    assert "96 inputs decompose into 8 x 12" in result.err + result.out
    assert bench.described("model.layers.0.self_attn.o_proj") == LABEL
    assert bench.described("model.layers.0.mlp.down_proj") == "W8A8_DYNAMIC"
    tensors = tensors_of(bench)
    assert tensors["model.layers.0.self_attn.o_proj.right_trans"].shape == (8, 8)
    assert run_cli("verify", bench.out, "--full", "--against", bench.model).code == 0
    split = run_cli("verify", bench.out, "--tp", "2", "--json")
    assert split.code == 1
    told = [f["what"] for f in split.json["findings"] if f["check"] == "tp"]
    assert any("stored with transforms of 8 and 8" in what for what in told)


def test_interrupted_after_any_layer_it_ends_with_the_same_bytes(
    make: Callable[..., Bench], written: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantcli.calibration.store import Store

    bench = make()
    save = Store.save
    for stop in range(4):

        def interrupted(self: Store, index: int, *rest: object, stop: int = stop) -> None:
            save(self, index, *rest)
            if index == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(Store, "save", interrupted)
        assert bench.run().code == 130
    monkeypatch.setattr(Store, "save", save)
    result = bench.run("--workers", 1)
    assert result.code == 0, result.err
    assert snapshot(bench.out) == snapshot(written.out)


def test_experts_and_what_the_kernel_cannot_take_stay_at_eight_bits(make: Callable[..., Bench]) -> None:
    bench = make(family="qwen3_moe")
    assert bench.run().code == 0
    assert bench.described("model.layers.1.self_attn.q_proj") == LABEL
    assert bench.described("model.layers.1.mlp.experts.3.up_proj") == "W8A8_DYNAMIC"
    assert run_cli("verify", bench.out, "--against", bench.model).code == 0


@pytest.mark.parametrize(
    ("width", "why"),
    [
        (36, "multiples of 8"),
        (88, "decompose into 4 x 22"),
        (72, "decompose into 6 x 12"),
    ],
)
def test_odd_widths_fall_back_in_the_plan(
    make: Callable[..., Bench], width: int, why: str, tmp_path: Path
) -> None:
    """Whatever the kernel would refuse is known from the header; all siblings fall together."""
    from tests.builders import make_model
    from tests.e2e.conftest import CONFIG, bf16, np

    shapes = {f"model.layers.0.self_attn.{m}_proj.weight": (16, width) for m in "qkv"}
    shapes["model.layers.0.mlp.gate_proj.weight"] = shapes["model.layers.0.mlp.up_proj.weight"] = (
        16,
        64,
    )
    folder = tmp_path / "odd"
    tensors = {name: ("BF16", shape, bf16(np.ones(shape, "f4"))) for name, shape in shapes.items()}
    make_model(folder, {"model.safetensors": tensors}, config=CONFIG)
    write_tokenizer(folder)
    bench = make()
    result = run_cli(
        "quantize", bench.recipe, "--model", folder, "--plan", "--json", "--out", bench.out
    )
    assert result.code == 0, result.err
    (note,) = [n for n in result.json["plan"]["notes"] if "take w8a8_dynamic" in n]
    assert why in note
    assert "(3 modules)" in note


BAD = {
    "a member kept float": (
        RECIPE.replace("rules:\n", "rules:\n  - {match: '*.k_proj', scheme: keep}\n"),
        "the engine fuses these siblings",
    ),
    "a member at eight bits": (
        RECIPE.replace("rules:\n", "rules:\n  - {match: '*.up_proj', scheme: w8a8_dynamic}\n"),
        "the engine fuses these siblings",
    ),
    "too little data": (RECIPE.replace(f"samples: {SAMPLES}", "samples: 4096"), "4096 are asked for"),
    "no data": (
        RECIPE.replace(
            f"calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, dtype: float32}}\n",
            "",
        ),
        "needs calibration data",
    ),
    "tp that does not divide": (
        ONE_DEVICE.replace("tp: 1", "tp: 3"),
        "do not split over 3 devices",
    ),
    "tp of nothing": (ONE_DEVICE.replace("tp: 1", "tp: 0"), "`tp`"),
    "an unknown fallback": (RECIPE.replace("epochs: 1", "epochs: 1, fallback: w9"), "`fallback`"),
    "no epochs": (RECIPE.replace("epochs: 1", "epochs: 0"), "`epochs`"),
    "a clip that is a number": (RECIPE.replace("epochs: 1", "clip: 3"), "`clip`"),
    "running inputs": (
        RECIPE.replace("dtype: float32", "inputs: running"),
        "does not go together with `inputs: running`",
    ),
    "experts without a fallback": (
        RECIPE.replace("{name: w4a4_flatquant, epochs: 1, batch: 2}", "w4a4_dynamic"),
        "no W4A4_DYNAMIC for experts",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(make: Callable[..., Bench], name: str) -> None:
    recipe, words = BAD[name]
    bench = make(recipe, "qwen3_moe" if "experts" in name else "qwen3")
    result = bench.run()
    assert result.code == 2, result.err
    assert words in result.err
    assert "Traceback" not in result.err
    assert not bench.out.exists()


def test_a_transform_that_runs_away_names_its_layer(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantcli.schemes import flatquant

    monkeypatch.setattr(flatquant, "LARGEST_CONDITION", 1.0001)
    result = make().run()
    assert result.code == 2
    assert "condition number" in result.err
    assert "model.layers.0" in result.err
    assert "smaller `lr`" in result.err


def test_a_store_whose_transform_is_damaged_is_refused(make: Callable[..., Bench]) -> None:
    """Its seal is broken, so that no checkpoint is made of it."""
    bench = make()
    assert bench.calibrate().code == 0
    file = bench.store / "layer-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    result = bench.run("--calibration", bench.store)
    assert result.code == 2
    assert "layer-00001.safetensors" in result.err


def test_reports_hold_the_losses(written: Bench) -> None:
    for layer in range(4):
        told = json.loads((written.store / f"layer-{layer:05d}.json").read_text())["learned"]
        assert len(told["modules"]) == 5
        assert 0 < told["loss_served"] < told["loss_before"] * 1.5
        assert told["condition"] >= 1
