"""MXFP4 FlatQuant as a user meets it: what the engine reads on several devices, and damage to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.core.numerics import decompose
from tests.e2e.calibrating import LENGTH, SAMPLES, Bench, make_bench, write_tokenizer
from tests.e2e.conftest import Result, run_cli
from tests.tiny_models import make_tiny

LABEL = "W4A4_MXFP4_FLATQUANT"
DOWN = "model.layers.0.mlp.down_proj"
RECIPE = f"""\
target: {{name: ascend, tp: 2}}
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, dtype: float32}}
rules:
  - match: "*_proj"
    scheme: {{name: mxfp4_flatquant, epochs: 1, batch: 2}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough to be split over two devices."""
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    make_tiny(folder, "qwen3", num_hidden_layers=2, hidden_size=128, intermediate_size=256, head_dim=32)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Bench:
    """Converted."""
    bench = make_bench(tmp_path_factory.mktemp("written"), model, RECIPE)
    result = bench.run()
    assert result.code == 0, result.err
    assert "layer 1/2: model.layers.0" in result.err
    assert "blocks 2, as W4A4_MXFP4_FLATQUANT: up to 2 devices share its inputs" in result.out
    assert "transforms are made for tensor parallel sizes that divide 2" in result.out
    return bench


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_the_engine_finds_what_it_registers(written: Bench) -> None:
    tensors = tensors_of(written.out)
    table = json.loads((written.out / "quant_model_description.json").read_text())
    assert (table["group_size"], table["max_supported_tp"]) == (32, 2)
    assert table["model_quant_type"] == LABEL
    for module, blocks in (("self_attn.q_proj", 1), ("mlp.up_proj", 1), ("mlp.down_proj", 2)):
        name = f"model.layers.1.{module}"
        assert written.described(name) == LABEL
        own = {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{name}.")}
        n, k = own["weight"].shape[0], 2 * own["weight"].shape[1]
        left, right = decompose(k, blocks)
        assert {key: (t.dtype, tuple(t.shape)) for key, t in own.items()} == {
            "weight": (torch.uint8, (n, k // 2)),
            "weight_scale": (torch.uint8, (n, k // 32)),
            "left_trans": (torch.bfloat16, (left, left)),
            "right_trans": (torch.bfloat16, (right, right)),
            "clip_ratio": (torch.float32, (1,)),
        }
        assert own["clip_ratio"].tolist() == [1.0]
        half = left // 2
        outside = own["left_trans"][:half, half:]
        assert bool(outside.any()) == (blocks == 1)
        assert own["left_trans"][:half, :half].any()
    assert written.described("model.layers.1.self_attn.o_proj") == LABEL


def test_siblings_are_equal_to_the_bit(written: Bench) -> None:
    tensors = tensors_of(written.out)
    for suffix in ("left_trans", "right_trans"):
        gate, up = (tensors[f"model.layers.0.mlp.{m}_proj.{suffix}"] for m in ("gate", "up"))
        assert torch.equal(gate, up)


def verify(folder: Path, *more: object) -> Result:
    return run_cli("verify", folder, "--json", *more)


def test_verification_at_every_depth(written: Bench) -> None:
    text = written.root / "text.txt"
    result = verify(
        written.out, "--full", "--against", written.model, "--run", "--data", text, "--tp", "1,2",
        *("--samples", 4, "--length", 16, "--max-kl", 1, "--max-ppl-ratio", 1.5),
    )  # fmt: skip
    assert result.code == 0, result.out + result.err
    assert not [f for f in result.json["findings"] if f["severity"] == "error"]
    split = verify(written.out, "--tp", "4")
    assert split.code == 1
    told = [f["what"] for f in split.json["findings"] if f["check"] == "tp"]
    assert any("made for 2 devices and divisors of it" in what for what in told)


def between_blocks(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.left_trans"][0, -1] = 0.25


def of_another_width(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.left_trans"] = torch.eye(8, dtype=torch.bfloat16)


def singular(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.right_trans"][3] = 0


def a_logit(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.clip_ratio"] += 3


def of_one_sibling(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.left_trans"] *= 2


def nibbles_swapped(tensors: dict[str, torch.Tensor]) -> None:
    codes = tensors[f"{DOWN}.weight"]
    tensors[f"{DOWN}.weight"] = codes >> 4 | codes << 4


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"][2, 1] = 255


def lost(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{DOWN}.right_trans"]


def transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.left_trans"] = tensors[f"{DOWN}.left_trans"].mT.contiguous()


DAMAGE = {
    between_blocks: "left_trans is not zero at [0, 15], outside of the 2 blocks of 8",
    of_another_width: "is [8, 8]; for a weight of 128 x 256",
    singular: "right_trans cannot be inverted",
    a_logit: "clip_ratio",
    of_one_sibling: "the engine keeps one for both",
    nibbles_swapped: "SQNR",
    not_a_number: "an E8M0 scale is NaN",
    lost: "needs `model.layers.0.mlp.down_proj.right_trans`",
    transposed: "SQNR",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage(
    written: Bench, tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(written.out, folder)
    (folder / "quantcli_manifest.json").unlink(missing_ok=True)
    tensors = tensors_of(folder)
    damage(tensors)
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file, metadata={"format": "pt"})
    done = verify(folder, "--full", "--against", written.model)
    assert done.code == 1
    said = [f"{f['where']} {f['what']}" for f in done.json["findings"] if f["severity"] == "error"]
    assert any(DAMAGE[damage] in text for text in said), said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"group_size": 0}, "has `group_size` 0; W4A4_MXFP4_FLATQUANT needs 32"),
        ({"max_supported_tp": None}, "has None as `max_supported_tp`"),
        ({"max_supported_tp": 4}, "down_proj.left_trans"),
        ({"max_supported_tp": 0}, "has 0 as `max_supported_tp`"),
    ],
)
def test_a_description_that_says_otherwise(
    written: Bench, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(written.out, folder)
    file = folder / "quant_model_description.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    done = verify(folder)
    assert done.code == 1
    found = [f"{f['where']} {f['what']}" for f in done.json["findings"] if f["severity"] == "error"]
    assert any(said in text for text in found), found


def test_a_bias_falls_back(tmp_path: Path) -> None:
    folder = tmp_path / "qwen2"
    make_tiny(folder, "qwen2", num_hidden_layers=1, hidden_size=128, intermediate_size=256, head_dim=32)
    write_tokenizer(folder)
    bench = make_bench(tmp_path, folder, RECIPE)
    done = bench.run("--plan", "--json")
    assert done.code == 0, done.out + done.err
    notes = done.json["plan"]["notes"]
    (note,) = [n for n in notes if "has a bias in float32 alone" in n]
    assert "take mxfp8" in note
    assert "(3 modules)" in note
